"""Text to token ids and back, and the chat template.

The vocabulary is SentencePiece byte-pair encoding with byte fallback, as LLaMA 1 and 2 use: any text can be
written, and `decode(encode(text)) == text` for every text. The special tokens are control symbols: encoding text
never makes one, so nobody can forge a turn by typing `<|assistant|>`.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from ..config import UserError, check
from .batches import atomic

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
MARKERS = ("<|system|>", "<|user|>", "<|assistant|>")
_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece: ▁
FILE_NAME = "tokenizer.model"


def dialog_problem(messages: Sequence[Message]) -> str | None:
    """What is wrong with a dialog's turns, the particulars in brackets, or None.

    A dialog is an optional system message, then user and assistant in turn, the user first.
    """
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f'a turn is not {{"role": …, "content": …}} (turn {number})'
        if message["role"] not in ("system", "user", "assistant"):
            return f"a role is not system, user or assistant (turn {number}: {message['role']!r})"
    first = 1 if messages and messages[0]["role"] == "system" else 0
    if len(messages) == first:
        return "there is no user turn"
    for index in range(first, len(messages)):
        role, due = messages[index]["role"], ("user", "assistant")[(index - first) % 2]
        if role != due:
            return f"the turns do not alternate (turn {index + 1} is {role}, where {due} is due)"
    return None


class Tokenizer:
    """A SentencePiece model with PAD, BOS, EOS and the three chat markers.

    `vocab_size` counts everything. What a foreign model lacks (Llama 2's has no padding and no chat markers)
    is appended above its pieces.
    """

    def __init__(self, model_bytes: bytes) -> None:
        self._bytes = model_bytes
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        n_pieces = self._pieces.vocab_size()
        self._added: list[str] = []
        ids = []
        for name in (PAD, *MARKERS):
            known = self._pieces.piece_to_id(name)
            if self._pieces.is_control(known):  # an ordinary piece of that name could be typed, so it does not count
                ids.append(known)
            else:
                ids.append(n_pieces + len(self._added))
                self._added.append(name)
        self.pad_id, self.system_id, self.user_id, self.assistant_id = ids
        self.bos_id, self.eos_id = self._pieces.bos_id(), self._pieces.eos_id()
        self.unk_id = self._pieces.unk_id()
        check(min(self.bos_id, self.eos_id) >= 0, "The tokenizer file has no <s> or no </s>: use a LLaMA vocabulary.")
        self.vocab_size = n_pieces + len(self._added)
        self.special_ids = (self.pad_id, self.bos_id, self.eos_id, self.unk_id, *ids[1:])
        self.banned_ids = tuple(i for i in self.special_ids if i != self.eos_id)  # an answer may hold none but its end
        self._specials = frozenset(self.special_ids)
        self._first_byte = self._pieces.piece_to_id("<0x00>")
        self._space_id = self._pieces.piece_to_id(_SPACE)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, max_chars: int = 2_000_000) -> Tokenizer:
        """Learn a vocabulary of exactly `vocab_size` ids from the first `max_chars` characters of `texts`.

        The same texts give the same bytes. Raises UserError when the size is too small for the 256 bytes, the special
        tokens and the letters of the text, or larger than the text has pieces for.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_at_most(texts, max_chars),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                character_coverage=0.9995,  # the rarest letters are written as bytes
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                pad_piece=PAD,
                control_symbols=list(MARKERS),
                user_defined_symbols=["\n"],  # a line break is one token, and no piece reaches over it
                max_sentence_length=1 << 30,
                num_threads=1,
                minloglevel=3,
            )
        except RuntimeError as error:
            raise UserError(_training_problem(str(error), vocab_size)) from error
        return cls(model.getvalue())

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a SentencePiece `tokenizer.model`, ours or Llama 2's. Raises UserError naming the file."""
        path = Path(path)
        check(path.is_file(), f"There is no tokenizer file {path}: give the path of a SentencePiece tokenizer.model.")
        try:
            return cls(path.read_bytes())
        except (RuntimeError, IndexError) as error:
            raise UserError(f"{path} is not a SentencePiece model: give a LLaMA tokenizer.model.") from error

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer that was saved in a run folder."""
        return cls.from_file(Path(folder) / FILE_NAME)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model` into a run folder."""
        with atomic(Path(folder) / FILE_NAME) as temporary:
            temporary.write_bytes(self._bytes)

    def fingerprint(self) -> str:
        """SHA-256 of the model: equal for equal vocabularies."""
        return hashlib.sha256(self._bytes).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no character: it becomes "?"
        if _SPACE not in text:
            return self._pieces.encode(text)
        # SentencePiece would read a typed ▁ as a space: the run from it to the next space is spelt in bytes
        first, *rest = re.split(f"({_SPACE}[^ ]*)", text)
        ids = self._pieces.encode(first)
        for run, after in zip(rest[::2], rest[1::2], strict=True):
            ids += [self._first_byte + byte for byte in run.encode()]
            if after:  # it starts with the space that SentencePiece puts before every text
                ids += self._pieces.encode(after[1:]) or [self._space_id]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens leave no trace, bytes that form no character become U+FFFD."""
        return self._pieces.decode([int(i) for i in ids if int(i) not in self._specials])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each id as a readable piece, for plots: special tokens by name, a leading space as ▁."""
        n_pieces = self.vocab_size - len(self._added)
        return [self._pieces.id_to_piece(int(i)) if i < n_pieces else self._added[int(i) - n_pieces] for i in ids]

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """A prompt with the marker that invites the answer. A str is one user turn.

        `<s> [<|system|> text] <|user|> text <|assistant|> text </s> <|user|> text <|assistant|>`
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        ids, _ = self.encode_dialog(messages)
        check(messages[-1]["role"] == "user", "A prompt must end with a user turn: leave the last answer out.")
        return ids + [self.assistant_id]

    def encode_dialog(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """A dialog's token ids, and its loss mask: True on each answer's tokens and its end token, else False.

        Every turn is tokenised apart, so the mask is exact, and the first k ids of a dialog are its prompt's ids.
        """
        problem = dialog_problem(messages)
        check(
            problem is None,
            f"This dialog cannot be used: {problem}. Give user and assistant turns in turn, the user first.",
        )
        marker = {"system": self.system_id, "user": self.user_id, "assistant": self.assistant_id}
        ids, mask = [self.bos_id], [False]
        for message in messages:
            text = self.encode(message["content"])
            answer = message["role"] == "assistant"
            end = [self.eos_id] if answer else []
            ids += [marker[message["role"]], *text, *end]
            mask += [False] + [answer] * (len(text) + len(end))
        return ids, mask


def _at_most(texts: Iterable[str], max_chars: int) -> Iterator[str]:
    """The first `max_chars` characters of texts."""
    left = max_chars
    for text in texts:
        if left <= 0:
            return
        yield text[:left].encode("utf-8", "replace").decode("utf-8")
        left -= len(text)


def _training_problem(message: str, vocab_size: int) -> str:
    """SentencePiece's complaint about a vocabulary size, as a sentence with its cure."""
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"tokenizer.vocab_size {vocab_size} is too small for this text: set it to {found[1]} or more."
    if found := re.search(r"size too high .*<= (\d+)", message):
        return (
            f"tokenizer.vocab_size {vocab_size} is more than this text has pieces for: "
            f"set it to {found[1]} or less, or give more text."
        )
    if "sentences_.empty()" in message:
        return "There is no text to train the tokenizer on: give files that are not empty (tokenizer.files)."
    return f"SentencePiece could not train a vocabulary of {vocab_size}: {message}"
