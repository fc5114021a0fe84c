"""Adapters against PEFT, 4-bit layers against bitsandbytes, and what merging, moving and loading must not do."""

from __future__ import annotations

import contextlib
import copy
import math

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch.nn.functional as F
from test_llama import hf_name, hugging_face, ids, make, seeded
from torch import nn

from instruct_llama.config import LoRAConfig, ModelConfig, QuantConfig, SamplingConfig, UserError
from instruct_llama.evaluation.exact import EnumerableTokens
from instruct_llama.model import lora
from instruct_llama.model.llama import Llama, ScalarLlama
from instruct_llama.model.sampling import sample

CONFIG = LoRAConfig(rank=3, alpha=7.0)
ATTENTION = LoRAConfig(rank=2, alpha=4.0, target_modules=("wq", "wv"))
KINDS = [QuantConfig("nf4", 64, False), QuantConfig("nf4", 64, True), QuantConfig("fp4", 64, False)]
KINDS += [QuantConfig("fp4", 128, True)]
KIND_IDS = ["nf4", "nf4 double", "fp4", "fp4 double, blocks of 128"]


def randomise(model: nn.Module, name: str, seed: int = 4) -> None:
    """Both factors of an adapter filled, as after training."""
    generator = seeded(seed)
    with torch.no_grad():
        for matrix in lora.adapter_parameters(model, name):
            matrix.normal_(0.0, 0.2, generator=generator)


def adapted(config: LoRAConfig = CONFIG, quant: QuantConfig | None = None, **changes):
    """A model with a trained-looking, active adapter `a`."""
    model = make(**changes)
    if quant is not None:
        lora.quantize(model, quant)
    lora.add_adapter(model, "a", config, seeded())
    randomise(model, "a")
    lora.use_adapter(model, "a")
    return model


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Bit-exact copy of everything that is not an adapter, 4-bit data included."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if ".A." not in name and ".B." not in name}
    for path, layer in model.named_modules():
        if isinstance(layer, lora.QuantLinear):
            kept[path] = layer.qweight.clone()
    return kept


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def with_peft(model, config: LoRAConfig) -> peft.PeftModel:
    """PEFT's adapter with the same weights, over Hugging Face's LLaMA with the same weights."""
    bare = make(tie_embeddings=model.config.tie_embeddings)
    targets = [hf_name(f"layers.0.attention.{name}").rpartition(".")[2] for name in config.target_modules]
    theirs = peft.get_peft_model(
        hugging_face(bare),
        peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=targets, bias="none"),
    )
    with torch.no_grad():
        parameters = dict(theirs.named_parameters())
        for key, matrix in lora.adapter_state(model, "a").items():
            path, _, side = key.rpartition(".")
            parameters[f"base_model.model.{hf_name(path)}.lora_{side}.default.weight"].copy_(matrix)
    return theirs.eval()


# ------------------------------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("config", [CONFIG, ATTENTION], ids=["all projections", "queries and values"])
def test_adapter_equals_peft_in_logits_gradients_off_and_merged(config):
    model, tokens = adapted(config, tie_embeddings=False), ids(2, 20)
    theirs = with_peft(model, config)
    assert (model(tokens) - theirs(tokens).logits).abs().max() <= 2e-5
    assert (model(tokens) - make(tie_embeddings=False)(tokens)).abs().max() > 0.1

    for logits in (model(tokens), theirs(tokens).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    reference = dict(theirs.named_parameters())
    compared = 0
    for path, layer in lora.adapted_layers(model):
        for side in "AB":
            expected = reference[f"base_model.model.{hf_name(path)}.lora_{side}.default.weight"].grad
            assert (getattr(layer, side)["a"].grad - expected).norm() <= 1e-4 * expected.norm(), (path, side)
            compared += 1
    assert compared == 2 * 2 * len(config.target_modules)

    with torch.no_grad(), theirs.disable_adapter(), lora.adapter(model, None):
        assert (model(tokens) - theirs(tokens).logits).abs().max() <= 2e-5
    with torch.no_grad():
        assert (lora.merge(model, "a")(tokens) - theirs.merge_and_unload()(tokens).logits).abs().max() <= 2e-5


def test_lora_delta_by_hand():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    assert torch.equal(lora.lora_delta(a, b, alpha=2.0, rank=1), torch.tensor([[6.0, 12.0], [8.0, 16.0]]))


def test_p24_adapter_dropout_acts_in_training_only():
    model, plain = adapted(LoRAConfig(rank=3, alpha=7.0, dropout=0.5)), adapted()  # added to models in eval mode
    assert torch.equal(model(ids(1, 8)), plain(ids(1, 8)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.allclose(model.train()(ids(1, 8)), plain(ids(1, 8)))


# ------------------------------------------------------------------------------------------------------ what trains


@pytest.mark.parametrize("quant", [None, QuantConfig("nf4")], ids=["dense", "4-bit"])
def test_p14_a_fresh_adapter_changes_no_logit_and_alone_gets_gradients(quant):
    model, tokens = make(), ids(2, 9)
    if quant is not None:
        lora.quantize(model, quant)
    before = model(tokens)
    lora.add_adapter(model, "a", CONFIG, seeded())
    lora.use_adapter(model, "a")
    assert torch.equal(model(tokens), before)
    model(tokens).logsumexp(-1).sum().backward()
    trained = {id(p) for p in lora.adapter_parameters(model, "a")}
    assert len(trained) == 2 * 2 * 7
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (id(p) in trained), name


def test_p08_adapters_are_fp32_over_a_bf16_base():
    model = make().to(torch.bfloat16)
    lora.add_adapter(model, "a", CONFIG, seeded())
    lora.use_adapter(model, "a")
    model(ids(1, 5)).logsumexp(-1).sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in lora.adapter_parameters(model, "a"))


def test_several_adapters_share_one_base():
    model, tokens = adapted(), ids(1, 9)
    lora.add_adapter(model, "b", ATTENTION, seeded(7))
    randomise(model, "b", seed=8)
    assert lora.adapter_names(model) == ["a", "b"] and lora.active_adapter(model) == "a"
    first, bare = adapted()(tokens), make()(tokens)
    assert torch.equal(model(tokens), first)
    with lora.adapter(model, "b"):
        second = model(tokens)
        with lora.adapter(model, None):
            assert torch.equal(model(tokens), bare)
        assert torch.equal(model(tokens), second) and not torch.allclose(second, first)
    assert torch.equal(model(tokens), first)
    with pytest.raises(KeyError), lora.adapter(model, "b"):
        raise KeyError
    assert lora.active_adapter(model) == "a"
    second.sum().backward()
    assert all(p.grad is None for p in lora.adapter_parameters(model, "a"))
    assert all(p.grad is not None for p in lora.adapter_parameters(model, "b"))


# ----------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("quant", [None, *KINDS], ids=["dense", *KIND_IDS])
def test_p15_merge_equals_the_adapter_and_leaves_the_model_bit_identical(quant):
    model, tokens = adapted(ATTENTION, quant), ids(2, 12)
    before, logits = base_weights(model), model(tokens)
    merged = lora.merge(model, "a")
    assert same(before, base_weights(model)) and torch.equal(model(tokens), logits)
    assert type(merged) is type(model) and not lora.adapted_layers(merged)
    assert merged.state_dict().keys() == make().state_dict().keys()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in merged.parameters())
    assert (merged(tokens) - logits).abs().max() <= 2e-5
    with torch.no_grad():
        for p in merged.parameters():
            p.add_(1.0)  # what happens to the merged model does not reach the other
    assert same(before, base_weights(model)) and torch.equal(model(tokens), logits)


@pytest.mark.parametrize("quant", [None, QuantConfig("nf4")], ids=["dense", "4-bit"])
def test_p15_rounds_of_training_and_evaluation_leave_the_base_bit_identical(quant):
    model, tokens = adapted(CONFIG, quant), ids(2, 12)
    before, logits = base_weights(model), model(tokens)
    optimizer = torch.optim.SGD(lora.adapter_parameters(model, "a"), lr=1e-2)
    for _ in range(3):
        model.train()(tokens).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()(tokens)
    assert same(before, base_weights(model)) and not torch.allclose(model(tokens), logits)


def test_p16_merging_into_the_original_weights_is_another_model():
    original, tokens = make(), ids(4, 30)
    model = adapted(CONFIG, QuantConfig("nf4"))
    with torch.no_grad():
        trained = model(tokens)

        def error(merged: nn.Module) -> float:
            return float((merged(tokens) - trained).norm() / trained.norm())

        default = lora.merge(model, "a")
        other = lora.merge(model, "a", into="original", original=original)
        half = copy.deepcopy(default).bfloat16().float()  # saved in 16 bits
        assert error(default) < 1e-5 < error(half) < 0.02 < error(other) < 0.5
    delta = lora.lora_delta(model.layers[0].attention.wq.A["a"], model.layers[0].attention.wq.B["a"], 7.0, 3)
    assert torch.allclose(other.layers[0].attention.wq.weight, original.layers[0].attention.wq.weight + delta)
    for wrong in ({"into": "original"}, {"original": original}, {"into": "original", "original": model}):
        with pytest.raises(UserError, match="original"):
            lora.merge(model, "a", **wrong)


def test_merge_gives_the_dtype_that_was_asked_for():
    """All of it: norms and embeddings in another width than the projections would be written as a mixture."""
    model = adapted()
    merged = lora.merge(model, "a", dtype=torch.bfloat16)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_merge_keeps_the_scalar_head():
    model = adapted(kind=ScalarLlama)
    merged = lora.merge(model, "a")
    assert isinstance(merged, ScalarLlama)
    assert (merged(ids(2, 6)) - model(ids(2, 6))).abs().max() <= 2e-5


# ------------------------------------------------------------------------------------------------------- 4-bit layers


def normal_linear(outputs: int, inputs: int) -> nn.Linear:
    dense = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)
    nn.init.normal_(dense.weight, 0.0, 0.1, generator=seeded())
    return dense


@pytest.mark.parametrize("config", KINDS, ids=KIND_IDS)
def test_quant_linear_equals_bitsandbytes_forward_and_backward(config):
    dense = normal_linear(48, 128)
    layer = lora.QuantLinear(dense, config)
    options = {"blocksize": config.block_size, "compress_statistics": config.double_quant, "quant_type": config.kind}
    packed, state = bnb.functional.quantize_4bit(dense.weight.detach(), **options)
    weight = bnb.functional.dequantize_4bit(packed, state)  # (48, 128)
    assert torch.equal(layer.qweight, packed) and torch.equal(layer.dequantize(), weight)

    theirs = bnb.nn.Linear4bit(
        128,
        48,
        bias=False,
        quant_type=config.kind,
        compute_dtype=torch.float32,
        compress_statistics=config.double_quant,
    )
    theirs.weight = bnb.nn.Params4bit(dense.weight.detach().clone(), requires_grad=False, **options)
    theirs.to("cpu")  # which is when it quantises
    inputs = [torch.randn(2, 5, 128, generator=seeded(3)).requires_grad_() for _ in range(3)]
    outputs = [layer(inputs[0]), theirs(inputs[1]), inputs[2] @ weight.T]
    for output in outputs:
        output.pow(2).sum().backward()
    for x, output in zip(inputs[1:], outputs[1:], strict=True):
        assert torch.allclose(outputs[0], output, atol=1e-5)
        assert (inputs[0].grad - x.grad).norm() <= 1e-5 * x.grad.norm()
    assert not list(layer.parameters()) and layer.qweight.numel() == 48 * 128 / 2


@pytest.mark.parametrize("config", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("shape", [(48, 32), (4, 96), (24, 10), (64, 352)], ids=str)
def test_a_weight_is_its_blocks_scale_times_the_nearest_of_sixteen_numbers(config, shape):
    dense = normal_linear(*shape)  # blocks that end inside a row: bitsandbytes alone gets these wrong on the CPU
    flat = dense.weight.detach().flatten()
    blocks = F.pad(flat, (0, -flat.numel() % config.block_size)).view(-1, config.block_size)
    scales = blocks.abs().amax(-1, keepdim=True)
    code = bnb.functional.get_4bit_type(config.kind, device="cpu")  # (16,)
    nearest = code[(blocks[..., None] / scales[..., None] - code).abs().argmin(-1)] * scales
    expected = nearest.flatten()[: flat.numel()].view(shape)
    got = lora.QuantLinear(dense, config).dequantize()
    assert got.shape == shape and got.dtype == torch.float32
    assert (got - expected).abs().max() <= (2e-3 if config.double_quant else 1e-6)  # double: scales in 8 bits
    assert 0.05 < (got - dense.weight).norm() / dense.weight.norm() < 0.15


def test_quantise_replaces_the_projections_and_nothing_else():
    model = make()
    embeddings, wq = model.tok_embeddings.weight.clone(), model.layers[0].attention.wq.weight.clone()
    lora.quantize(model, QuantConfig("none"))
    assert type(model.layers[0].attention.wq) is nn.Linear
    lora.quantize(model, QuantConfig("nf4"))
    assert sum(isinstance(layer, lora.QuantLinear) for layer in model.modules()) == 2 * 7
    assert torch.equal(model.tok_embeddings.weight, embeddings) and type(model.output) is nn.Linear
    assert (model.layers[0].attention.wq.dequantize() - wq).abs().max() < 0.1
    with pytest.raises(UserError, match="layers.0.attention.wq is a QuantLinear"):
        lora.quantize(model, QuantConfig("nf4"))


def test_quant_linear_under_autocast():
    model, tokens = adapted(CONFIG, QuantConfig("nf4")), ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens).logsumexp(-1).mean()
    loss.backward()
    with torch.no_grad():
        assert torch.allclose(loss, model(tokens).logsumexp(-1).mean(), atol=0.05)
    assert all(p.grad.dtype == torch.float32 for p in lora.adapter_parameters(model, "a"))


def test_p17_a_4_bit_layer_refuses_to_move_and_ignores_casts():
    model, tokens = adapted(CONFIG, QuantConfig("nf4", double_quant=True)), ids(2, 9)
    before, packed = model(tokens), model.layers[0].attention.wq.base.qweight.clone()
    scales = copy.deepcopy(model.layers[0].attention.wq.base.quant_state)
    with pytest.raises(RuntimeError, match="cannot move from cpu to meta.*quantise it there"):
        model.layers[0].attention.wq.to("meta")
    with pytest.raises(RuntimeError, match="cannot move"):
        model.layers.to("meta")
    model = adapted(CONFIG, QuantConfig("nf4", double_quant=True)).to("cpu").bfloat16().half().float().double()
    layer = model.layers[0].attention.wq.base
    assert (
        torch.equal(layer.qweight, packed) and layer.quant_state == scales and layer.quant_state.dtype == torch.float32
    )
    assert layer.quant_state.state2.absmax.dtype == torch.float32 and layer.dequantize().dtype == torch.float32
    assert torch.equal(adapted(CONFIG, QuantConfig("nf4", double_quant=True)).to("cpu")(tokens), before)


def test_p17_a_state_dict_holds_no_4_bit_data():
    model = adapted(CONFIG, QuantConfig("nf4"))
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert not [key for key in model.state_dict() if ".base" in key]


# ------------------------------------------------------------------------------------------------ saving and refusing


def test_an_adapter_saved_and_loaded_under_another_name_is_the_same():
    model, tokens = adapted(CONFIG, QuantConfig("nf4")), ids(2, 9)
    state = {key: value.clone() for key, value in lora.adapter_state(model, "a").items()}
    assert list(state)[:2] == ["layers.0.attention.wq.A", "layers.0.attention.wq.B"] and len(state) == 28
    other = make()
    lora.quantize(other, QuantConfig("nf4"))  # the base is quantised again, to the same bits
    lora.add_adapter(other, "policy", CONFIG, seeded(5))
    lora.load_adapter(other, "policy", state)
    lora.use_adapter(other, "policy")
    assert torch.equal(other(tokens), model(tokens))


def test_p18_loading_names_every_missing_unexpected_and_misshapen_key_and_changes_nothing():
    model = adapted()
    before = {key: value.clone() for key, value in lora.adapter_state(model, "a").items()}
    state = {key: value + 1 for key, value in before.items()}
    del state["layers.0.attention.wq.A"], state["layers.1.feed_forward.w_up.B"]
    state["layers.7.attention.wq.A"] = torch.zeros(1)
    state["layers.0.attention.wk.B"] = torch.zeros(16, 5)
    with pytest.raises(UserError) as error:
        lora.load_adapter(model, "a", state)
    for words in (
        "layers.0.attention.wq.A is missing", "layers.1.feed_forward.w_up.B is missing",
        "layers.7.attention.wq.A is unexpected", "layers.0.attention.wk.B is (16, 5) and should be (16, 3)",
    ):  # fmt: skip
        assert words in str(error.value)
    assert same(before, lora.adapter_state(model, "a"))


def test_wrong_names_ranks_and_orders_are_refused():
    model = adapted()
    with pytest.raises(UserError, match="no adapter 'x'; it has a"):
        lora.use_adapter(model, "x")
    with pytest.raises(UserError, match="no adapter 'x'; it has none"):
        lora.merge(make(), "x")
    with pytest.raises(UserError, match="already"):
        lora.add_adapter(model, "a", CONFIG, seeded())
    with pytest.raises(UserError, match="rank 0"):
        lora.add_adapter(model, "b", LoRAConfig(rank=0), seeded())
    with pytest.raises(UserError, match="LoRALinear"):
        lora.quantize(model, QuantConfig("nf4"))


def test_adapters_come_from_their_generator_alone():
    torch_state = torch.get_rng_state()
    states = []
    for seed in (1, 1, 2):
        model = make()
        lora.add_adapter(model, "a", CONFIG, seeded(seed))
        states.append(lora.adapter_state(model, "a"))
    assert same(states[0], states[1]) and not same(states[0], states[2])
    assert torch.equal(torch_state, torch.get_rng_state())
    bound = 1 / math.sqrt(32)  # kaiming_uniform_ with a = sqrt(5): 1 / sqrt(inputs)
    first = states[0]["layers.0.attention.wq.A"]
    assert 0.8 * bound < first.abs().max() <= bound and not states[0]["layers.0.attention.wq.B"].any()


def test_sampling_makes_4_bit_weights_dense_once_and_changes_no_token(monkeypatch):
    model = Llama(ModelConfig(vocab_size=60, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=48, max_seq_len=64))
    lora.quantize(model, QuantConfig(kind="nf4"))
    lora.add_adapter(model, "a", LoRAConfig(rank=2), torch.Generator().manual_seed(0))
    layers = [layer.base for _, layer in lora.adapted_layers(model)]
    counted = []
    for layer in layers:
        layer.dequantize_4bit = lambda *args, undo=layer.dequantize_4bit: counted.append(1) or undo(*args)
    options = SamplingConfig(max_new_tokens=12, temperature=0.0), EnumerableTokens(0, 59, ())
    drawn = sample(model, [[1, 2, 3]], *options)
    assert len(counted) == len(layers) and all(layer.cached_dense is None for layer in layers)
    monkeypatch.setattr("instruct_llama.model.sampling.cache_dense_weights", lambda model: contextlib.nullcontext())
    assert torch.equal(sample(model, [[1, 2, 3]], *options).tokens, drawn.tokens)
    assert len(counted) > 10 * len(layers)
    with pytest.raises(RuntimeError), lora.cache_dense_weights(model):
        raise RuntimeError
    assert all(layer.cached_dense is None for layer in layers)  # also after an error


def test_on_a_gpu_sampling_goes_on_in_4_bits():
    """Dense copies of 7 B weights would take the memory that 4 bits save: only the CPU keeps them while it samples."""
    model = make()
    lora.quantize(model, QuantConfig("nf4"))
    here, there = (layer for _, layer in lora.projections(model)[:2])
    there.qweight = there.qweight.to("meta")  # as if it were on another device
    with lora.cache_dense_weights(model):
        assert here.cached_dense is not None and there.cached_dense is None
    assert here.cached_dense is None
