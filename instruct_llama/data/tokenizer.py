"""Tokenizers: text to token ids and back, with the chat format.

`Tokenizer` is SentencePiece byte-pair encoding with byte fallback, as in LLaMA 1 and 2: any text can be encoded, and
`decode(encode(text)) == text` for every text. `JsonTokenizer` reads the `tokenizer.json` of later models. Encoding
text never gives a special token, so a user cannot forge a turn by typing `<|assistant|>`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from ..config import UserError, check
from .chat_template import FORMATS, MARKERS, ChatFormat, Message, dialog_problem, format_for, framed
from .files import atomic

__all__ = ["BOS", "EOS", "MARKERS", "PAD", "UNK", "JsonTokenizer", "Message", "Tokenizer", "dialog_problem"]

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
_SPACE = "\u2581"  # ▁, SentencePiece's symbol for a space


class Tokenizer:
    """A SentencePiece model with its chat format: ours, or LLaMA 2's if the vocabulary lacks our markers.

    `vocab_size` counts all ids. `eos_id` is the end token that the model is trained on; any of `end_ids` ends a
    response.
    """

    file_name = "tokenizer.model"

    def __init__(self, model_bytes: bytes) -> None:
        self.model_bytes = model_bytes
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        self.bos_id, self.eos_id, self.unk_id = self._pieces.bos_id(), self._pieces.eos_id(), self._pieces.unk_id()
        known = {name: self._pieces.piece_to_id(name) for name in (PAD, *MARKERS)}
        # Text can encode to an ordinary piece of that name, so only control pieces count.
        specials = {name: i for name, i in known.items() if self._pieces.is_control(i)}
        check(min(self.bos_id, self.eos_id) >= 0, "The tokenizer file has no <s> or no </s>: use a LLaMA vocabulary.")
        specials |= {self._pieces.id_to_piece(i): i for i in (self.bos_id, self.eos_id, self.unk_id)}
        self.vocab_size = self._pieces.vocab_size()
        self.pad_id = specials.get(PAD, self.unk_id)  # LLaMA 2 has no <pad>, and its text never encodes to <unk>
        self.system_id, self.user_id, self.assistant_id = (specials.get(name) for name in MARKERS)
        self._first_byte = self._pieces.piece_to_id("<0x00>")
        self._space_id = self._pieces.piece_to_id(_SPACE)
        self._set_chat(format_for(list(specials)), specials)

    def _set_chat(self, chat: ChatFormat, specials: dict[str, int], system: str = "") -> None:
        """Set the chat format, the special ids, the end ids and the ids to suppress in sampling."""
        self.chat, self.system, self.specials = chat, system, specials
        self._specials = frozenset(specials.values())
        self.special_ids = tuple(sorted(self._specials))
        # A response may hold no special token but its end.
        self.suppress_tokens = tuple(i for i in self.special_ids if i != self.eos_id)
        self.end_ids = (self.eos_id, *(specials[name] for name in chat.other_ends if name in specials))
        names = "|".join(re.escape(name) for name in sorted(specials, key=len, reverse=True))
        self._split_specials = re.compile(f"({names})")
        self._frames: dict[str, list[int]] = {}

    @property
    def chat_template(self) -> str:
        """The chat format as a Jinja template, for other tools."""
        return self.chat.template.replace("{system}", self.system)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, max_chars: int = 2_000_000) -> Tokenizer:
        """Train a vocabulary of exactly `vocab_size` ids on the first `max_chars` characters of `texts`.

        The same texts give the same bytes. Raises UserError if the size is too small for the 256 bytes, the special
        tokens and the characters of the text, or larger than the number of pieces in the text.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_at_most(texts, max_chars),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                character_coverage=0.9995,  # the rarest characters are encoded as bytes
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
                user_defined_symbols=["\n"],  # a line break is one token, and no piece contains one
                max_sentence_length=1 << 30,
                num_threads=1,
                minloglevel=3,
            )
        except RuntimeError as error:
            raise UserError(_training_problem(str(error), vocab_size)) from error
        return cls(model.getvalue())

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a SentencePiece `tokenizer.model`, ours or LLaMA 2's. Raises UserError naming the file."""
        path = Path(path)
        check(path.is_file(), f"There is no tokenizer file {path}: give the path of a SentencePiece tokenizer.model.")
        try:
            return cls(path.read_bytes())
        except (RuntimeError, IndexError) as error:
            raise UserError(f"{path} is not a SentencePiece model: give a LLaMA tokenizer.model.") from error

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer saved in a run folder, of either class."""
        if (Path(folder) / JsonTokenizer.file_name).is_file():
            return JsonTokenizer.from_file(Path(folder) / JsonTokenizer.file_name)
        return cls.from_file(Path(folder) / cls.file_name)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model` into a run folder."""
        with atomic(Path(folder) / self.file_name) as temporary:
            temporary.write_bytes(self.model_bytes)

    def fingerprint(self) -> str:
        """SHA-256 of the model file: equal for equal vocabularies."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate becomes "?"
        if _SPACE not in text:
            return self._pieces.encode(text)
        # SentencePiece would encode a typed ▁ as a space: from it to the next space, the text is encoded as bytes
        first, *rest = re.split(f"({_SPACE}[^ ]*)", text)
        ids = self._pieces.encode(first)
        for run, after in zip(rest[::2], rest[1::2], strict=True):
            ids += [self._first_byte + byte for byte in run.encode()]
            if after:  # it starts with a space, which SentencePiece adds before every text
                ids += self._pieces.encode(after[1:]) or [self._space_id]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens; bytes that are not valid UTF-8 become U+FFFD."""
        return self._pieces.decode([int(i) for i in ids if int(i) not in self._specials])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each id as a readable piece, for plots: special tokens by name, a leading space as ▁."""
        return [self._pieces.id_to_piece(int(i)) for i in ids]

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Ids of a prompt with the generation prompt. A str is one user turn. In our own format:

        `<s> [<|system|> text] <|user|> text <|assistant|> text </s> <|user|> text <|assistant|>`
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        ids, _ = self.encode_dialog(messages)
        check(messages[-1]["role"] == "user", "A prompt must end with a user turn: remove the last assistant turn.")
        invitation = "" if "assistant" in self.chat.silent else self.chat.before.format(role="assistant")
        return ids + self._frame(invitation)

    def encode_dialog(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids and loss mask of a dialog: True on the tokens of assistant turns and their end tokens.

        Every turn is tokenised separately, so the mask is exact, and the ids of a dialog start with its prompt's ids.
        """
        problem = dialog_problem(messages)
        check(
            problem is None,
            f"This dialog cannot be used: {problem}. Give alternating user and assistant turns, the user first.",
        )
        ids: list[int] = []
        mask: list[bool] = []
        for before, content, after, answer in framed(self.chat, messages, self.system):
            opening, text, closing = self._frame(before), self.encode(content), self._frame(after)
            counted = len(text) + 1 if answer else 0  # the content and its end token
            ids += [*opening, *text, *closing]
            mask += [False] * len(opening) + [True] * counted + [False] * (len(text) + len(closing) - counted)
        if messages[-1]["role"] == "assistant":  # the text after the last end token precedes a next turn
            spare = len(self._frame(self.chat.after_end))
            ids, mask = ids[: len(ids) - spare], mask[: len(mask) - spare]
        return ids, mask

    def _frame(self, text: str) -> list[int]:
        """Ids of the text around a turn's content; names of special tokens in it become those tokens."""
        if text not in self._frames:
            parts = self._split_specials.split(text)
            self._frames[text] = [
                i for part in parts for i in ([self.specials[part]] if part in self.specials else self.encode(part))
            ]
        return self._frames[text]


class JsonTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, as in LLaMA 3, SmolLM2 and others, with its `tokenizer_config.json`."""

    file_name = "tokenizer.json"
    config_name = "tokenizer_config.json"

    def __init__(self, text: str, config: dict[str, Any]) -> None:
        self.text, self.config = text, config
        self._inner = tokenizers.Tokenizer.from_str(text)
        self._inner.encode_special_tokens = True  # special tokens in the text are plain text
        added = self._inner.get_added_tokens_decoder()
        specials = {token.content: i for i, token in added.items() if token.special}
        chat = FORMATS.get(config.get("chat_format", ""), format_for(list(specials)))
        check(chat.end in specials, f"The tokenizer has no {chat.end}: use the tokenizer.json of a LLaMA-like model.")
        self.vocab_size = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = specials[chat.end]
        self.bos_id = specials.get(_token(config.get("bos_token")), self.eos_id)
        self.unk_id = specials.get(_token(config.get("unk_token")), self.eos_id)
        spare = (_token(config.get("pad_token")), "<|finetune_right_pad_id|>", PAD, UNK, *chat.other_ends)
        free = [specials[name] for name in spare if name in specials and specials[name] != self.eos_id]
        check(bool(free), "The tokenizer has no special token for padding except its end token: add <pad> to its file.")
        self.pad_id = free[0]  # never the end token, though some models declare it: the loss counts the end token (P37)
        self._set_chat(chat, specials, config.get("default_system", _default_system(config.get("chat_template"))))

    @classmethod
    def from_file(cls, path: str | Path) -> JsonTokenizer:
        """Read a `tokenizer.json` and the `tokenizer_config.json` in its folder. Raises UserError naming the file."""
        path = Path(path)
        beside = path.with_name(cls.config_name)
        try:
            config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
            return cls(path.read_text(encoding="utf-8"), config)
        except UserError:
            raise
        except Exception as error:  # the tokenizers library raises bare exceptions
            raise UserError(f"{path} is not a file of the `tokenizers` library ({error}): replace it.") from error

    def save(self, folder: str | Path) -> None:
        """Write both files into a run folder."""
        written = {"chat_format": self.chat.name, "default_system": self.system, **self.config}
        texts = {self.file_name: self.text, self.config_name: json.dumps(written, indent=2, ensure_ascii=False)}
        for name, text in texts.items():
            with atomic(Path(folder) / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def fingerprint(self) -> str:
        """SHA-256 of the file and the chat format: equal for equal vocabularies."""
        return hashlib.sha256(f"{self.text}\n{self.chat.name}\n{self.system}".encode()).hexdigest()

    def pieces_as_stored(self) -> list[str]:
        """Every token as stored in the file, in the order of ids; an id without a token becomes `[UNUSED_id]`."""
        return [self._inner.id_to_token(i) or f"[UNUSED_{i}]" for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self._inner.encode(text.encode("utf-8", "replace").decode("utf-8"), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._inner.decode([int(i) for i in ids if int(i) not in self._specials], skip_special_tokens=False)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each id as a readable piece, for plots: special tokens by name, a leading space as ▁."""
        tokens = (self._inner.id_to_token(int(i)) or f"<{int(i)}>" for i in ids)
        return [token.replace("Ġ", _SPACE).replace("Ċ", "\n") for token in tokens]


def _token(value: Any) -> str:
    """The text of a special token in tokenizer_config.json, where it is a str or an object with `content`."""
    return str(value["content"] if isinstance(value, dict) else value)


def _default_system(template: Any) -> str:
    """The default system message in a ChatML template, such as SmolLM2's; empty if there is none."""
    text = str(template).replace("\\n", "\n")  # templates have line breaks in either form
    found = re.search(r"!= 'system' %\}\{\{ '<\|im_start\|>system\n(.*?)<\|im_end\|>", text, re.S)
    return found[1] if found else ""


def _at_most(texts: Iterable[str], max_chars: int) -> Iterator[str]:
    """The first `max_chars` characters of the texts."""
    left = max_chars
    for text in texts:
        if left <= 0:
            return
        yield text[:left].encode("utf-8", "replace").decode("utf-8")
        left -= len(text)


def _training_problem(message: str, vocab_size: int) -> str:
    """SentencePiece's error message as a sentence with its cure."""
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"tokenizer.vocab_size {vocab_size} is too small for this text: set it to {found[1]} or more."
    if found := re.search(r"size too high .*<= (\d+)", message):
        return (
            f"tokenizer.vocab_size {vocab_size} is too large for this text: "
            f"set it to {found[1]} or less, or give more text."
        )
    if "sentences_.empty()" in message:
        return "There is no text to train the tokenizer on: give files that are not empty (tokenizer.files)."
    return f"SentencePiece could not train a vocabulary of {vocab_size}: {message}"
