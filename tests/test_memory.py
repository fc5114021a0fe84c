"""Memory estimates: counted against the tensors that there are, and what is said where they do not fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from instruct_llama import presets
from instruct_llama.config import LoRAConfig, ModelConfig, QuantConfig, RopeScaling, Settings, UserError
from instruct_llama.evaluation.exact import EnumerableTokens
from instruct_llama.model import lora
from instruct_llama.model.llama import KVCache, Llama, ScalarLlama
from instruct_llama.pipeline import run as run_stage
from instruct_llama.training import memory, optim
from instruct_llama.training.actors import FourModels
from instruct_llama.training.memory import GB

PUBLISHED = {  # the number of parameters that each model's own page gives (the hub counts them from its safetensors)
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384, "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192, "llama3-8b": 8_030_261_248, "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824,
}  # fmt: skip


@pytest.mark.parametrize("name", presets.MODEL_SHAPES)
def test_p13_shapes_have_the_published_number_of_parameters(name):
    shape = presets.MODEL_SHAPES[name]
    assert memory.parameter_count(shape) == PUBLISHED[name]
    with torch.device("meta"):
        model = Llama(shape)  # the model itself, without memory
    assert sum(p.numel() for p in set(model.parameters())) == PUBLISHED[name]


SETTINGS = {  # of each model's config.json: heads, key/value heads, context, rope_theta, stretched by
    "smollm2-135m": (9, 3, 8192, 1e5, None), "smollm2-360m": (15, 5, 8192, 1e5, None),
    "smollm2-1.7b": (32, 32, 8192, 1.3e5, None), "tinyllama-1.1b": (32, 4, 2048, 1e4, None),
    "llama2-7b": (32, 32, 4096, 1e4, None), "llama2-13b": (40, 40, 4096, 1e4, None),
    "llama2-70b": (64, 8, 4096, 1e4, None), "llama3-8b": (32, 8, 8192, 5e5, None),
    "llama3.1-8b": (32, 8, 131_072, 5e5, 8.0), "llama3.2-1b": (32, 8, 131_072, 5e5, 32.0),
    "llama3.2-3b": (24, 8, 131_072, 5e5, 32.0),
}  # fmt: skip


@pytest.mark.parametrize("name", presets.MODEL_SHAPES)
def test_p13_what_no_number_of_parameters_shows_is_as_published(name):
    """As many weights make other models: with other heads, other rotary frequencies, another epsilon."""
    shape, factor = presets.MODEL_SHAPES[name], SETTINGS[name][-1]
    found = (shape.n_heads, shape.n_kv_heads, shape.max_seq_len, shape.rope_theta)
    assert found == SETTINGS[name][:-1] and shape.norm_eps == 1e-5
    assert shape.rope_scaling == (RopeScaling("llama3", factor, 1.0, 4.0, 8192) if factor else RopeScaling())


def test_every_shape_has_a_published_number():
    assert set(PUBLISHED) == set(presets.MODEL_SHAPES) == set(SETTINGS)


def saved_bytes(config: ModelConfig, lora_config: LoRAConfig, precision: str, tokens: int) -> int:
    """What autograd really holds after the trunk's forward pass, each storage once, parameters left out."""
    model = Llama(config)
    if lora_config.rank:
        if precision == "bf16":
            model.bfloat16()
        lora.add_adapter(model, "a", lora_config, torch.Generator())
        lora.use_adapter(model, "a")
    model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held, seen = [], {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        model.hidden(torch.randint(config.vocab_size, (1, tokens)))
    return sum(seen.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("wide", [False, True])
def test_saved_activations_are_counted_exactly(precision, rank, wide):
    """One block more, 128 tokens more: the difference of differences is what one block keeps of 128 tokens."""
    shape = {"dim": 128, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 512} if wide else {"dim": 64, "ffn_dim": 128}
    adapters = LoRAConfig(rank=rank)

    def saved(layers: int, tokens: int) -> int:
        return saved_bytes(ModelConfig(vocab_size=50, n_layers=layers, max_seq_len=512, **shape), adapters, precision,
                           tokens)  # fmt: skip

    counted = (saved(3, 256) - saved(2, 256)) - (saved(3, 128) - saved(2, 128))
    assert counted == 128 * memory.block_bytes(ModelConfig(**shape), adapters, precision)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_a_whole_model_are_within_15_percent(recompute, precision):
    """In bf16, autocast's copies of the weights are held too."""
    config = ModelConfig(vocab_size=50, dim=128, n_layers=8, n_heads=4, n_kv_heads=2, ffn_dim=352, max_seq_len=512,
                         gradient_checkpointing=recompute)  # fmt: skip
    none = LoRAConfig(rank=0)
    held = saved_bytes(config, none, precision, 256)
    if recompute:  # the hooks see the blocks' inputs; one block whole comes with the backward pass
        held += 256 * memory.block_bytes(config, none, precision)
        held += 2 * memory.projection_count(config) / config.n_layers * (precision == "bf16")
    assert memory.activation_bytes(config, none, precision, 256) == pytest.approx(held, rel=0.15)


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_weights_gradients_and_moments_are_those_of_the_tensors(kind, optimizer):
    shape = ModelConfig(vocab_size=400, dim=256, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=704)
    settings = Settings().replace(
        model=shape, qlora__lora=LoRAConfig(rank=16), qlora__quant__kind=kind, qlora__optim__kind=optimizer
    )
    config, model = settings.qlora, Llama(shape)
    lora.quantize(model, config.quant)
    lora.add_adapter(model, "a", config.lora, torch.Generator())
    lora.use_adapter(model, "a")
    optimiser = optim.make_optimizer([(list(model.parameters()), 1e-3)], config.optim)
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    optimiser.step()
    weights = sum(p.nbytes for p in set(model.parameters()))
    for _, layer in lora.projections(model):
        if isinstance(layer.base, lora.QuantLinear):
            scales = layer.base.quant_state
            weights += layer.base.qweight.nbytes + scales.absmax.nbytes + scales.state2.absmax.nbytes
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    state = [v for s in optimiser.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.numel() > 256]
    found = memory.estimate(settings, "qlora").parts
    assert found["weights"] == pytest.approx(weights, rel=0.01)
    # 8-bit AdamW keeps one scale a block beside its moments, and small matrices in 32 bits
    loose = 0.15 if optimizer == "adamw_8bit" else 0.01
    assert found["gradients and optimizer"] == pytest.approx(gradients + sum(v.nbytes for v in state), rel=loose)


UNTIED = ModelConfig(vocab_size=90, dim=32, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=64,
                     tie_embeddings=False)  # fmt: skip


def networks(shape: ModelConfig) -> FourModels:
    return FourModels(Llama(shape), Llama(shape), ScalarLlama(shape), ScalarLlama(shape), EnumerableTokens())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_frozen_layers_are_not_counted_as_trained(layers, tied):
    """The embeddings are frozen with them; an output of its own is not."""
    shape = dataclasses.replace(UNTIED, tie_embeddings=tied)
    model = Llama(shape)
    optim.freeze_first(model, layers)
    count = sum(p.numel() for p in set(model.parameters()) if p.requires_grad)
    parts = memory.estimate(Settings().replace(model=shape, sft__freeze_layers=layers), "sft").parts
    assert parts["gradients and optimizer"] == 12 * count  # a gradient and two moments, each in fp32


def test_ppo_counts_the_weights_and_moments_of_its_networks():
    """Policy and value train, all four are there; of swapped ones, two."""
    shape = dataclasses.replace(UNTIED, tie_embeddings=True)
    models, settings = networks(shape), Settings().replace(model=shape)
    parts = memory.estimate(settings, "ppo").parts
    everything = sum(p.nbytes for model in models.parts() for p in set(model.parameters()))
    trained = sum(p.numel() for role in ("policy", "value") for p in models.trainable(role).values())
    assert parts["weights"] == pytest.approx(everything, rel=0.01)
    assert parts["gradients and optimizer"] == pytest.approx(12 * trained, rel=0.01)
    swapped = memory.estimate(settings.replace(ppo__offload_inactive=True), "ppo").parts
    assert swapped["weights"] == parts["weights"] / 2


def test_a_shared_base_counts_four_adapters_and_trains_two():
    settings = Settings().replace(model=UNTIED, ppo__layout="shared_base", ppo__lora=LoRAConfig(rank=4))
    base, generator = Llama(UNTIED), torch.Generator()
    weights = sum(p.nbytes for p in base.parameters())
    for role in ("policy", "value", "reward", "reference"):
        lora.add_adapter(base, role, settings.ppo.lora, generator)
    adapter = sum(p.nbytes for p in lora.adapter_parameters(base, "policy"))
    parts = memory.estimate(settings, "ppo").parts
    assert parts["weights"] == weights + 4 * adapter
    assert parts["gradients and optimizer"] == 2 * 3 * adapter


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_answering_needs_the_cache_that_sampling_makes(precision):
    """Keys and values of every layer, for each row to the end of the context, beside the logits of one step."""
    settings = Settings().replace(model=UNTIED, ppo__generation_batch_size=50, ppo__micro_batch_size=1,
                                  ppo__max_new_tokens=8,
                                  ppo__seq_len=1000, ppo__precision=precision)  # fmt: skip
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    cache = KVCache(UNTIED, 50, UNTIED.max_seq_len, "cpu", dtype)
    wanted = cache.keys.nbytes + cache.values.nbytes + 4 * 50 * UNTIED.vocab_size * 4
    assert memory.estimate(settings, "ppo").parts["generation"] == wanted


def test_what_is_trained_beside_adapters_is_counted():
    settings = Settings().replace(model=UNTIED, qlora__lora=LoRAConfig(rank=4), qlora__train_embeddings=True)
    model = Llama(UNTIED)
    lora.add_adapter(model, "sft", settings.qlora.lora, torch.Generator())
    for module in (model.tok_embeddings, model.output):  # as the stage does
        module.requires_grad_(True)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = memory.estimate(settings, "qlora").parts["gradients and optimizer"]
    assert found == pytest.approx(12 * count, rel=0.05)


def test_logits_and_working_space_by_hand():
    """fp32: logits, log-probabilities and their gradient; a comparison's row holds two answers and no logits."""
    settings = Settings().replace(model=UNTIED, sft__seq_len=32, sft__loop__batch_size=2, reward__seq_len=32,
                                  reward__loop__batch_size=2, sft__quant__kind="nf4", sft__lora__rank=4,
                                  ppo__generation_batch_size=1)  # fmt: skip
    parts, reward = (memory.estimate(settings, stage).parts for stage in ("sft", "reward"))
    assert parts["logits"] == 3 * 4 * 2 * 32 * 90 and reward["logits"] == 0
    assert parts["working space"] == 2 * 4 * 32 * 48 and reward["working space"] == 0
    assert reward["activations"] == memory.activation_bytes(UNTIED, LoRAConfig(rank=0), "fp32", 2 * 2 * 32)


def test_by_hand():
    """Two blocks of width 4: 4*4*2 + 4*2*2 + 3*4*8 weights each in the projections."""
    shape = ModelConfig(vocab_size=10, dim=4, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=8, tie_embeddings=False)
    assert memory.projection_count(shape) == 2 * (32 + 16 + 96)
    assert memory.parameter_count(shape) == 288 + 2 * 40 + 5 * 4
    assert memory.adapter_count(shape, LoRAConfig(rank=3)) == 2 * 3 * (8 + 6 + 6 + 8 + 12 + 12 + 12)
    assert memory.adapter_count(shape, LoRAConfig(rank=3, target_modules=("wq",))) == 2 * 3 * 8
    nf4 = QuantConfig(kind="nf4")
    assert memory.base_bytes(shape, LoRAConfig(), nf4, "bf16") == 288 * (0.5 + (1 + 4 / 256) / 64) + 2 * 100
    assert memory.base_bytes(shape, LoRAConfig(rank=0), QuantConfig(), "bf16") == 4 * 388  # P08: what trains is fp32
    assert memory.trained_bytes(100, "adamw") == 1200 and memory.trained_bytes(100, "paged_adamw_8bit") == 600


def test_llama2_7b_fits_the_cards_it_is_for():
    """The issue's targets: QLoRA in 9.7 GB at 1 x 512, PPO of four roles in 24 GB."""
    settings = presets.get("llama2_7b")
    assert (settings.sft.loop.batch_size, settings.sft.seq_len) == (1, 512)
    assert memory.estimate(settings, "sft").total + memory.CUDA_CONTEXT < 9.7 * GB
    assert memory.estimate(settings, "ppo").total + memory.CUDA_CONTEXT < 24 * GB
    four = settings.replace(ppo__layout="four_models")
    assert memory.estimate(four, "ppo").total > 150 * GB


def test_processes_share_what_can_be_shared():
    settings = presets.get("llama2_7b").replace(pretrain__loop__batch_size=12)
    parts, shared = (memory.estimate(settings, "pretrain", n).parts for n in (1, 8))
    assert shared["weights"] == parts["weights"] and shared["working space"] == parts["working space"]
    assert shared["gradients and optimizer"] == parts["gradients and optimizer"] / 8 > 0
    busiest = memory.estimate(settings.replace(pretrain__loop__batch_size=2), "pretrain").parts  # 2 of the 12 rows
    for name in ("activations", "logits"):
        assert shared[name] == busiest[name] > 0


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_process_never_has_less_than_a_row_or_a_batch_of_prompts(stage):
    settings = presets.get("llama2_7b")  # one row a batch of SFT; 16 prompts are answered at once
    alone, shared = (memory.estimate(settings, stage, n).parts for n in (1, 8))
    for name in {"sft": ("activations", "logits"), "reward": ("generation",), "ppo": ("generation",)}[stage]:
        assert shared[name] == alone[name] > 0


def test_the_answers_that_fit_the_scores_scale_are_counted():
    """Before a reward model learns, a batch of PPO's prompts is answered at once, as PPO will answer it."""
    settings = presets.get("llama2_7b").replace(ppo__seq_len=600, ppo__generation_batch_size=20)
    cache = 2 * 2 * 32 * 4096 * 20 * 600  # keys and values, two bytes, 32 layers of width 4096, 20 rows of 600 tokens
    logits = 4 * 4 * 32_000 * 20  # of one step, in fp32, four copies
    for changed in (settings, settings.replace(reward__seq_len=300, ppo__precision="fp32")):
        assert memory.estimate(changed, "reward").parts["generation"] == cache + logits
    whole = settings.replace(ppo__seq_len=0, ppo__generation_batch_size=3)  # all of the context
    assert memory.estimate(whole, "reward").parts["generation"] == 2 * 2 * 32 * 4096 * 3 * 4096 + 4 * 4 * 32_000 * 3
    few = memory.estimate(settings.replace(ppo__generation_batch_size=1), "reward").parts
    assert "generation" not in few and few["activations"] > 0


@pytest.mark.parametrize(("preset", "card"), [("gpu", 8), ("llama2_7b", 24)])
def test_every_stage_of_a_preset_fits_the_card_that_it_is_for(preset, card):
    settings = presets.get(preset)
    assert {*memory.needed_stages(settings)} == {"sft", "qlora", "reward", "dpo", "ppo"}
    for stage in ("pretrain",) * (preset == "gpu") + (*memory.needed_stages(settings),):
        assert memory.estimate(settings, stage).total + memory.CUDA_CONTEXT < card * GB, stage


def test_the_shape_is_that_of_the_presets_weights():
    """The gpu preset pretrains a vocabulary of its own; its other stages have SmolLM2's, three times as large."""
    settings = presets.get("gpu")
    small = memory.parameter_count(presets.MODEL_SHAPES["smollm2-135m"])
    assert memory.estimate(settings, "sft").parts["weights"] == 4 * small
    assert memory.estimate(settings, "pretrain").parts["weights"] == 4 * memory.parameter_count(settings.model)
    folders = memory.disk_bytes(settings)  # four trained in full, PPO's value model too; adapters; the hub's files
    assert 5 * 28 * small + 8 * small < folders < 5.3 * 28 * small + 8 * small


def test_less_memory_for_each_thing_that_saves_it():
    settings = presets.get("gpu")
    for stage, changes in (
        ("sft", {"model__gradient_checkpointing": True}), ("sft", {"sft__loop__batch_size": 2}),
        ("sft", {"sft__freeze_layers": 10}), ("sft", {"sft__lora__rank": 8}),
        ("sft", {"sft__optim__kind": "adamw_8bit"}), ("ppo", {"ppo__offload_inactive": True}),
        ("ppo", {"ppo__layout": "shared_base"}), ("ppo", {"ppo__micro_batch_size": 1}),
        ("ppo", {"ppo__freeze_layers": 10}), ("reward", {"reward__seq_len": 128}),
    ):  # fmt: skip
        less = memory.estimate(settings.replace(**changes), stage).total
        assert less < 0.97 * memory.estimate(settings, stage).total, changes


@pytest.mark.parametrize("stage", ["pretrain", "sft", "qlora", "reward", "dpo", "ppo"])
def test_the_settings_that_are_proposed_would_fit(stage, monkeypatch, capsys):
    settings = presets.get("gpu")
    needed = memory.estimate(settings, stage).total
    free = int(0.4 * needed + memory.CUDA_CONTEXT)
    monkeypatch.setattr(memory, "memory_available", lambda device: free)
    with pytest.raises(UserError, match=r"needs .* GB and cuda has .* GB free: these settings would fit: --") as said:
        memory.check_room(settings, stage, "cuda")
    proposed = str(said.value).partition("would fit: ")[2].rstrip(".")
    from instruct_llama.__main__ import parse

    args = ["sft", "--preset", "gpu", *proposed.split()]
    if stage == "qlora":  # on the command line the stage of notebook 05 is sft with adapters
        settings = settings.replace(sft=settings.qlora)
        args += ["--sft.lora.rank", "16", "--sft.quant.kind", "nf4"]
    assert memory.estimate(parse(args), memory.options_for(stage)).total < free
    memory.check_room(settings, memory.options_for(stage), "cpu")  # a CPU may swap: said, and gone on
    assert "these settings would fit" in capsys.readouterr().out


def test_a_gpu_that_is_too_small_is_refused_before_anything_is_loaded(pipeline, tmp_path, monkeypatch):
    from instruct_llama.stages import sft
    from instruct_llama.training import checkpoint

    monkeypatch.setattr(memory, "memory_available", lambda device: 10_000)
    monkeypatch.setattr(sft, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("loaded"))
    settings = pipeline.replace(out=str(tmp_path), init=f"{pipeline.out}/pretrain")
    with pytest.raises(UserError, match="no setting makes it fit; choose a smaller model"):
        run_stage("sft", settings)
    assert not list(tmp_path.glob("sft*"))


def test_the_context_of_cuda_and_the_number_of_processes_decide_too(monkeypatch):
    """To the byte: what CUDA takes before the first tensor is not there for the run."""
    settings = presets.get("gpu")
    needed = memory.estimate(settings, "sft").total + memory.CUDA_CONTEXT
    monkeypatch.setattr(memory, "memory_available", lambda device: needed)
    memory.check_room(settings, "sft", "cuda")
    monkeypatch.setattr(memory, "memory_available", lambda device: needed - 1)
    with pytest.raises(UserError, match="sft needs"):
        memory.check_room(settings, "sft", "cuda")
    memory.check_room(settings, "sft", "cuda", processes=2)  # divided, it fits


def test_small_runs_say_nothing(capsys):
    memory.check_room(presets.get("tiny"), "ppo", "cpu")
    assert capsys.readouterr().out == ""


def test_the_shape_is_the_checkpoints_not_the_presets(monkeypatch, capsys):
    monkeypatch.setattr(memory, "memory_available", lambda device: 10**15)
    memory.check_room(presets.get("laptop"), "sft", "cpu", presets.MODEL_SHAPES["smollm2-1.7b"])
    said = capsys.readouterr().out
    large = presets.get("laptop").replace(model=presets.MODEL_SHAPES["smollm2-1.7b"])
    assert f"sft needs about {memory.estimate(large, 'sft')}" in said
    recomputing = large.replace(model__gradient_checkpointing=True)  # which no checkpoint knows
    memory.check_room(recomputing, "sft", "cpu", presets.MODEL_SHAPES["smollm2-1.7b"])
    assert f"sft needs about {memory.estimate(recomputing, 'sft')}" in capsys.readouterr().out
    assert memory.estimate(recomputing, "sft").total < memory.estimate(large, "sft").total
    assert dataclasses.is_dataclass(memory.estimate(large, "sft"))
