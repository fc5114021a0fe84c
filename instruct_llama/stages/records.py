"""The records of a stage, from the embedded world or from the file or public set given with `--data`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Settings, UserError, check, project_folder, shown
from ..data import public_sets, sources
from ..data.sources import HeldOut
from ..data.tokenizer import Tokenizer
from ..training import distributed
from ..worlds import tinychat

HELDOUT_FRACTION = 0.05  # share of a file's prompts held out for validation
HELDOUT_TEXTS = 0.02  # the same for running text


def with_data(settings: Settings, usual: str) -> Settings:
    """The settings with `data` set: --data if it is given, else the stage's default data."""
    return settings.replace(data=settings.data or usual or None)


def data_path(settings: Settings) -> Path | None:
    """The path of the file or public set that `--data` names; a set that is missing in data/ is built first."""
    if settings.data not in public_sets.SETS:
        return Path(settings.data) if settings.data else None
    name, folder = settings.data, project_folder() / "data"
    path, sample = folder / f"{name}.jsonl", public_sets.SETS[name].sample
    if distributed.broadcast_from_main(path.is_file()):
        return path
    with distributed.main_first():
        if not path.is_file():
            part = f"its first {sample:,} records are" if sample else "it is"
            print(f"{name} is not in {shown(folder)}: {part} built first (python -m instruct_llama data {name}).")
            print(public_sets.build(name, folder, limit=sample, seed=settings.seed).describe())
    return path


@dataclass(frozen=True)
class Texts:
    """The training or the held-out texts of a file, streamed in each iteration, since it may not fit in memory."""

    path: Path
    heldout: bool

    def __iter__(self) -> Iterator[str]:
        for text in sources.stream_texts(self.path):
            if sources.is_heldout(text, HELDOUT_TEXTS) is self.heldout:
                yield text


def texts(settings: Settings) -> tuple[Iterable[str], Iterable[str]]:
    """Running text for pretraining: (training, held out), split by content."""
    train: Iterable[str]
    valid: Iterable[str]
    if path := data_path(settings):
        train, valid = Texts(path, False), Texts(path, True)
    else:
        train, valid = sources.split(list(tinychat.corpus(settings.seed, settings.world.corpus_chars)), HELDOUT_TEXTS)
    if next(iter(valid), None) is None:  # no text was held out: hold out the end of the last one
        *train, whole = train
        cut = len(whole) - max(1, len(whole) // 20)
        train, valid = [*train, whole[:cut]], [whole[cut:]]
    return train, valid


def demonstrations(settings: Settings) -> tuple[list[Any], list[Any]]:
    """Dialogs for SFT: (training, held out), each a list of message lists."""
    if path := data_path(settings):
        train, valid = _split_file(settings, sources.as_dialogs(sources.read(path)))
    else:
        train = tinychat.demonstrations(settings.seed, settings.world.demonstrations)
        valid = tinychat.demonstrations(settings.seed, settings.world.heldout, split="valid")
    return [r["messages"] for r in train], [r["messages"] for r in valid]


def comparisons(settings: Settings) -> tuple[list[Any], list[Any]]:
    """Prompts with ranked completions, best first: (training, held out)."""
    if path := data_path(settings):
        return _split_file(settings, sources.as_comparisons(sources.read(path)))
    world = settings.world
    train = tinychat.comparisons(settings.seed, world.comparisons, world.temperature)
    return train, tinychat.comparisons(settings.seed, world.heldout, world.temperature, split="valid")


def preferences(settings: Settings) -> tuple[list[Any], list[Any]]:
    """Comparisons or single labelled responses from the file in `settings.data`: (training, held out)."""
    path = data_path(settings)
    assert path is not None  # without a file, the comparisons are those of the reward model
    return _split_file(settings, sources.as_preferences(sources.read(path)))


def check_fitting(kept: int, given: int, stage: str, seq_len: int) -> None:
    """Print how many comparisons do not fit `seq_len` tokens. Raises `UserError` when none does."""
    check(kept > 0, f"None of the {given} comparisons fits {stage}.seq_len {seq_len}: raise it, say double it.")
    if kept < given:
        print(f"{given - kept} of {given} comparisons are longer than {seq_len} tokens: dropped.")


def prompts(settings: Settings) -> tuple[list[Any], list[Any]]:
    """Prompts for PPO: (training, held out), each a list of message lists."""
    if path := data_path(settings):
        train, valid = _split_file(settings, sources.as_prompts(sources.read(path)))
        return [r["prompt"] for r in train], [r["prompt"] for r in valid]
    train = tinychat.prompts(settings.seed, settings.world.prompts, split="train")
    return train, tinychat.prompts(settings.seed, settings.world.heldout, split="valid")


def check_vocabularies(policy: Path, reward: Path) -> None:
    """Raise `UserError` unless the tokenizers of two run folders agree; otherwise the scores would be meaningless."""
    first, second = (Tokenizer.load(folder).fingerprint() for folder in (policy, reward))
    check(
        first == second,
        f"The vocabularies of {shown(policy)} and {shown(reward)} differ, so the same token ids are different texts: "
        "train the reward model from the run that the policy starts from, or from its base.",
    )


def heldout(settings: Settings) -> HeldOut:
    """The held-out records of each stage's data; a kind that a file does not have is empty."""
    found: dict[str, list[Any]] = {}
    for name, usual, read in (
        ("dialogs", settings.sft.data, demonstrations), ("comparisons", settings.reward.data, comparisons),
        ("prompts", settings.ppo.data, prompts),
    ):  # fmt: skip
        with suppress(UserError):
            found[name] = read(with_data(settings, usual))[1]
    name = settings.data or settings.sft.data
    check(bool(found), f"{name} holds nothing to evaluate on: give dialogs or comparisons.")
    return HeldOut(**found)


def _split_file(settings: Settings, records: list[Any]) -> tuple[list[Any], list[Any]]:
    train, valid = sources.split(records, HELDOUT_FRACTION)
    if not train or not valid:
        raise UserError(f"{settings.data} holds {len(records)} usable records, too few for a held-out part: give more.")
    return train, valid
