"""Files to lines and rows, a piece at a time, so that a file larger than memory is read too.

Nothing but text, JSON, gzip and parquet is read, so no file can run code. What is wrong with a file is a UserError that
names it, the line where there is one, and the cure.
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

SEPARATOR = "<|endoftext|>"  # what ends a story in the text files of TinyStories
_LONGEST = 100_000  # lines of one story; more means that the file has no separators


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`: on success it is flushed to disk and renamed, on failure removed.

    A kill at any moment leaves the old file whole. A full disk raises UserError and loses nothing.
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
                f"The disk is full: {path} could not be written, and its last version is untouched. "
                "Free some space, then run the same command again, a stage with --resume."
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """SHA-256 of a file of any size.

    Read once a process: it is read again when its inode, its size or its time of change is another. A file that was
    changed in the last two seconds is always read, for two changes may bear the same time.
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
    """(number, line without its end) of a text file, unzipped where it is gzip."""
    check(path.exists(), f"There is no file {path}: check the path.")
    check(path.is_file(), f"{path} is a folder: name one file in it.")
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
        raise UserError(f"{path} is a truncated or damaged gzip file: fetch or write it again.") from error
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
            f"{path} line {number} is not valid JSON ({what}): mend or delete the line, or fetch the file again if it "
            "is cut off; each line holds one whole JSON object."
        ) from error


def rows(path: Path, texts: bool = False) -> Iterator[Any]:
    """The rows of a published file, as its publisher wrote it.

    JSON lines, one JSON list, one JSON object over many lines, a parquet table; with `texts` also plain text whose
    pieces end with `<|endoftext|>`, as `{"text"}`. Lists and objects are read whole: sets of that shape are small.
    """
    if _is_parquet(path):
        yield from _parquet(path)
        return
    numbered = lines(path)
    number, first = next(((number, line) for number, line in numbered if line.strip()), (0, ""))
    check(number > 0, f"{path} is empty: fetch it again.")
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
    """The pieces that the separator ends; what it does not end, at the end of a truncated file, is marked as cut."""
    piece: list[str] = []
    for number, line in numbered:
        *ended, rest = line.split(SEPARATOR)
        for part in ended:
            yield {"text": "\n".join([*piece, part])}
            piece = []
        piece.append(rest)
        check(
            len(piece) <= _LONGEST,
            f"{path} line {number}: nothing has ended with {SEPARATOR} for {_LONGEST:,} lines: give a file whose texts "
            "do, or JSON lines of text.",
        )
    if any(line.strip() for line in piece):
        yield {"text": "\n".join(piece), "cut": True}


def _whole(path: Path, start: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        what, line = getattr(error, "msg", "nested too deeply"), start - 1 + getattr(error, "lineno", 1)
        cure = "the file is damaged or cut off, fetch it again"
        raise UserError(f"{path} line {line} is not valid JSON ({what}): {cure}.") from error


def _is_parquet(path: Path) -> bool:
    if not path.is_file():
        return False  # `lines` says so
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path} is a truncated or damaged parquet file: fetch it again.") from error
