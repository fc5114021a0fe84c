"""Filters by hand, and sampling against the full forward pass: log-probs, padding, ends, batches that shrink."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_llama import SMALL, ids, make, seeded
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from instruct_llama.config import SamplingConfig, UserError
from instruct_llama.data.tokenizer import Tokenizer
from instruct_llama.evaluation.exact import EnumerableTokens
from instruct_llama.model.llama import Llama
from instruct_llama.model.sampling import compact_rows, eval_mode, filter_logits, generate, sample, sample_token, stream

MODEL = make()
EOS, PAD = 1, 0
PROMPTS = [[5], [7, 8, 9, 10], [11, 12], [13, 14, 15, 16, 17, 18, 19]]


def special(**changes) -> EnumerableTokens:
    return EnumerableTokens(**{"pad_id": PAD, "eos_id": EOS, "suppress_tokens": (), **changes})


def run(model: Llama = MODEL, prompts: list[list[int]] = PROMPTS, seed: int = 3, **options):
    tokens = special(**{key: options.pop(key) for key in ("pad_id", "suppress_tokens") if key in options})
    generator, eos_ids = options.pop("generator", seeded(seed)), options.pop("eos_ids", (EOS,))
    return sample(model, prompts, SamplingConfig(**{"max_new_tokens": 12, **options}), tokens, generator, eos_ids)


# ----------------------------------------------------------------------------------------------------------- filters


def probabilities(*values: float) -> torch.Tensor:
    return torch.tensor(values).log()


def test_p11_filters_by_hand():
    logits = probabilities(0.1, 0.4, 0.2, 0.3)
    assert torch.allclose(filter_logits(logits).exp(), torch.tensor([0.1, 0.4, 0.2, 0.3]))
    assert torch.allclose(filter_logits(logits, top_k=2).exp(), torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]))
    assert filter_logits(logits, top_k=2)[0] == -math.inf
    assert torch.allclose(filter_logits(logits, top_p=0.69).exp(), torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]))
    assert torch.allclose(filter_logits(logits, top_p=0.75).exp(), torch.tensor([0.0, 4 / 9, 2 / 9, 3 / 9]))
    squared = torch.tensor([0.01, 0.16, 0.04, 0.09]) / 0.3
    assert torch.allclose(filter_logits(logits, temperature=0.5).exp(), squared)


def test_p11_top_p_keeps_the_first_token_always_and_temperature_0_is_greedy():
    logits = probabilities(0.1, 0.4, 0.2, 0.3)
    for top_p in (1e-9, 0.0, 0.3):
        assert torch.equal(filter_logits(logits, top_p=top_p).exp(), torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert torch.equal(filter_logits(logits, temperature=0).exp(), torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert torch.equal(filter_logits(torch.zeros(5), temperature=0).exp().sum(), torch.tensor(1.0))  # a tie


def test_p11_top_p_keeps_no_more_than_the_mass_needs():
    """Of four equal shares two hold one half exactly: a third would be sampled from without being asked for."""
    assert filter_logits(torch.zeros(4), top_p=0.5).isfinite().tolist() == [True, True, False, False]
    assert filter_logits(torch.zeros(4), top_p=0.51).isfinite().sum() == 3


def test_p11_top_k_keeps_k_tokens_of_a_tie():
    assert (filter_logits(torch.zeros(9), top_k=3) > -math.inf).sum() == 3
    assert (filter_logits(torch.zeros(9), top_k=50) > -math.inf).sum() == 9


def test_suppressed_tokens_are_impossible_before_all_else():
    logits = probabilities(0.1, 0.4, 0.2, 0.3)
    assert torch.allclose(filter_logits(logits, suppress_tokens=(1,)).exp(), torch.tensor([1 / 6, 0.0, 2 / 6, 3 / 6]))
    assert torch.equal(filter_logits(logits, 0.0, suppress_tokens=(1, 3)).exp(), torch.tensor([0.0, 0.0, 1.0, 0.0]))
    assert torch.allclose(
        filter_logits(logits, top_k=1, suppress_tokens=(1,)).exp(), torch.tensor([0.0, 0.0, 0.0, 1.0])
    )


@hypothesis_settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.2, 3.0), st.integers(1, 30), st.floats(0.05, 1.0))
def test_p11_filters_equal_transformers(seed, temperature, top_k, top_p):
    logits = torch.randn(3, 20, generator=seeded(seed)) * 2
    theirs = TopKLogitsWarper(top_k)(None, TemperatureLogitsWarper(temperature)(None, logits))
    theirs = (theirs if top_p == 1 else TopPLogitsWarper(top_p)(None, theirs)).log_softmax(-1)
    ours = filter_logits(logits, temperature, top_k, top_p)
    assert torch.allclose(ours.exp().sum(-1), torch.ones(3), atol=1e-5)
    assert torch.allclose(ours.exp(), theirs.exp(), atol=1e-5)


def test_filters_are_pure_fp32_and_differentiable():
    logits = torch.randn(4, 20, generator=seeded()).bfloat16()
    before = logits.clone()
    filtered = filter_logits(logits, 0.7, 5, 0.9, suppress_tokens=(3,))
    assert torch.equal(logits, before) and filtered.dtype == torch.float32
    leaf = logits.float().requires_grad_()
    filter_logits(leaf, 0.7, 5, 0.9, suppress_tokens=(3,)).max(-1).values.sum().backward()
    assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0


def test_draws_follow_the_distribution_and_never_take_what_was_removed():
    logprobs = probabilities(0.1, 0.0, 0.2, 0.7, 0.0).expand(20_000, 5)
    counts = torch.bincount(sample_token(logprobs, seeded())[:, 0], minlength=5) / 20_000
    assert counts[1] == counts[4] == 0
    assert (counts - torch.tensor([0.1, 0.0, 0.2, 0.7, 0.0])).abs().max() < 0.015  # > 4 standard errors
    one_hot = torch.full((1000, 7), -math.inf).scatter(1, torch.arange(1000)[:, None] % 7, 0.0)
    assert torch.equal(sample_token(one_hot, seeded())[:, 0], torch.arange(1000) % 7)


# ---------------------------------------------------------------------------------------------------------- sampling


FILTERS = [
    pytest.param({}, id="plain"),
    pytest.param({"temperature": 0.6}, id="temperature"),
    pytest.param({"top_k": 4}, id="top-k"),
    pytest.param({"top_p": 0.7, "temperature": 1.5}, id="top-p"),
    pytest.param({"top_k": 9, "top_p": 0.9, "temperature": 0.8, "suppress_tokens": (PAD, 4, 5)}, id="all"),
]


@pytest.mark.parametrize("filters", FILTERS)
def test_p23_sampled_log_probs_equal_those_of_the_full_forward_pass(filters):
    made = run(**filters)
    for row, prompt in enumerate(PROMPTS):
        answer = made.tokens[row][made.mask[row]]
        with torch.no_grad():
            logits = MODEL(torch.tensor([[*prompt, *answer.tolist()]]))[0, len(prompt) - 1 : -1]  # (N, V)
        again = filter_logits(logits, **filters).gather(-1, answer[:, None])[:, 0]
        assert (made.logprobs[row][made.mask[row]] - again).abs().max() <= 1e-5
        assert not set(answer.tolist()) & set(filters.get("suppress_tokens", ()))


def test_what_sampled_holds():
    made = run(seed=1, max_new_tokens=40, prompts=PROMPTS * 4)
    assert made.has_eos.any() and not made.has_eos.all()
    assert made.tokens.dtype == torch.int64 and made.mask.dtype == made.has_eos.dtype == torch.bool
    for tokens, logprobs, mask, ended in zip(made.tokens, made.logprobs, made.mask, made.has_eos, strict=True):
        n = int(mask.sum())
        assert mask[:n].all() and not mask[n:].any() and n >= 1
        assert bool(ended) == (tokens[n - 1] == EOS) and (tokens[: n - 1] != EOS).all()
        assert (tokens[n:] == PAD).all() and (logprobs[n:] == 0).all() and (logprobs[:n] < 0).all()
        assert ended or n == 40


def test_p37_batch_companions_and_padding_change_no_greedy_answer():
    together = run(temperature=0.0)
    backwards = run(temperature=0.0, prompts=PROMPTS[::-1], pad_id=33)
    for row, prompt in enumerate(PROMPTS):
        alone = run(prompts=[prompt], temperature=0.0)
        n = int(alone.mask.sum())
        for other, place in ((together, row), (backwards, 3 - row)):
            assert torch.equal(other.mask[place].sum(), alone.mask.sum())
            assert torch.equal(other.tokens[place, :n], alone.tokens[0, :n])


def test_greedy_equals_transformers_generate():
    from test_llama import hugging_face

    theirs = hugging_face(MODEL)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
    made = run(temperature=0.0)
    for row, prompt in enumerate(PROMPTS):
        expected = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
        assert made.tokens[row][made.mask[row]].tolist() == expected[0, len(prompt) :].tolist()


def test_the_seed_decides_and_nothing_global_does():
    torch_state = torch.get_rng_state()
    first, again, other = run(seed=1), run(seed=1), run(seed=2)
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)
    assert torch.equal(torch_state, torch.get_rng_state())


def test_p31_finished_rows_leave_the_batch_and_the_cache_is_sized_to_the_need():
    model, seen, caches = make(), [], []
    hidden = model.hidden

    def counting(tokens, *, segment_ids=None, cache=None):
        seen.append(tokens.numel())
        caches.append(tuple(cache.keys.shape))
        return hidden(tokens, segment_ids=segment_ids, cache=cache)

    model.hidden = counting
    ends = tuple(range(1, 12))
    made = run(model, PROMPTS * 8, eos_ids=ends, max_new_tokens=9)
    is_end = torch.isin(made.tokens, torch.tensor(ends)) & made.mask
    lengths = torch.where(is_end.any(-1), is_end.long().argmax(-1) + 1, 9)  # (B,) up to the first end
    assert torch.equal(lengths, made.mask.sum(-1)) and len(set(lengths.tolist())) > 4
    assert seen[0] == 32 * 7  # the prompts
    assert seen[1:] == [int((lengths > step).sum()) for step in range(1, int(lengths.max()))]
    assert caches[0] == (2, 32, 2, 7 + 9 - 1, 8)
    assert [shape[1] for shape in caches[1:]] == seen[1:]
    assert made.tokens.shape[1] == int(lengths.max())


def test_rows_fill_gaps_with_few_moves():
    ended = torch.tensor([False, True, False, True, False, False])
    assert compact_rows(ended).tolist() == [0, 4, 2, 5]
    assert compact_rows(torch.tensor([True, True])).tolist() == []
    assert compact_rows(torch.tensor([True, False])).tolist() == [1]


def test_several_ends():
    made = run(eos_ids=(1, 2, 3), prompts=PROMPTS * 4, seed=5, max_new_tokens=40)
    ends = {int(row[mask][-1]) for row, mask in zip(made.tokens[made.has_eos], made.mask[made.has_eos], strict=True)}
    assert ends == {1, 2, 3}


def test_p24_sampling_switches_dropout_off_and_the_mode_comes_back():
    model = make(resid_dropout=0.5, attn_dropout=0.5, embed_dropout=0.5).train()
    assert torch.equal(run(model).tokens, run().tokens)
    assert model.training and all(module.training for module in model.modules())
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        assert not model.training
        raise ZeroDivisionError
    assert model.training


def test_what_was_sampled_can_be_trained_on():
    made = run()
    assert not made.tokens.is_inference() and not made.logprobs.requires_grad
    MODEL(made.tokens).logsumexp(-1).sum().backward()
    MODEL.zero_grad(set_to_none=True)


def test_p10_log_probs_are_fp32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        made = run()
    assert made.logprobs.dtype == torch.float32
    assert (made.logprobs.bfloat16().float() != made.logprobs).any()


def test_p36_one_prompt_one_token():
    made = run(prompts=[[5]], max_new_tokens=1)
    assert made.tokens.shape == (1, 1) and made.mask.all()
    longest = [list(ids(1, SMALL.max_seq_len - 1)[0])]
    assert run(prompts=longest, max_new_tokens=1).tokens.shape == (1, 1)  # fills the context to the last position


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="60 tokens and max_new_tokens 5 do not fit the context of 64"):
        run(prompts=[[5], [6] * 60], max_new_tokens=5)
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        run(max_new_tokens=0)
    for prompts in ([], [[]], [[5], []]):
        with pytest.raises(UserError, match="at least one token"):
            run(prompts=prompts)
    with pytest.raises(UserError, match=r"write \[prompt\]"):
        generate(MODEL, None, "Hello")


def test_stream_hands_out_what_sample_draws():
    how = SamplingConfig(max_new_tokens=30, top_k=20), special()
    made = sample(MODEL, [PROMPTS[1]], *how, seeded(8), (1, 2, 3))
    expected = made.tokens[0][made.mask[0]].tolist()
    assert made.has_eos.all()
    assert list(stream(MODEL, PROMPTS[1], *how, seeded(8), (1, 2, 3))) == expected[:-1]
    first = next(stream(MODEL, PROMPTS[1], *how, seeded(8), (1, 2, 3)))
    assert first == expected[0] and torch.is_grad_enabled()


# ---------------------------------------------------------------------------------------------------------- in text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["two plus three is five. what is two plus three? hello there!"] * 20, 300)


def test_generate_answers_in_order_and_depends_on_the_seed_alone(tokenizer):
    model = Llama(dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size), generator=seeded())
    prompts = ["hello", [{"role": "system", "content": "be kind"}, {"role": "user", "content": "two plus three?"}]] * 2
    greedy = generate(model, tokenizer, prompts, max_new_tokens=8, temperature=0.0)
    assert len(greedy) == 4 and greedy[:2] == greedy[2:] and all(isinstance(text, str) for text in greedy)
    assert generate(model, tokenizer, prompts, max_new_tokens=8, temperature=0.0, batch_size=1) == greedy
    drawn = generate(model, tokenizer, prompts, max_new_tokens=8, seed=1)
    assert generate(model, tokenizer, prompts, max_new_tokens=8, seed=1) == drawn
    assert generate(model, tokenizer, prompts, max_new_tokens=8, seed=2) != drawn
    same = generate(model, tokenizer, ["hello"] * 6, max_new_tokens=8, batch_size=3)
    assert same[:3] != same[3:]  # a second batch goes on with the numbers, it does not draw the first one's again
    assert generate(model, tokenizer, []) == []


def test_generate_never_draws_a_special_token_but_the_end(tokenizer):
    model = Llama(dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size), generator=seeded())
    seen = []
    with_spy = Tokenizer.decode
    try:
        Tokenizer.decode = lambda self, ids: (seen.extend(ids), with_spy(self, ids))[1]
        generate(model, tokenizer, ["hello"] * 40, max_new_tokens=30)
    finally:
        Tokenizer.decode = with_spy
    assert len(seen) > 800 and not (set(seen) & set(tokenizer.special_ids)) - {tokenizer.eos_id}
