"""The enumerable language: a world so small that the optimal policy is known in closed form.

A response is a few letters, so all responses can be enumerated. This gives the exact values that PPO only estimates:
expected score, KL to the reference, and their gradients. For a reference `ref`, a score r(y) and a coefficient beta,

    J(pi) = E_pi[r(y)] - beta KL(pi || ref)   is largest at   pi*(y) = ref(y) exp(r(y) / beta) / Z,
    J* = beta log Z,   Z = sum_y ref(y) exp(r(y) / beta)

(Ziegler et al., arXiv:1909.08593, section 2). A correct PPO raises J from J(ref) to J*. With a bug in one token offset,
sign or mask it does not reach J*, though its curves look healthy.

Two languages differ in where a response ends. In `fixed()` every response has 4 letters and then the end token. In
`variable()` the end token may come at any position, and a response without one within 4 tokens gets the score
`missing_eos_score` instead of the one in the reward table.

Sizes: A responses, N tokens of the longest one, V tokens in the vocabulary, R prefixes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import ModelConfig

if TYPE_CHECKING:
    from ..model.llama import KVCache

PAD, BOS, EOS = 0, 1, 2  # ids; the prompt is BOS alone, the letters start at 3
FIRST_LETTER = 3
SPECIAL_PIECES = ("<pad>", "<s>", "</s>")
DEPTH = 4  # letters of the longest response


@dataclass(frozen=True, eq=False)
class Language:
    """All responses of a small language, their scores and a reference policy. It is also PPO's tokenizer."""

    name: str
    vocab_size: int  # V, the special tokens included
    max_new_tokens: int  # N
    beta: float  # weight of the KL in the objective
    missing_eos_score: float  # score of a response without an end token
    prefixes: tuple[tuple[int, ...], ...]  # R prefixes of responses: the empty one, the unended ones, the ended ones
    n_unended: int  # number of prefixes without an end token
    row_of: Tensor  # (n_codes + 1,) int64: index of the prefix with a code, see `code_of`; 0 if none
    legal: Tensor  # (N, V) bool: which tokens are allowed at a position
    responses: Tensor  # (A, N) int64: every response, PAD after its end
    response_mask: Tensor  # (A, N) bool: True up to and including the end token
    has_eos: Tensor  # (A,) bool: whether it has an end token
    scores: Tensor  # (A,) float32: r(y), or missing_eos_score without an end token
    reference_logits: Tensor  # (n_unended, V) float32: of the token after each unended prefix
    reward_table: Tensor  # (R,) float32: the reward model's score of each prefix, ended or not

    pad_id, bos_id, eos_id = PAD, BOS, EOS
    suppress_tokens = (PAD, BOS)

    @property
    def prompt(self) -> list[int]:
        """The only prompt."""
        return [BOS]

    @property
    def n_codes(self) -> int:
        """The number of possible codes: every prefix has a code below this."""
        return self.vocab_size**self.max_new_tokens

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each id as text: a, b, c … and </s>."""
        return [SPECIAL_PIECES[i] if i < FIRST_LETTER else chr(ord("a") + i - FIRST_LETTER) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The letters, without special tokens."""
        return "".join(self.pieces([i for i in ids if i >= FIRST_LETTER]))


def fixed(seed: int = 1) -> Language:
    """6 letters, responses of exactly 4 and the end token: 1,296 responses, none of them truncated."""
    return _build("fixed", n_letters=6, early_end=False, beta=0.5, missing_eos_score=0.0, seed=seed)


def variable(seed: int = 45) -> Language:
    """5 letters and the end token, responses of at most 4 tokens: 156 that end and 625 that are truncated.

    The default seed is a language in which an untrained end token, or a KL that includes padding, lowers J a lot.
    """
    return _build("variable", n_letters=5, early_end=True, beta=0.5, missing_eos_score=-2.0, seed=seed)


def code_of(prefix: Sequence[int], vocab_size: int) -> int:
    """A prefix as a number whose digits are its token ids. Codes are unique, since no prefix begins with PAD = 0."""
    code = 0
    for token in prefix:
        code = code * vocab_size + token
    return code


def _build(name: str, n_letters: int, early_end: bool, beta: float, missing_eos_score: float, seed: int) -> Language:
    vocab_size, n_tokens = FIRST_LETTER + n_letters, DEPTH if early_end else DEPTH + 1
    letters = range(FIRST_LETTER, vocab_size)
    words = [word for n in range(DEPTH + 1) for word in itertools.product(letters, repeat=n)]
    ended = [(*word, EOS) for word in words if (len(word) < DEPTH if early_end else len(word) == DEPTH)]
    cut = [word for word in words if len(word) == DEPTH] if early_end else []
    prefixes = (*words, *ended)
    row_of = torch.zeros(vocab_size**n_tokens + 1, dtype=torch.long)
    row_of[[code_of(prefix, vocab_size) for prefix in prefixes]] = torch.arange(len(prefixes))

    legal = torch.zeros(n_tokens, vocab_size, dtype=torch.bool)
    legal[:DEPTH, FIRST_LETTER:] = True
    legal[:DEPTH, EOS] = early_end
    legal[DEPTH:, EOS] = True

    generator = torch.Generator().manual_seed(seed)
    reference_logits = torch.randn(len(words), vocab_size, generator=generator)
    reference_logits[:, EOS] -= 1.0  # the reference rarely stops: PPO has to learn it
    reward_table = _rewards(prefixes, vocab_size, generator)
    is_ended = torch.tensor([answer[-1] == EOS for answer in ended + cut])
    raw = reward_table[row_of[[code_of(answer, vocab_size) for answer in ended + cut]]]  # (A,)
    answers = torch.tensor([[*answer, *[PAD] * (n_tokens - len(answer))] for answer in ended + cut])  # (A, N)
    return Language(
        name=name, vocab_size=vocab_size, max_new_tokens=n_tokens, beta=beta, missing_eos_score=missing_eos_score,
        prefixes=prefixes, n_unended=len(words), row_of=row_of, legal=legal, responses=answers,
        response_mask=answers != PAD,
        has_eos=is_ended, scores=torch.where(is_ended, raw, missing_eos_score), reference_logits=reference_logits,
        reward_table=reward_table,
    )  # fmt: skip


def _rewards(prefixes: tuple[tuple[int, ...], ...], vocab_size: int, generator: torch.Generator) -> Tensor:
    """The score of each prefix: (R,).

    It is the sum of a term per letter and position (largest for the first), a term per pair of neighbours, 0.8 if there
    is any letter, -0.4 per letter, and noise per prefix.
    """
    by_place = torch.randn(DEPTH, vocab_size, generator=generator) * torch.tensor([[1.0], [0.5], [0.5], [0.5]])
    by_neighbour = 0.5 * torch.randn(vocab_size, vocab_size, generator=generator)
    whims = 0.5 * torch.randn(len(prefixes), generator=generator)
    place_worth, pair_worth, rewards = by_place.tolist(), by_neighbour.tolist(), []
    for prefix, whim in zip(prefixes, whims.tolist(), strict=True):
        letters = [token for token in prefix if token != EOS]
        reward = whim + (0.8 if letters else 0.0)
        for place, (left, token) in enumerate(zip([BOS, *letters], letters, strict=False)):
            reward += place_worth[place][token] + pair_worth[left][token] - 0.4
        rewards.append(reward)
    return torch.tensor(rewards)


class PrefixTable(nn.Module):
    """A tabular policy: a row of learnable logits per prefix; with `scalar`, one number (a value or a score).

    It has the interface of `Llama`. The prefix is what follows the last BOS. At the end token and the padding after it,
    a policy repeats the logits that the end token was sampled from: finite and trainable, so that a loss or KL which
    wrongly counts these positions changes.
    """

    def __init__(self, language: Language, table: Tensor | None = None, *, scalar: bool = False) -> None:
        super().__init__()
        n_rows = len(language.prefixes) if scalar else language.n_unended
        width = 1 if scalar else language.vocab_size
        self.config = ModelConfig(  # shape of the KV cache, which holds a row's past tokens
            language.vocab_size, dim=2, n_layers=1, n_heads=1, n_kv_heads=1, max_seq_len=1 + language.max_new_tokens
        )
        self.tok_embeddings = nn.Embedding(n_rows, width)  # (R, V) or (R, 1): the table, named as in Llama
        with torch.no_grad():
            self.tok_embeddings.weight.copy_(torch.zeros(n_rows, width) if table is None else table.view(-1, width))
        self.scalar, self.vocab_size, self.n_codes = scalar, language.vocab_size, language.n_codes
        row_of = language.row_of.clone()  # (n_codes + 1,)
        if not scalar:
            for prefix in language.prefixes[n_rows:]:  # the ended ones
                row_of[code_of(prefix, language.vocab_size)] = row_of[code_of(prefix[:-1], language.vocab_size)]
        depth = torch.tensor([len(prefix) for prefix in language.prefixes[:n_rows]])  # (R,)
        legal = language.legal[depth.clamp(max=language.max_new_tokens - 1)]  # (R, V)
        self.register_buffer("row_of", row_of, persistent=False)
        self.register_buffer("legal", legal, persistent=False)

    def hidden(self, tokens: Tensor, *, segment_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> the table's row at each position: logits (B, T, V) float32, or (B, T, 1) with `scalar`."""
        n_new = tokens.shape[1]
        if cache is not None:
            keys = tokens[:, None, :, None].float().expand(-1, 1, -1, 2)  # (B, 1, T, 2)
            tokens = cache.append(0, keys, keys)[0][:, 0, :, 0].long()  # (B, S): past and new tokens
            cache.length += n_new
        code, rows = torch.zeros_like(tokens[:, 0]), []  # (B,)
        for t in range(tokens.shape[1]):
            token = tokens[:, t]
            code = torch.where(token == PAD, code, (code * self.vocab_size + token).clamp(max=self.n_codes))
            code = code.masked_fill(token == BOS, 0)
            rows.append(self.row_of[code])
        row = torch.stack(rows[-n_new:], dim=1)  # (B, T)
        found = self.tok_embeddings(row)
        return found if self.scalar else found.masked_fill(~self.legal[row], -torch.inf)

    def head(self, hidden: Tensor) -> Tensor:
        """The identity: `hidden` already returns the output."""
        return hidden

    def forward(self, tokens: Tensor, *, segment_ids: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V) float32, or (B, T) with `scalar`."""
        found = self.hidden(tokens, segment_ids=segment_ids, cache=cache)
        return found.squeeze(-1) if self.scalar else found


# ------------------------------------------------------------------------------------------------ exact, by enumeration


@dataclass(frozen=True)
class Exact:
    """Exact expectations under a policy, summed over all responses: differentiable scalars."""

    objective: Tensor  # J = score - beta KL
    score: Tensor  # E[r]
    kl: Tensor  # KL(policy || reference), nats per response
    ended: Tensor  # probability that a response has an end token


def reference(language: Language) -> PrefixTable:
    """The reference policy as a model (a new copy on each call)."""
    return PrefixTable(language, language.reference_logits)


def reward_model(language: Language) -> PrefixTable:
    """The reward table as a model: the score of the prefix at every position (B, T)."""
    return PrefixTable(language, language.reward_table, scalar=True)


def response_logprobs(language: Language, model: nn.Module) -> Tensor:
    """The log-probability of every token of every response under a model: (A, N), 0 after the end."""
    starts = torch.full_like(language.responses[:, :1], BOS)
    logits = model(torch.cat([starts, language.responses[:, :-1]], dim=1))  # (A, N, V)
    logprobs = logits.masked_fill(~language.legal, -torch.inf).log_softmax(dim=-1)
    chosen = logprobs.gather(-1, language.responses.unsqueeze(-1)).squeeze(-1)
    return torch.where(language.response_mask, chosen, 0.0)  # (A, N)


@torch.no_grad()
def _reference_logprobs(language: Language, ref: nn.Module | None) -> Tensor:
    return response_logprobs(language, ref or reference(language)).sum(dim=1)  # (A,)


def evaluate(language: Language, policy: nn.Module, ref: nn.Module | None = None) -> Exact:
    """The exact objective, score and KL of a policy against a reference (default: the language's)."""
    logprobs = response_logprobs(language, policy).sum(dim=1)  # (A,)
    probability = logprobs.exp()
    score = (probability * language.scores).sum()
    kl = (probability * (logprobs - _reference_logprobs(language, ref))).sum()
    return Exact(score - language.beta * kl, score, kl, (probability * language.has_eos).sum())


def optimal_logprobs(language: Language, ref: nn.Module | None = None) -> Tensor:
    """log pi*(y) of every response: (A,)."""
    return (_reference_logprobs(language, ref) + language.scores / language.beta).log_softmax(dim=0)


def best_objective(language: Language, ref: nn.Module | None = None) -> float:
    """J* = beta log sum_y ref(y) exp(r(y) / beta), the maximum of J over all policies."""
    tilted = _reference_logprobs(language, ref) + language.scores / language.beta  # (A,)
    return language.beta * tilted.logsumexp(dim=0).item()


def gap_closed(language: Language, policy: nn.Module, ref: nn.Module | None = None) -> float:
    """(J(policy) - J(ref)) / (J* - J(ref)): 0 at the reference, 1 at the optimal policy, negative if worse than ref."""
    ref = ref or reference(language)
    with torch.no_grad():
        start = evaluate(language, ref, ref).objective.item()
        reached = evaluate(language, policy, ref).objective.item()
    return (reached - start) / (best_objective(language, ref) - start)
