"""The decoder against Hugging Face's, and against itself: packed, padded, cached, checkpointed, under autocast."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from instruct_llama.config import ModelConfig, RopeScaling, UserError
from instruct_llama.model import lora
from instruct_llama.model.llama import (
    KVCache,
    Llama,
    RMSNorm,
    ScalarLlama,
    apply_rope,
    attention_mask,
    attention_weights,
    rope_inv_freq,
)

SMALL = ModelConfig(vocab_size=61, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=64)
LLAMA3 = RopeScaling("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=16)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(seed: int = 1, kind: type[Llama] = Llama, **changes) -> Llama:
    """A model with weights large enough for differences to show."""
    model, generator = kind(dataclasses.replace(SMALL, **changes)), seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2, generator=generator)
    return model.eval()


def ids(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(0, SMALL.vocab_size, shape, generator=seeded(seed))


def hf_name(name: str) -> str:
    """Our name of a parameter in Hugging Face's words."""
    if name == "output.weight":
        return "lm_head.weight"
    words = {
        "tok_embeddings": "embed_tokens", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "feed_forward": "mlp", "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
        "w_gate": "gate_proj", "w_up": "up_proj", "w_down": "down_proj",
    }  # fmt: skip
    return "model." + ".".join(words.get(part, part) for part in name.split("."))


def hf_rope(config: ModelConfig) -> dict:
    scaling, kind = config.rope_scaling, {"none": "default"}.get(config.rope_scaling.kind, config.rope_scaling.kind)
    rope = {"rope_type": kind}
    if kind != "default":
        rope["factor"] = scaling.factor
    if kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        rope["original_max_position_embeddings"] = scaling.original_max_seq_len
    if int(transformers.__version__.split(".")[0]) >= 5:
        return {"rope_parameters": {**rope, "rope_theta": config.rope_theta}}
    return {"rope_theta": config.rope_theta, "rope_scaling": None if kind == "default" else rope}


def hugging_face(model: Llama) -> transformers.LlamaForCausalLM:
    """The reference implementation with a copy of the same weights."""
    c = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, max_position_embeddings=c.max_seq_len,
            rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings, **hf_rope(c),
        )
    )  # fmt: skip
    state = {hf_name(name): value for name, value in model.state_dict().items()}
    result = theirs.load_state_dict(state, strict=False)
    assert not result.unexpected_keys and not result.missing_keys
    return theirs.eval()


# ------------------------------------------------------------------------------------------------ transformers' LLaMA

MODEL_SHAPES = [
    pytest.param({"n_kv_heads": 1, "tie_embeddings": True}, id="multi-query, tied"),
    pytest.param({"n_kv_heads": 2, "tie_embeddings": False}, id="grouped, untied"),
    pytest.param({"n_kv_heads": 4, "tie_embeddings": False, "rope_theta": 500_000.0}, id="multi-head, theta"),
    pytest.param({"rope_scaling": RopeScaling("linear", factor=4.0), "norm_eps": 1e-3}, id="linear scaling, eps"),
    pytest.param({"rope_scaling": LLAMA3}, id="llama3 scaling"),
]


@pytest.mark.parametrize("changes", MODEL_SHAPES)
def test_logits_and_gradients_equal_transformers(changes):
    model, tokens = make(**changes), ids(3, 40)
    theirs = hugging_face(model)
    ours_logits, their_logits = model(tokens), theirs(tokens).logits
    assert ours_logits.std() > 0.5  # so that the tolerance means something
    assert (ours_logits - their_logits).abs().max() <= 2e-5

    for logits in (ours_logits, their_logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        grad, expected = parameter.grad, reference[hf_name(name)].grad
        assert (grad - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("changes", MODEL_SHAPES)
def test_step_by_step_with_the_cache_equals_transformers(changes):
    model, tokens = make(**changes), ids(2, 24)
    with torch.no_grad():
        expected = hugging_face(model)(tokens).logits
        cache = KVCache(model.config, 2, 24, "cpu", torch.float32)
        pieces = [model(tokens[:, :5], cache=cache)]  # the prompt at once,
        pieces += [model(tokens[:, t : t + 1], cache=cache) for t in range(5, 12)]  # then one by one,
        pieces += [model(tokens[:, 12:], cache=cache)]  # then many over what is there already
    assert cache.length == 24
    assert (torch.cat(pieces, dim=1) - expected).abs().max() <= 2e-5


def test_left_padding_equals_transformers():
    model, tokens = make(), ids(2, 12)
    real = torch.tensor([[False] * 5 + [True] * 7, [True] * 12])
    theirs = hugging_face(model)
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=real.long(), position_ids=positions).logits
        assert (model(tokens, segment_ids=real.long()) - expected)[real].abs().max() <= 2e-5


def test_rotary_frequencies_by_hand():
    config = ModelConfig(dim=8, n_heads=1, n_kv_heads=1, rope_theta=16.0)  # E = 8: 16^(-0/8), 16^(-2/8), ...
    assert torch.allclose(rope_inv_freq(config), torch.tensor([1.0, 0.5, 0.25, 0.125]))
    linear = dataclasses.replace(config, rope_scaling=RopeScaling("linear", factor=2.0))
    assert torch.allclose(rope_inv_freq(linear), torch.tensor([0.5, 0.25, 0.125, 0.0625]))


def test_rotation_keeps_lengths_and_sees_distances_only():
    x = torch.randn(1, 1, 2, 8, generator=seeded())  # a query and a key
    frequencies = rope_inv_freq(ModelConfig(dim=8, n_heads=1, n_kv_heads=1))

    def score(query_at: int, key_at: int) -> torch.Tensor:
        angles = torch.tensor([query_at, key_at])[:, None] * frequencies
        turned = apply_rope(x, (angles.cos()[None, None], angles.sin()[None, None]))
        assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
        return turned[0, 0, 0] @ turned[0, 0, 1]

    assert torch.allclose(score(7, 3), score(17, 13), atol=1e-5)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-3)


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.0)
    assert torch.allclose(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]) / math.sqrt(12.5))


# ---------------------------------------------------------------------------------------------- segments and padding


def test_visibility_by_hand():
    segment_ids = torch.tensor([[0, 1, 1, 2]])
    expected = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    assert torch.equal(attention_mask(segment_ids, segment_ids)[0], expected)
    assert torch.equal(attention_mask(segment_ids[:, 2:], segment_ids)[0], expected[2:])
    segment_ids = torch.tensor([[-1, -1, 1, 1, 2, 0]])  # a shared beginning, two ways to go on, padding
    expected = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0]]
    assert attention_mask(segment_ids, segment_ids)[0, :5].int().tolist() == expected


MODEL = make()


@hypothesis_settings(max_examples=20)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 6), st.integers(0, 6), st.integers(0, 999))
def test_packed_and_padded_rows_give_the_logits_of_each_text_alone(lengths, left, right, seed):
    texts = [ids(1, n, seed=seed + i) for i, n in enumerate(lengths)]
    pads = [ids(1, left, seed=seed + 100), ids(1, right, seed=seed + 101)]
    row = torch.cat([pads[0], *texts, pads[1]], dim=1)
    segment_ids = [0] * left + [i + 1 for i, n in enumerate(lengths) for _ in range(n)] + [0] * right
    with torch.no_grad():
        packed = MODEL(row, segment_ids=torch.tensor([segment_ids]))
        alone = torch.cat([MODEL(text) for text in texts], dim=1)
    assert torch.isfinite(packed).all()
    assert (packed[:, left : left + sum(lengths)] - alone).abs().max() <= 1e-5


@hypothesis_settings(max_examples=20)
@given(st.integers(1, 10), st.integers(0, 8), st.sampled_from(["left", "right"]), st.integers(0, 999))
def test_p37_padding_with_any_ids_on_either_side_moves_no_logit(length, padding, side, seed):
    text = ids(1, length, seed=seed)
    junk = [ids(1, padding, seed=seed + 1), ids(1, padding, seed=seed + 2)]  # what the pads hold must not matter
    real, start = (1, padding) if side == "left" else (1, 0)
    mask = [0] * padding + [real] * length if side == "left" else [real] * length + [0] * padding
    with torch.no_grad():
        alone = MODEL(text)
        for pads in junk:
            row = torch.cat([pads, text] if side == "left" else [text, pads], dim=1)
            padded = MODEL(row, segment_ids=torch.tensor([mask]))[:, start : start + length]
            assert (padded - alone).abs().max() <= 1e-5


def test_left_padding_within_the_cache_and_rows_that_leave():
    tokens, segment_ids = ids(3, 6), torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    more = ids(3, 2, seed=5)
    cache = KVCache(SMALL, 3, 8, "cpu", torch.float32)
    with torch.no_grad():
        MODEL(tokens, segment_ids=segment_ids, cache=cache)
        cache.select_rows(torch.tensor([2, 0]))
        first = MODEL(more[[2, 0], :1], segment_ids=torch.ones(2, 1, dtype=torch.int64), cache=cache)
        cache.select_rows(torch.tensor([False, True]))
        second = MODEL(more[[0], 1:], segment_ids=torch.ones(1, 1, dtype=torch.int64), cache=cache)
        assert cache.keys.shape[1] == 1
        for row, start, got in ((2, 1, first[0]), (0, 3, first[1])):
            alone = MODEL(torch.cat([tokens[row : row + 1, start:], more[row : row + 1, :1]], dim=1))
            assert (got[-1] - alone[0, -1]).abs().max() <= 1e-5
        alone = MODEL(torch.cat([tokens[:1, 3:], more[:1]], dim=1))
        assert (second[0, -1] - alone[0, -1]).abs().max() <= 1e-5


def test_attention_weights_are_what_the_model_mixes_with():
    tokens, segment_ids = ids(2, 7), torch.tensor([[0, 0, 1, 1, 1, 2, 2], [1] * 7])
    weights = attention_weights(MODEL, tokens, segment_ids=segment_ids)
    assert len(weights) == 2 and weights[0].shape == (2, 4, 7, 7)
    assert torch.allclose(weights[1].sum(-1), torch.ones(2, 4, 7), atol=1e-6)
    assert weights[0][0, :, 4, :2].max() == 0 and weights[0][0, :, 5, :5].max() == 0  # pads, the other text
    theirs = hugging_face(MODEL)
    theirs.set_attn_implementation("eager")
    expected = theirs(tokens[1:], output_attentions=True).attentions
    for ours, their in zip(attention_weights(MODEL, tokens[1:]), expected, strict=True):
        assert (ours - their).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------------ numerics and modes


def test_p10_logits_are_fp32_under_autocast():
    tokens = ids(2, 9)
    scalar = make(kind=ScalarLlama)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = MODEL.hidden(tokens)
        logits, scores = MODEL(tokens), scalar(tokens)
        assert logits.dtype == scores.dtype == torch.float32
        exact = hidden.float() @ MODEL.output.weight.T  # under autocast, so this one is rounded to bf16
    assert exact.dtype == torch.bfloat16
    exact = hidden.float() @ MODEL.output.weight.T
    assert (logits - exact).abs().max() <= 1e-5
    assert (logits - MODEL(tokens)).abs().max() > 1e-4  # the blocks did compute in bf16
    assert (logits.bfloat16().float() - logits).abs().max() > 1e-3  # and rounding logits would show


def test_p08_weights_are_fp32_and_stay_so_in_training():
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        model(ids(2, 5)).logsumexp(-1).sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())


def test_casting_a_model_to_bf16_leaves_the_rotary_frequencies_exact():
    model = make().to(torch.bfloat16)
    assert model.inv_freq.dtype == torch.float32 and torch.equal(model.inv_freq, MODEL.inv_freq)
    assert model(ids(1, 5)).dtype == torch.float32


def test_p24_dropout_is_off_in_eval_and_on_in_training():
    model, tokens = make(embed_dropout=0.3, attn_dropout=0.3, resid_dropout=0.3), ids(2, 9)
    plain = make()
    assert torch.equal(model(tokens), plain(tokens))
    for one in ("embed_dropout", "attn_dropout", "resid_dropout"):
        single = make(**{one: 0.3}).train()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            assert not torch.allclose(single(tokens), plain(tokens)), one


@pytest.mark.parametrize("segment_ids", [None, torch.tensor([[0, 0, 1, 1, 1, 2], [1, 1, 1, 1, 1, 1]])])
def test_gradient_checkpointing_gives_equal_gradients(segment_ids):
    grads = []
    for on in (False, True):
        model = make(gradient_checkpointing=on, resid_dropout=0.2, attn_dropout=0.2).train()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model(ids(2, 6), segment_ids=segment_ids).logsumexp(-1).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gradient_checkpointing_recomputes_with_the_adapter_of_its_forward_pass():
    grads = []
    for on in (False, True):
        model = make(gradient_checkpointing=on)
        for name in ("policy", "value"):
            lora.add_adapter(model, name, lora.LoRAConfig(rank=2), seeded(len(name)))
            for matrix in lora.adapter_parameters(model, name):
                torch.nn.init.normal_(matrix, generator=seeded(len(name)))
        with lora.adapter(model, "policy"):
            loss = model(ids(2, 6)).logsumexp(-1).sum()
        with lora.adapter(model, "value"):
            loss = loss + 2 * model(ids(2, 6)).logsumexp(-1).sum()
        loss.backward()  # outside: no adapter is active
        assert lora.active_adapter(model) is None
        grads.append([p.grad for name in ("policy", "value") for p in lora.adapter_parameters(model, name)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---------------------------------------------------------------------------------------------- building and refusing


def test_p12_building_a_model_changes_no_other_and_no_global_state():
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    first = Llama(SMALL, generator=seeded())
    before = {name: value.clone() for name, value in first.state_dict().items()}
    other = Llama(dataclasses.replace(SMALL, dim=16, n_heads=2, rope_theta=5.0), generator=seeded(9))
    again = Llama(SMALL, generator=seeded())
    assert other.tok_embeddings.weight.shape == (61, 16)
    assert all(torch.equal(before[name], value) for name, value in again.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and dtype == torch.get_default_dtype()
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.config.dim = 16


def test_weights_start_as_documented():
    model = Llama(dataclasses.replace(SMALL, dim=128, n_layers=8), generator=seeded())
    deviations = {name: float(weight.detach().std()) for name, weight in model.layers[3].named_parameters()}
    assert math.isclose(deviations["attention.wq.weight"], 0.02, rel_tol=0.05)
    assert math.isclose(deviations["attention.wo.weight"], 0.02 / 4, rel_tol=0.05)
    assert math.isclose(deviations["feed_forward.w_down.weight"], 0.02 / 4, rel_tol=0.05)
    assert model.output.weight is model.tok_embeddings.weight
    assert torch.equal(model.norm.weight, torch.ones(128))


def test_the_scalar_model_has_one_number_per_position_and_starts_at_zero():
    model = ScalarLlama(SMALL, generator=seeded())
    assert torch.equal(model(ids(2, 5)), torch.zeros(2, 5))
    assert [name for name in model.state_dict() if not name.startswith(("layers", "tok_embeddings", "norm"))] == [
        "value_head.weight"
    ]
    model = make(kind=ScalarLlama)
    tokens = ids(2, 5)
    expected = model.hidden(tokens) @ model.value_head.weight[0]
    assert torch.allclose(model(tokens), expected, atol=1e-6)


def test_too_long_rows_and_foreign_ids_are_refused_by_name():
    with pytest.raises(UserError, match="65 tokens .* model.max_seq_len 64"):
        MODEL(ids(1, 65))
    cache = KVCache(SMALL, 1, 80, "cpu", torch.float32)
    with torch.no_grad():
        MODEL(ids(1, 64), cache=cache)
        with pytest.raises(UserError, match="65 tokens"):
            MODEL(ids(1, 1), cache=cache)
    with pytest.raises(UserError, match="from 3 to 61, .* vocabulary has 61"):
        MODEL(torch.tensor([[3, 61]]))


def test_p36_one_row_of_one_token():
    assert MODEL(ids(1, 1)).shape == (1, 1, 61)
    tiny = ModelConfig(vocab_size=1, dim=2, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=1, max_seq_len=1)
    assert Llama(tiny)(torch.tensor([[0]])).shape == (1, 1, 1)
    two = ids(1, 2)  # the shortest row in which a token could look ahead
    assert torch.allclose(MODEL(two)[:, :1], MODEL(two[:, :1]), atol=1e-5)
