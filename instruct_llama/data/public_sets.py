"""Public data sets by name: convert a set from the Hugging Face hub, or from downloaded files, to one file of records.

`build("dolly", "data")` writes `data/dolly.jsonl`, which `sources` reads, and a data card in the same folder: source,
licence, how many records were kept, how many dropped and why, and the file's digest. Rows are streamed from the source
through a converter (`converters`) to the file, so memory use does not grow with the set. The same rows give the same
bytes.

A set is stored as one kind of record. `sources` derives the others: SFT dialogs from the best completions of
comparisons, and PPO prompts from dialogs or comparisons.
"""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import UserError, check
from . import converters
from .files import atomic, digest
from .files import rows as rows_of
from .sources import Bad, Kind, Record, from_instruction, from_pair, reasons, use, write_jsonl

HUB = "https://huggingface.co/datasets/"


@dataclass(frozen=True)
class Source:
    """A public data set: its location, its conversion to records, and its licence."""

    kind: Kind  # kind of its records: text, dialogs or comparisons
    hub: str  # hub repository, or URL of one JSON file; empty: generated from a seed
    needs: frozenset[str]  # keys that a row must have
    convert: Callable[[Record], list[Record]]  # returns the records of one row; raises Bad
    licence: str
    citation: str
    size: str  # number of rows, and download size
    fetch: str  # which file to download for --files
    options: Mapping[str, str] = field(default_factory=dict)  # for datasets.load_dataset: the configuration or folder
    units: Callable[[Iterable[Any]], Iterator[Any]] = iter  # regroups rows into one row per dialog
    sample: int = 0  # how many records a stage builds automatically; 0: all
    note: str = ""  # how the conversion changes the rows

    @property
    def address(self) -> str:
        """The URL of the set."""
        return self.hub if "://" in self.hub else HUB + self.hub


@dataclass(frozen=True)
class Built:
    """What `build` wrote: the path of the records, and their data card."""

    path: Path
    card: dict[str, Any]

    def describe(self) -> str:
        """Counts and licence as one line."""
        card = self.card
        dropped = f"dropped {reasons(card['dropped'])}" if card["dropped"] else "none dropped"
        return f"{self.path}: {card['kept']:,} {card['kind']}, {dropped}. Licence: {card['licence']}."


def _hh(subset: str, size: str, note: str = "") -> Source:
    """The source of a subset of HH-RLHF."""
    return Source(
        "comparisons", "Anthropic/hh-rlhf", frozenset(("chosen", "rejected")), from_pair,
        licence="MIT", citation="arXiv:2204.05862", size=size, fetch=f"{subset}/train.jsonl.gz",
        options={"data_dir": subset}, note=note,
    )  # fmt: skip


_OFFENSIVE = "Holds offensive dialogs, written to provoke: print few."
SETS: dict[str, Source] = {
    "tinystories": Source(
        "text", "roneneldan/TinyStories", frozenset(("text",)), converters.from_text,
        licence="CDLA-Sharing-1.0", citation="arXiv:2305.07759", size="2.1 million stories, 1.9 GB",
        fetch="TinyStories-train.txt, or a parquet file under data/", sample=200_000,
        note="Short stories written by GPT-3.5 and GPT-4.",
    ),
    "fineweb-edu": Source(
        "text", "HuggingFaceFW/fineweb-edu", frozenset(("text",)), converters.from_text,
        licence="ODC-By 1.0, under Common Crawl's terms of use", citation="arXiv:2406.17557",
        size="9.7 million web pages, 10 billion tokens, 28 GB", fetch="any parquet file under sample/10BT/",
        options={"name": "sample-10BT"}, sample=100_000,
    ),
    "dolly": Source(
        "dialogs", "databricks/databricks-dolly-15k", frozenset(("instruction", "context", "response")),
        converters.from_dolly,
        licence="CC BY-SA 3.0", citation="Conover et al., Free Dolly, Databricks 2023",
        size="15,011 instructions, 13 MB", fetch="databricks-dolly-15k.jsonl",
    ),
    "alpaca-cleaned": Source(
        "dialogs", "yahma/alpaca-cleaned", frozenset(("instruction", "output")), from_instruction,
        licence="CC BY 4.0 by its hub card; the Alpaca data that it cleans is CC BY-NC 4.0: not for commercial use",
        citation="Taori et al., Stanford Alpaca 2023; after Self-Instruct, arXiv:2212.10560",
        size="51,760 instructions, 44 MB", fetch="alpaca_data_cleaned.json",
    ),
    "squad": Source(
        "dialogs", "rajpurkar/squad_v2", frozenset(("context", "qas")), converters.from_passage,
        licence="CC BY-SA 4.0", citation="arXiv:1806.03822", size="130,319 questions on 19,035 passages, 42 MB",
        fetch="train-v2.0.json of https://rajpurkar.github.io/SQuAD-explorer/, or a parquet file under squad_v2/",
        units=converters.passages,
        note=f"One dialog a passage, which is the system message; questions that it leaves open are answered "
        f"“{converters.UNANSWERABLE}”",
    ),
    "commonsense-dialogues": Source(
        "dialogs", "https://raw.githubusercontent.com/alexa/Commonsense-Dialogues/HEAD/data/train.json",
        frozenset(("context", "speaker", "turns")), converters.from_situation,
        licence="CC BY-NC 4.0: not for commercial use", citation="arXiv:2109.06427", size="9,058 dialogs, 5 MB",
        fetch="data/train.json of https://github.com/alexa/Commonsense-Dialogues", units=converters.situations,
        note="The situation is the system message. A last turn that nobody answered is left off.",
    ),
    "arithmetic": Source(
        "dialogs", "", frozenset(("a", "sign", "b", "words")), converters.from_sum,
        licence="MIT, as this project", citation="instruct_llama/data/converters.py", size="10,191 sums, 1.4 MB",
        fetch="",
        note="Sums, differences and products, each once, in digits or in words; every answer is computed.",
    ),
    "hh-rlhf": _hh("helpful-base", "43,835 pairs, 16 MB gzipped"),
    "hh-rlhf-harmless": _hh("harmless-base", "42,537 pairs, 13 MB gzipped", _OFFENSIVE),
    "hh-rlhf-online": _hh("helpful-online", "22,007 pairs, 13 MB gzipped"),
    "hh-rlhf-rejection-sampled": _hh("helpful-rejection-sampled", "52,421 pairs, 25 MB gzipped"),
    "stackexchange": Source(
        "comparisons", "HuggingFaceH4/stack-exchange-preferences", frozenset(("question", "answers")),
        converters.from_votes,
        licence="CC BY-SA 4.0", citation="Lambert et al. 2023; scores as in arXiv:2112.00861, section 4.1",
        size="10.7 million questions, 22 GB", fetch="a parquet file of one site under data/", sample=50_000,
        note="2 to 8 answers, best first by votes, one of each score; HTML is stripped to text.",
    ),
}  # fmt: skip


def build(name: str, folder: str | Path, *, limit: int = 0, files: Sequence[str] = (), seed: int = 1) -> Built:
    """Write `<folder>/<name>.jsonl` and its cards, from the hub or from `files`; at most `limit` records, 0 for all.

    Raises UserError if the set cannot be read, and names the file to download.
    """
    check(name in SETS, f"There is no public data set {name!r}: choose from {', '.join(SETS)}.")
    check(limit >= 0, f"--limit is {limit}: give the number of records to build, or 0 for all.")
    source, path = SETS[name], Path(folder) / f"{name}.jsonl"
    check(bool(source.hub) or not files, f"{name} is generated from --seed: remove --files.")
    if files:
        origin, rows = ", ".join(Path(file).name for file in files), _from_files(source, files)
    elif source.hub:
        origin, rows = source.address, _from_hub(name, source)
    else:
        origin, rows = f"made from seed {seed}", converters.sums(seed)
    dropped: Counter[str] = Counter()
    records = islice(_converted(name, source, rows, dropped), limit or None)
    with tqdm(records, total=limit or None, desc=name, unit=" records", disable=None, leave=False) as bar:
        kept = write_jsonl(path, bar)
    card = {
        "name": name, "kind": source.kind, "kept": kept, "dropped": dict(dropped.most_common()), "limit": limit,
        "source": origin, "published_at": source.address if source.hub else "", "options": dict(source.options),
        "split": "that of the files" if files else "train", "size": source.size, "licence": source.licence,
        "citation": source.citation, "note": source.note, "sha256": digest(path),
    }  # fmt: skip
    _write(path.with_suffix(".card.json"), json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    _write(path.with_suffix(".card.md"), _page(card))
    return Built(path, card)


def _converted(name: str, source: Source, rows: Iterable[Any], dropped: Counter[str]) -> Iterator[Record]:
    """The records of all rows; dropped rows are counted by reason."""
    kept = 0
    for row in source.units(rows):
        try:
            records = use(row, source.needs, source.convert)
        except Bad as bad:
            dropped[bad.reason] += 1
            continue
        kept += len(records)
        yield from records
    why = reasons(dropped) or "there were no rows"
    check(kept > 0, f"{name} has no usable record ({why}): {_by_hand(name, source)}")


# ---------------------------------------------------------------- the rows of a source


def _from_files(source: Source, files: Sequence[str]) -> Iterator[Any]:
    for file in files:
        yield from rows_of(Path(file), texts=source.kind == "text")


def _from_hub(name: str, source: Source) -> Iterator[Any]:
    """Rows streamed from the hub. The cure for every failure is the same: download the file and give `--files`."""
    try:
        if "://" in source.hub:
            with urllib.request.urlopen(source.hub, timeout=60) as reply:
                yield json.load(reply)
        else:
            import datasets  # slow to import

            yield from datasets.load_dataset(source.hub, split="train", streaming=True, **source.options)
    except Exception as error:  # datasets, huggingface_hub, httpx, aiohttp and pyarrow share no other base class
        said = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
        gated = "gated" in said.lower() or type(error).__name__ == "GatedRepoError"
        terms = f"accept its terms at {source.address} and log in with `hf auth login`, or " if gated else ""
        cure = f"{terms}{_by_hand(name, source)}"
        raise UserError(f"{name} cannot be read from {source.address} ({said}): {cure}") from error


def _by_hand(name: str, source: Source) -> str:
    """The instruction to build the set from a downloaded file."""
    return (
        f"download it on a machine with network access ({source.fetch}) and run "
        f"`python -m instruct_llama data {name} --files PATH`."
    )


# ---------------------------------------------------------------- the card


def _page(card: Mapping[str, Any]) -> str:
    """The data card as a Markdown page."""
    options = "".join(f", {key} {value}" for key, value in card["options"].items())
    published = f" ({card['published_at']})" if card["published_at"] else ""
    facts = {
        "source": card["source"] if card["source"] == card["published_at"] else card["source"] + published,
        "part": f"{card['split']}{options}" + (f", the first {card['limit']:,} records" if card["limit"] else ""),
        "whole set": card["size"],
        "licence": card["licence"],
        "citation": card["citation"],
        "records": f"{card['kept']:,} {card['kind']}",
        "dropped": reasons(card["dropped"]) or "none",
        "note": card["note"] or "—",
        "sha256": card["sha256"],
    }
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    return f"# {card['name']}\n\n| | |\n|---|---|\n{rows}"


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
