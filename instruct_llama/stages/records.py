"""Where a stage's records come from: the embedded world, or the file given with `--data`."""

from __future__ import annotations

from typing import Any

from ..config import Settings, UserError
from ..data import sources, tinychat

HELDOUT_FRACTION = 0.05  # share of a file's prompts that validation keeps to itself


def texts(settings: Settings) -> tuple[list[str], list[str]]:
    """Running text for pretraining: (training, held out), split by content."""
    if settings.data:
        records = [{"text": text} for text in sources.as_texts(sources.read(settings.data))]
    else:
        records = [{"text": text} for text in tinychat.corpus(settings.seed, settings.world.corpus_chars)]
    train, valid = sources.split(records, 0.02)
    if not valid:  # a text of one piece: its end is held out
        whole = train[-1]["text"]
        cut = len(whole) - max(1, len(whole) // 20)
        train, valid = [*train[:-1], {"text": whole[:cut]}], [{"text": whole[cut:]}]
    return [r["text"] for r in train], [r["text"] for r in valid]


def demonstrations(settings: Settings) -> tuple[list[Any], list[Any]]:
    """Dialogs to imitate: (training, held out), each a list of message lists."""
    if settings.data:
        train, valid = _split_file(settings, sources.as_dialogs(sources.read(settings.data)))
    else:
        train = tinychat.demonstrations(settings.seed, settings.world.demonstrations)
        valid = tinychat.demonstrations(settings.seed, settings.world.heldout, split="valid")
    return [r["messages"] for r in train], [r["messages"] for r in valid]


def comparisons(settings: Settings) -> tuple[list[Any], list[Any]]:
    """Prompts with ranked completions, best first: (training, held out)."""
    if settings.data:
        return _split_file(settings, sources.as_comparisons(sources.read(settings.data)))
    world = settings.world
    train = tinychat.comparisons(settings.seed, world.comparisons, world.temperature)
    return train, tinychat.comparisons(settings.seed, world.heldout, world.temperature, split="valid")


def prompts(settings: Settings) -> tuple[list[Any], list[Any]]:
    """Prompts to answer, as message lists: (training, held out)."""
    if settings.data:
        train, valid = _split_file(settings, sources.as_prompts(sources.read(settings.data)))
        return [r["prompt"] for r in train], [r["prompt"] for r in valid]
    train = tinychat.prompts(settings.seed, settings.world.prompts, split="train")
    return train, tinychat.prompts(settings.seed, settings.world.heldout, split="valid")


def _split_file(settings: Settings, records: list[Any]) -> tuple[list[Any], list[Any]]:
    train, valid = sources.split(records, HELDOUT_FRACTION)
    if not train or not valid:
        raise UserError(f"{settings.data} holds {len(records)} usable records, too few to hold some out: give more.")
    return train, valid
