"""Stream the lines and rows of files, so that a file may be larger than memory.

Only text, JSON, gzip and parquet are read, so no file can run code. A bad file raises a UserError that names the file,
the line if there is one, and the cure.
"""

from __future__ import annotations

import errno
import functools
import gzip
import hashlib
import io
import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from ..config import UserError, check

SEPARATOR = "<|endoftext|>"  # ends a story in the text files of TinyStories
_LONGEST = 100_000  # lines per story; with more, the file is taken to have no separators


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`: on success it is synced to disk and renamed, on failure removed.

    A process killed at any moment leaves the old file intact. So does a full disk, which raises UserError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk is full: {path} could not be written, and its last version is unchanged. "
                "Free some space, then run the same command again, a stage with --resume."
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file of any size.

    Cached in the process by inode, size and modification time. A file modified in the last two seconds is always read,
    because two changes may have the same time stamp.
    """
    state = path.stat()
    if time.time_ns() - state.st_mtime_ns < 2_000_000_000:
        return _sha256(path)
    return _digest_of(path.resolve(), state.st_ino, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest_of(path: Path, *_state: int) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line without its line end) of a text file, which may be gzipped."""
    check(path.exists(), f"There is no file {path}: check the path.")
    check(path.is_file(), f"{path} is a folder: give one file in it.")
    number = 0
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            for line in io.BufferedReader(gzip.GzipFile(fileobj=raw)) if zipped else raw:
                number += 1
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                check("\0" not in text, f"{path} is a binary file: give plain text, JSON lines, or either gzipped.")
                yield number, text.removesuffix("\n").removesuffix("\r")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a truncated or damaged gzip file: download or write it again.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} line {number} is not UTF-8 text: give plain text, JSON lines, or either gzipped, in UTF-8."
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions and its disk.") from error


def parsed(path: Path, number: int, line: str) -> Any:
    """The JSON value on one line."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        what = getattr(error, "msg", "nested too deeply")
        raise UserError(
            f"{path} line {number} is not valid JSON ({what}): fix or delete the line, or download the file again "
            "if it is truncated; each line holds one whole JSON object."
        ) from error


def rows(path: Path, texts: bool = False) -> Iterator[Any]:
    """The rows of a published data file, in its own format.

    The file holds JSON lines, one JSON list, one JSON object over many lines, or a parquet table; with `texts` also
    plain text whose documents end with `<|endoftext|>`, returned as `{"text"}`. A list or object is read whole into
    memory: sets in these formats are small.
    """
    if _is_parquet(path):
        yield from _parquet(path)
        return
    numbered = lines(path)
    number, first = next(((number, line) for number, line in numbered if line.strip()), (0, ""))
    check(number > 0, f"{path} is empty: download it again.")
    rest = chain([(number, first)], numbered)
    begins = first.lstrip()
    if texts and begins[0] not in "[{":
        yield from _stories(path, rest)
    elif begins[0] == "[" or begins.rstrip() == "{":
        value = _whole(path, number, "\n".join(line for _, line in rest))
        yield from value if isinstance(value, list) else [value]
    else:
        yield from (parsed(path, number, line) for number, line in rest if line.strip())


def _stories(path: Path, numbered: Iterator[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    """The texts that a separator ends; text after the last one, as in a truncated file, is marked with `cut`."""
    piece: list[str] = []
    for number, line in numbered:
        *ended, rest = line.split(SEPARATOR)
        for part in ended:
            yield {"text": "\n".join([*piece, part])}
            piece = []
        piece.append(rest)
        check(
            len(piece) <= _LONGEST,
            f"{path} line {number}: no {SEPARATOR} in {_LONGEST:,} lines: give a file whose texts end with it, or JSON "
            "lines of text.",
        )
    if any(line.strip() for line in piece):
        yield {"text": "\n".join(piece), "cut": True}


def _whole(path: Path, start: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        what, line = getattr(error, "msg", "nested too deeply"), start - 1 + getattr(error, "lineno", 1)
        cure = "the file is damaged or truncated, download it again"
        raise UserError(f"{path} line {line} is not valid JSON ({what}): {cure}.") from error


def _is_parquet(path: Path) -> bool:
    if not path.is_file():
        return False  # `lines` raises the error
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path} is a truncated or damaged parquet file: download it again.") from error
