"""Random streams by name (P42): streams of other keys differ in what they draw, streams of the same keys agree."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import instruct_llama
from instruct_llama import seeds
from instruct_llama.data.batching import epoch_order, window_order

CPU = torch.device("cpu")
STREAMS = [
    (stage, iteration, batch, rank)
    for stage in ("rollout", "ptx", "dropout")
    for iteration in (0, 1, 2, 255, 256)
    for batch in (0, 1, 2, 15)
    for rank in (0, 1, 3)
]


def uniform(keys, seed=1):
    """Eight numbers of each kind of generator."""
    with seeds.forked(CPU, seed, *keys):
        dropped = torch.rand(8)
    library = seeds.python_random(seed, *keys)
    return {
        "torch": torch.rand(8, generator=seeds.generator(CPU, seed, *keys)),
        "global": dropped,
        "python": torch.tensor([library.random() for _ in range(8)]),
        "numpy": torch.tensor(seeds.numpy_generator(seed, *keys).random(8)),
    }


@pytest.mark.parametrize("kind", ["torch", "global", "python", "numpy"])
def test_p42_streams_of_other_keys_draw_other_numbers(kind):
    drawn = torch.stack([uniform(keys)[kind] for keys in STREAMS])  # (S, 8)
    apart = (drawn[:, None] - drawn).abs().amax(-1) + torch.eye(len(drawn))  # (S, S)
    assert float(apart.min()) > 1e-2  # of every pair, some number differs
    again = torch.stack([uniform(keys)[kind] for keys in STREAMS])
    assert torch.equal(drawn, again)
    other = torch.stack([uniform(keys, seed=2)[kind] for keys in STREAMS])
    assert float((drawn[:, None] - other).abs().amax(-1).min()) > 1e-2  # no stream of one seed is one of the next


def test_p42_streams_are_not_correlated():
    keys = [("rollout", iteration, batch) for iteration in range(8) for batch in range(8)]
    drawn = torch.stack([torch.rand(2_000, generator=seeds.generator(CPU, 1, *key)) for key in keys]) - 0.5
    correlation = torch.corrcoef(drawn) - torch.eye(len(keys))
    assert float(correlation.abs().max()) < 5 / 2_000**0.5  # five standard errors; 64 * 63 / 2 pairs
    assert float(drawn.mean(1).abs().max()) < 5 * (1 / 12 / 2_000) ** 0.5


def test_p42_keys_are_told_apart():
    keys = [
        (), ("",), ("a",), ("a", "b"), ("ab",), ("b", "a"), ("a", 1), ("a", "1"), ("a1",), ("a", 11), ("a", 1, 1), (1,),
        ("1",), (-1,), ("a,b",), ("s1:b",), ("a", ""),
    ]  # fmt: skip
    mixed = [seeds.derive(1, *key) for key in keys]
    assert len(set(mixed)) == len(keys)
    assert len({value & 0xFFFF_FFFF for value in mixed}) == len(keys)  # what torch's CPU generator keeps
    assert all(0 <= value < 2**64 for value in mixed)
    assert seeds.derive(1, "a", np.int64(3)) == seeds.derive(1, "a", 3)  # an index out of an array is a number
    assert seeds.derive(2**70, "a") != seeds.derive(0, "a")


def test_p42_the_streams_do_not_change_from_version_to_version():
    assert seeds.derive(1, "rollout", 0, 0) == 10097814611334815391  # recorded figures depend on it


def test_p42_forked_leaves_no_trace():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = torch.rand(1)
    with seeds.forked(CPU, 1, "dropout", 0):
        torch.rand(3)
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)


def test_p42_every_order_is_its_own():
    names, orders = ((), ("sft",), ("sft", "microbatch"), ("minibatch", 0), ("minibatch", 1), ("prompts",)), []
    for seed, epoch in itertools.product((1, 2), (0, 1)):
        orders += [epoch_order(50, seed, epoch, *keys) for keys in names] + [window_order(50, seed, epoch)]
    assert all((one != other).any() for one, other in itertools.combinations(orders, 2))
    assert all(sorted(order) == list(range(50)) for order in orders)


# Where a seed is no seed of a run: the text of the world and of the languages, whose strings and numbers name them, a
# self-check of a kernel, and the conformance test, which is one file that imports torch alone.
OTHERS = {"seeds.py", "converters.py", "skills.py", "enumerable.py", "doctor.py", "conformance.py"}


MAKERS = ("manual_seed", "default_rng", "Random", "RandomState", "seed")


def own_randomness(source: str, may_make: bool = False) -> list[str]:
    """Generators that a module makes, and arithmetic on seeds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in MAKERS and not may_make:
            found.append(ast.unparse(node))
        if isinstance(node, ast.BinOp) and any(re.search(r"\bseed$", ast.unparse(x)) for x in (node.left, node.right)):
            found.append(ast.unparse(node))
    return found


def test_p42_no_other_module_makes_generators_or_counts_with_seeds():
    package = Path(instruct_llama.__file__).parent
    texts = {path: path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    found = {path.name: own_randomness(text, path.name in OTHERS) for path, text in texts.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert len(own_randomness("torch.manual_seed(settings.seed + 1)")) == 2
    assert own_randomness("f(seed * 3 + step)") == ["seed * 3"] and own_randomness("number << seed")


def streams_by_name(source: str) -> list[tuple[str, ...]]:
    """The keys that a module's code gives to `seeds` or as `keys=`: of each call with a literal first, all as written.

    Calls with a literal seed are left out: theirs is no seed of a run.
    """
    found = []
    for node in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        *owner, name = ast.unparse(node.func).split(".")
        given = node.args[{"generator": 1, "forked": 1}.get(name, 0) :] if owner == ["seeds"] else []
        if given and not isinstance(given[0], ast.Constant):
            found.append(given[1:])
        found += [word.value.elts for word in node.keywords if word.arg == "keys" and isinstance(word.value, ast.Tuple)]
    return [tuple(map(ast.unparse, keys)) for keys in found if keys and isinstance(keys[0], ast.Constant)]


def test_p42_no_two_places_draw_from_one_stream():
    package = Path(instruct_llama.__file__).parent
    found = [keys for path in package.rglob("*.py") for keys in streams_by_name(path.read_text(encoding="utf-8"))]
    assert {("'rollout'", "iteration", "number"), ("'sft_samples'",), ("'best_of'",)} <= set(found)
    twice = {keys for keys in found if found.count(keys) > 1}
    assert twice <= {("'adapter'", "name")}  # each adapter of a shared base is named once
    code = 'seeds.derive(seed, "a")\nf(keys=("a",))\nseeds.forked(device, s.seed, "b", i)\nseeds.derive(0, "c")'
    assert streams_by_name(code) == [("'a'",), ("'a'",), ("'b'", "i")]
