"""PPO's four networks over one base: adapters of every stage, and where each starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from instruct_llama import presets
from instruct_llama.config import ModelConfig, UserError
from instruct_llama.evaluation.exact import EnumerableTokens
from instruct_llama.model import lora
from instruct_llama.model.llama import Llama
from instruct_llama.pipeline import for_shared_base, require_inputs
from instruct_llama.pipeline import run as run_stage
from instruct_llama.rlhf import ppo as algorithm
from instruct_llama.stages import ppo
from instruct_llama.training import actors as layouts
from instruct_llama.training import checkpoint
from instruct_llama.worlds import enumerable


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_p16_adapters_of_all_stages_lie_over_one_base(pipeline, tmp_path, kind):
    """SFT trains an adapter, the reward model goes on from it, PPO from both: nothing is merged or quantised again."""
    settings = pipeline.replace(
        out=str(tmp_path), init=str(Path(pipeline.out) / "pretrain"), sft__lora__rank=4, sft__quant__kind=kind,
        sft__optim__lr=0.02, reward__lora__rank=4, reward__quant__kind=kind, reward__sample_share=0.0,
        ppo__layout="shared_base", ppo__quant__kind=kind, ppo__iterations=1,
    )  # fmt: skip
    start = run_stage("sft", settings.replace(sft__name="sft")).folder
    judged = run_stage("reward", settings.replace(init=str(start))).folder
    assert judged.name == "reward-lora" and checkpoint.base_of(judged)[0].resolve() == Path(settings.init).resolve()
    actors, *_ = ppo.build(settings.replace(init=str(start)), require_inputs("ppo", settings.replace(init=str(start))))
    tokens = torch.randint(actors.base.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    taught, untaught = checkpoint.load(start)[0](tokens), checkpoint.load(settings.init)[0](tokens)
    for role in ("policy", "reference"):  # both start as the SFT model
        with actors.use(role) as model:
            assert torch.allclose(model(tokens), taught, atol=1e-5)
    assert not torch.allclose(taught, untaught, atol=1e-2)
    scores, norm = checkpoint.load(judged)[0](tokens), checkpoint.read_info(judged)["reward"]
    # the value starts as the reward model, in the unit of the rewards that it is to predict
    for role, expected in (("reward", scores), ("value", (scores - norm["mean"]) / norm["scale"])):
        with actors.use(role) as model, torch.no_grad():
            unit = norm["scale"] if role == "value" else 1.0
            assert torch.allclose(model(tokens), expected, rtol=1e-4, atol=1e-5 / unit)
    for ours, theirs in zip(*(lora.adapter_state(actors.base, role).items() for role in ("value", "reward")),
                            strict=True):  # fmt: skip
        assert torch.equal(ours[1], theirs[1]) and ours[1].data_ptr() != theirs[1].data_ptr(), ours[0]
    result = run_stage("ppo", settings.replace(init=str(start)))
    first = result.history[0]
    assert abs(first["ppo/kl"]) < 1e-4 and first["ppo/sampling_gap"] < 1e-4
    moved = checkpoint.load(result.folder)[0](tokens)
    assert 0 < float((moved - taught).abs().max()) < float((taught - untaught).abs().max())


def test_p16_a_reward_model_for_the_shared_base_is_trained_over_ppos_kind_of_base():
    """Whatever reward.quant says: PPO refuses adapters that were trained over a base kept otherwise."""
    settings = presets.get("tiny").replace(ppo__quant__kind="nf4", reward__quant__kind="none", ppo__lora__rank=6)
    found = for_shared_base(settings)
    assert found.quant == settings.ppo.quant and found.lora == settings.ppo.lora
    assert for_shared_base(settings.replace(reward__lora__rank=3)).lora.rank == 3


def test_p16_a_base_of_another_kind_is_refused(pipeline, tmp_path):
    settings = pipeline.replace(
        out=str(tmp_path), init=str(Path(pipeline.out) / "sft"), reward__lora__rank=4, reward__sample_share=0.0,
        ppo__layout="shared_base", ppo__quant__kind="nf4",
    )  # fmt: skip
    run_stage("reward", settings)
    with pytest.raises(UserError, match="ppo.quant is nf4, but the adapters were trained over .* .none."):
        ppo.build(settings, require_inputs("ppo", settings))


def test_p08_a_coarse_base_bears_fp32_adapters_and_heads(pipeline, tmp_path):
    """In bf16 the frozen base is kept in 16 bits, which is what makes 7 B fit; what trains is not."""
    settings = pipeline.replace(
        out=str(tmp_path), init=str(Path(pipeline.out) / "sft"), reward__lora__rank=4, reward__sample_share=0.0,
        ppo__layout="shared_base", ppo__precision="bf16", reward__loop__steps=1,
    )  # fmt: skip
    run_stage("reward", settings)
    models = ppo.build(settings, require_inputs("ppo", settings))[0]
    assert {p.dtype for p in lora.base_parameters(models.base).values()} == {torch.bfloat16}
    for role in ("policy", "value"):
        assert {p.dtype for p in models.trainable(role).values()} == {torch.float32}
    trained = {id(p) for role in ("policy", "value") for p in models.trainable(role).values()}
    everything = [*models.base.parameters(), *(p for head in models.heads.values() for p in head.parameters())]
    assert {id(p) for p in everything if p.requires_grad} == trained  # neither the base nor the reward model


def test_p10_scores_over_a_shared_base_are_fp32_under_autocast():
    """In bfloat16, scores of 5 come in steps of 1/32: coarser than what the value model has to learn."""
    base = Llama(ModelConfig(vocab_size=16, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=16, max_seq_len=8))
    head = torch.nn.Linear(16, 1, bias=False)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores, hidden = layouts._ScalarView(base, head)(tokens), base.hidden(tokens)
    assert torch.equal(scores, head(hidden.float()).squeeze(-1))  # bfloat16's would be of another dtype, and rounded


# ---------------------------------------------------------------- four models: devices, swapping


def test_each_network_is_loaded_where_it_belongs(pipeline):
    """By `ppo.devices` in the order of the roles; swapped ones on the CPU. "meta" stands for a GPU."""
    sft_run, reward_run = (Path(pipeline.out) / stage for stage in ("sft", "reward"))
    for changes, places in (
        ({"ppo__devices": ("cpu", "meta", "cpu", "meta")}, ["cpu", "meta", "cpu", "meta"]),
        ({"ppo__offload_inactive": True}, ["cpu"] * 4),
        ({}, ["meta"] * 4),
    ):
        config = pipeline.replace(**changes).ppo
        models = layouts.four_models(sft_run, reward_run, EnumerableTokens(), torch.device("meta"), config)
        assert list(models.models) == ["policy", "reference", "value", "reward"]
        assert [next(model.parameters()).device.type for model in models.models.values()] == places
        assert models.swap_to == (torch.device("meta") if "ppo__offload_inactive" in changes else None)


def test_frozen_layers_of_the_policy_do_not_train_with_their_embeddings(pipeline):
    folders = [Path(pipeline.out) / stage for stage in ("sft", "reward")]
    models = layouts.four_models(
        *folders, EnumerableTokens(), torch.device("cpu"), pipeline.replace(ppo__freeze_layers=1).ppo
    )
    names = models.trainable("policy")
    assert names and all(name.startswith(("layers.1.", "norm.")) for name in names)  # the tied output is the embedding
    assert set(models.trainable("value")) == set(dict(models.models["value"].named_parameters()))
    assert not models.trainable("reference") and not models.trainable("reward")


def moves(monkeypatch) -> list[tuple[str, str]]:
    """Every move of a whole network, as (its class, device)."""
    seen: list[tuple[str, str]] = []
    real = torch.nn.Module.to

    def to(self, *args, **options):
        if isinstance(self, Llama):
            seen.append((id(self), str(args[0])))
        return real(self, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    return seen


def test_swapped_models_come_for_their_phase_and_go(pipeline, tmp_path, monkeypatch):
    """Which network is on the device when; the CPU stands for both places."""
    settings = pipeline.replace(out=str(tmp_path), init=str(Path(pipeline.out) / "sft"), ppo__offload_inactive=True)
    actors, *_ = ppo.build(settings, [Path(pipeline.out) / "sft", Path(pipeline.out) / "reward"])
    named = {id(model): role for role, model in actors.models.items()}
    seen = moves(monkeypatch)
    drawn = algorithm.draw_prompts([[1, 5, 9, 6]] * 4, settings.ppo, 0, 0)
    optimizer = actors.make_optimizer(settings.ppo)
    algorithm.run_iteration(actors, settings.ppo, drawn, optimizer, 0.1, 0, 0)
    assert [named[i] for i, _ in seen] == [
        "policy", "policy",  # answers, and goes
        "reference", "reference", "value", "value", "reward", "reward",  # each judges, and goes
        "policy", "value", "policy", "value",  # both learn, and go
    ]  # fmt: skip
    assert actors.here == set()
    with actors.on_device("policy", "value"), actors.use("policy"):
        assert actors.here == {"policy", "value"}
    with pytest.raises(RuntimeError), actors.on_device("reward"):
        raise RuntimeError
    assert actors.here == set()  # also after an error


@pytest.mark.parametrize("change", [{"ppo__offload_inactive": True}, {"ppo__devices": ("cpu",) * 4}])
def test_where_the_models_are_changes_no_number(pipeline, tmp_path, change):
    settings = pipeline.replace(init=str(Path(pipeline.out) / "sft"))
    runs = []
    for name, more in (("usual", {}), ("moved", change)):
        out = tmp_path / name
        shutil.copytree(Path(pipeline.out) / "reward", out / "reward")
        runs.append(run_stage("ppo", settings.replace(out=str(out), **more)).history)
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"ppo__devices": ("cpu", "cpu")}, "must name four devices"),
        ({"ppo__devices": ("cpu",) * 4, "ppo__offload_inactive": True}, "exclude each other"),
    ],
)
def test_places_that_make_no_sense_are_refused(pipeline, tmp_path, change, sentence):
    settings = pipeline.replace(init=str(Path(pipeline.out) / "sft"), **change)
    with pytest.raises(UserError, match=sentence):
        ppo.build(settings, require_inputs("ppo", settings))


def test_the_moments_wait_with_their_weights(pipeline, monkeypatch):
    """With ppo.offload_inactive they are moved in for the update and out after it; without, never."""
    for swap, expected in ((True, ["here", "cpu"]), (False, [])):
        weight = torch.nn.Parameter(torch.zeros(2, 2))
        optimizer = torch.optim.AdamW([weight])
        weight.grad = torch.ones(2, 2)
        optimizer.step()
        asked: list[str] = []

        class Moment(torch.Tensor):
            def to(self, place, asked=asked, weight=weight):
                asked.append("here" if place is weight.device or len(asked) == 0 else str(place))
                return self

        optimizer.state[weight] = {"exp_avg": torch.zeros(2, 2).as_subclass(Moment), "step": torch.tensor(1.0)}
        table = enumerable.reward_model(enumerable.fixed())
        place = torch.device("cpu") if swap else None
        actors = layouts.FourModels(table, table, table, table, EnumerableTokens(), swap_to=place)
        with actors.optimizing(optimizer):
            pass
        assert asked == expected
