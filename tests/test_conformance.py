"""The conformance test: its language is exact, it passes right losses, and it fails wrong ones for the right reason."""

from __future__ import annotations

import ast
import itertools
import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from instruct_llama import __main__ as cli
from instruct_llama import conformance as c
from instruct_llama.notebook.frontier import conformance_picture
from instruct_llama.rlhf import losses

BY_NAME = {variant.name: variant for variant in c.VARIANTS}
REINFORCE, RLOO, PPO = (BY_NAME[name] for name in ("REINFORCE, k1 in the reward", "RLOO", "PPO, sum over tokens"))


def parts(variant: c.Variant) -> list[tuple[float, ...]]:
    return [c.gradient_parts(variant, at) for at in c.policies()]


# -------------------------------------------------------------------------------------------------------- the language


def test_every_response_is_listed_once_and_probabilities_add_up():
    tokens, mask = c.LANGUAGE.tokens, c.LANGUAGE.mask
    shown = {tuple(row[keep].tolist()) for row, keep in zip(tokens, mask, strict=True)}
    words = {(*w, c.END) for n in range(3) for w in itertools.product(range(3), repeat=n)}
    assert shown == words | set(itertools.product(range(3), repeat=3)) and len(tokens) == 40
    last = tokens.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
    assert torch.equal(c.LANGUAGE.ended, last == c.END)
    for at in c.policies():
        assert torch.allclose(c.response_logprobs(at).exp().sum(1), torch.ones(2, dtype=torch.float64), atol=1e-12)


def test_the_log_probability_of_a_response_by_hand():
    at = c.policies()[0]
    response = next(i for i, y in enumerate(c.LANGUAGE.tokens.tolist()) if y == [1, 0, c.END])
    prefixes = [w for n in range(3) for w in itertools.product(range(3), repeat=n)]
    expected = 0.0
    for prefix, token in (((), 1), ((1,), 0), ((1, 0), c.END)):
        logits = at[1, prefixes.index(prefix)]
        expected += (logits[token] - logits.logsumexp(0)).item()
    assert c.response_logprobs(at)[1, response].item() == pytest.approx(expected, abs=1e-12)


def test_no_policy_is_above_the_frontier_and_the_best_one_has_j_star():
    best = c.ascend(PPO)
    assert c.objective(best).item() == pytest.approx(c.best_objective(), abs=1e-4)
    assert c.gap_closed(c.LANGUAGE.reference) == 0 and c.gap_closed(best) > 0.999
    frontier = c.frontier()
    for at in (*c.policies(), best):
        score, kl, _ = (x.item() for x in c.objective_parts(at))
        assert score <= min(highest for at_kl, highest in frontier if at_kl >= kl)


def test_values_are_the_expected_rewards_to_come():
    old = c.policies()[1]
    logprobs, ref = c.response_logprobs(old), c.response_logprobs(c.LANGUAGE.reference)
    at_start = (logprobs.exp() * (c.LANGUAGE.scores - c.BETA * (logprobs - ref))).sum(1)  # (P,)
    assert torch.allclose(c._values(old, c.BETA)[:, :, 0], at_start[:, None].expand(-1, 40))
    # after two letters: the expectation over the last token alone
    y = next(i for i, row in enumerate(c.LANGUAGE.tokens.tolist()) if row == [2, 1, 0])
    last = [i for i, row in enumerate(c.LANGUAGE.tokens.tolist()) if row[:2] == [2, 1]]
    token, token_ref = c.token_logprobs(old)[0][0, last, 2], c.token_logprobs(c.LANGUAGE.reference)[0][0, last, 2]
    by_hand = (token.exp() * (c.LANGUAGE.scores[0, last] - c.BETA * (token - token_ref))).sum()
    assert c._values(old, c.BETA)[0, y, 2].item() == pytest.approx(by_hand.item(), abs=1e-12)


def test_groups_of_two_are_all_pairs_with_their_probabilities():
    old = c.policies()[0]
    chosen, weights = c.groups(RLOO, old)
    assert chosen.shape == (2 * 40 * 40, 2) and weights.sum().item() == pytest.approx(1, abs=1e-12)
    p = c.response_logprobs(old)[1].exp()
    pair = ((chosen[:, 0] == 43) & (chosen[:, 1] == 47)).nonzero().item()
    assert weights[pair].item() == pytest.approx((p[3] * p[7] / 2).item(), rel=1e-12)


# ------------------------------------------------------------------------------------------------- published variants


def test_there_are_more_than_twenty_variants_each_with_a_source():
    assert len(BY_NAME) == len(c.VARIANTS) >= 20
    assert all(variant.source and variant.expected for variant in c.VARIANTS)


@pytest.mark.slow
def test_each_variant_gets_the_verdict_that_theory_gives_in_ninety_seconds():
    start = time.perf_counter()
    reports = [c.measure(variant) for variant in c.VARIANTS]
    seconds = time.perf_counter() - start
    assert {r.variant.name: r.verdict for r in reports} == {v.name: v.expected for v in c.VARIANTS}
    for report in (report for report in reports if report.verdict == "gradient of J"):
        assert report.cosine > 1 - 1e-9 and report.gap_closed > 0.999
        assert abs(1 - report.batch_cosine) < 4 * report.batch_cosine_error  # and in batches of 16
    assert seconds < 90


def test_k1_in_the_reward_and_k2_in_the_loss_have_the_gradient_of_the_kl():
    for name in ("REINFORCE, k1 in the reward", "k2 of the response in the loss"):
        for cosine, reward_cosine, kl_cosine, _, force in parts(BY_NAME[name]):
            assert min(cosine, reward_cosine, kl_cosine) > 1 - 1e-9 and force == pytest.approx(1, abs=1e-9)


def test_k1_in_the_loss_has_no_force():
    assert all(abs(force) < 1e-6 for *_, force in parts(BY_NAME["k1 in the loss"]))


def test_k3_of_the_response_lands_at_the_optimum_of_its_own_objective():
    """max E[r] - beta KL(reference || policy), found by ascent along that objective's own gradient."""
    logits = c.LANGUAGE.reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.15)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.15 * (1 - step / 300)
        score, _, reverse = c.objective_parts(logits)
        optimizer.zero_grad()
        (c.BETA * reverse - score).backward()
        optimizer.step()
    reached = c.ascend(BY_NAME["k3 of the response in the loss"])
    assert c.gap_closed(reached) == pytest.approx(c.gap_closed(logits.detach()), abs=1e-3)
    assert c.gap_closed(reached) < 0.9


def test_the_packages_own_ppo_has_the_gradient_of_j():
    def loss(r: c.Rollouts) -> Tensor:
        rewards = losses.penalised_rewards(r.scores, r.old_logprobs, r.ref_logprobs, r.mask, r.beta)
        advantages, _ = losses.gae(rewards, r.values, r.mask, 1.0, 0.95)
        return losses.policy_loss(r.logprobs, r.old_logprobs, advantages, r.mask, 0.2)

    for cosine, _, kl_cosine, _, force in parts(replace(PPO, loss=loss)):
        assert min(cosine, kl_cosine) > 1 - 1e-6 and force == pytest.approx(1, abs=1e-5)


# -------------------------------------------------------------------------------------------------- planted mistakes


def end_token_untrained(r: c.Rollouts) -> Tensor:
    return REINFORCE.loss(replace(r, mask=c._without_last(r.mask)))


def padding_counted(r: c.Rollouts) -> Tensor:
    return REINFORCE.loss(replace(r, mask=torch.ones_like(r.mask)))


def wrong_sign(r: c.Rollouts) -> Tensor:
    return REINFORCE.loss(replace(r, ref_logprobs=2 * r.logprobs - r.ref_logprobs))


def detached_kl(r: c.Rollouts) -> Tensor:
    return c.loss_with(lambda r: c.k2(c.total(c.k1(r), r)).detach())(r)


def ascends(r: c.Rollouts) -> Tensor:
    return -REINFORCE.loss(r)


def divided_by_length(r: c.Rollouts) -> Tensor:
    return (REINFORCE.loss(r) / r.mask.sum(1)).mean()


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (end_token_untrained, "score term biased, KL term biased"),
        (padding_counted, "score term biased, KL term biased"),
        (wrong_sign, "KL term pushes away from the reference"),
        (detached_kl, "KL term without force"),
        (ascends, "gradient of -J: the sign is wrong"),
        (divided_by_length, "score term biased, KL term biased"),
    ],
)
def test_a_planted_mistake_fails_for_the_reason_that_the_report_names(loss, reason, monkeypatch):
    monkeypatch.setattr(c, "gap_closed", lambda logits: 0.0)  # the verdict of the gradient alone
    monkeypatch.setattr(c, "ascend", lambda variant: c.LANGUAGE.reference)
    assert c.measure(c.Variant("planted", loss, "here")).verdict == reason


@pytest.mark.parametrize("variant", [RLOO, BY_NAME["GRPO"]], ids=lambda variant: variant.name)
def test_every_mistake_in_the_rollouts_is_seen(variant):
    assert c.seen_mistakes(variant) == {mistake.name: "seen" for mistake in c.MISTAKES}


def test_a_mistake_without_effect_is_said_to_have_none():
    """A loss without a reference cannot show a wrong reference; a batch of one has no next response."""
    seen = c.seen_mistakes(BY_NAME["Dr. GRPO"])
    assert seen["the reference is the old policy"] == "no effect" and seen["padding is in the mask"] == "seen"
    assert c.seen_mistakes(REINFORCE)["scores belong to the next response"] == "no effect"


def test_larger_groups_are_sampled_with_an_interval():
    def loss(r: c.Rollouts) -> Tensor:
        return c.dr_grpo_kl(r)

    four = replace(RLOO, group_size=4, loss=loss)
    chosen, weights = c.groups(four, c.policies()[0])
    assert chosen.shape == (c.SAMPLED, 4) and weights.sum().item() == pytest.approx(1)
    assert (chosen // 40 == chosen[:, :1] // 40).all() and set((chosen // 40).flatten().tolist()) == {0, 1}
    mean, error = c.sampled_cosine(four, chosen, c.policies()[0])
    assert 0 < error < 0.01 and mean + 4 * error > 1 - 1e-6
    biased, error = c.sampled_cosine(replace(four, loss=c.grpo), chosen, c.policies()[0])
    assert biased + 4 * error < 0.99


def test_a_loss_that_vmap_cannot_take_is_computed_batch_by_batch():
    def indexed(r: c.Rollouts) -> Tensor:
        reward = r.scores - r.beta * torch.stack([k[m].sum() for k, m in zip(c.k1(r), r.mask, strict=True)])
        return -(reward.detach() * torch.stack([p[m].sum() for p, m in zip(r.logprobs, r.mask, strict=True)])).mean()

    at = c.policies()[0]
    slow = c.expected_gradient(replace(REINFORCE, loss=indexed), at, at)
    assert torch.allclose(slow, c.expected_gradient(REINFORCE, at, at), atol=1e-12)


# --------------------------------------------------------------------------------------------------------- as a command

ADAPTER = """
GROUP_SIZE = 2

def loss(rollouts):
    kl = ((rollouts.logprobs - rollouts.ref_logprobs) * rollouts.mask).sum(dim=1)
    reward = (rollouts.scores - rollouts.beta * kl).detach()
    return -((reward - reward.mean()) * (rollouts.logprobs * rollouts.mask).sum(dim=1)).mean()
"""


def test_the_file_works_alone(tmp_path):
    """Copied to an empty folder, without the package on the path."""
    source = Path(c.__file__)
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"torch"}
    shutil.copy(source, tmp_path / "copied.py")
    (tmp_path / "mine.py").write_text(ADAPTER, encoding="utf-8")
    done = subprocess.run([sys.executable, "copied.py", "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "gradient of J" in done.stdout and done.stdout.count("seen  ") == 10, done.stderr


def test_the_command_writes_the_measures_and_a_picture(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(ADAPTER, encoding="utf-8")
    assert cli.main(["conformance", str(tmp_path / "mine.py"), "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "conformance" / "report.json").read_text(encoding="utf-8"))
    assert row["verdict"] == "gradient of J" and row["group_size"] == 2 and row["gap_closed"] > 0.99
    assert (tmp_path / "conformance" / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "picture.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no function loss"),
        ("KL = 'elsewhere'\ndef loss(r): return r.logprobs.sum()", "KL is 'elsewhere'"),
        ("GROUP_SIZE = 0\ndef loss(r): return r.logprobs.sum()", "GROUP_SIZE 0"),
        ("STEPS = 1.5\ndef loss(r): return r.logprobs.sum()", "STEPS 1.5"),
        ("def loss(r): return r.logprobs", "one number per batch"),
        ("def loss(r): return r.scores.sum()", "Does the loss use `logprobs`?"),
        (None, "There is no file"),
    ],
)
def test_a_wrong_adapter_is_one_sentence(tmp_path, capsys, text, message):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert cli.main(["conformance", str(path), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.startswith("error: ") and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_an_adapter_the_table_has_every_variant(monkeypatch, capsys):
    monkeypatch.setattr(c, "ascend", lambda variant: c.LANGUAGE.reference)
    monkeypatch.setattr(c, "sampled_cosine", lambda *args: (1.0, 0.0))
    assert c.main([]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line[:40].rstrip() for line in lines] == list(BY_NAME)


def test_the_picture_numbers_every_loss():
    reports = [
        c.Report(v, 0.9, 0.9, math.nan, math.nan, 0.5, 0.5, 0.0, 0.9, 0.01, 0.5, 1.5, 0.4 * i, "")
        for i, v in enumerate(c.VARIANTS[:4])
    ]
    left, right = conformance_picture(reports).axes
    assert [label.get_text() for label in left.get_yticklabels()] == [
        f"{v.name}  {i}" for i, v in enumerate(c.VARIANTS[:4], start=1)
    ]
    assert [text.get_text() for text in right.texts] == ["1", "2", "3", "4"]
