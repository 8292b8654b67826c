"""Text files of any origin, read with bounds: what is not UTF-8 text is refused by line or offset, never guessed at.

Only as much is read as is asked for, so that a corpus of gigabytes costs what its first blocks cost. `.gz` is unpacked
on the way, and bounded by what comes out of it.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soco_train.bounded import open_plain
from soco_train.errors import DataError, RecipeError

READ_AT_ONCE = 1 << 16
MOST = 1 << 30  # characters of one file; a calibration text of 10,000 blocks of 2048 tokens has a tenth of it
LONGEST_LINE = 1 << 24  # characters of one JSON document
MOST_BLANK = 100_000  # lines, one after the other
SHOWN = 6  # fields that an error names
# How other files begin: those of Parquet, zip (docx, npz), zstandard, bzip2, xz and UTF-16 or UTF-32 with their mark.
FOREIGN = {
    b"PAR1": "Parquet",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\xff\xfe": "UTF-16 or UTF-32",
    b"\xfe\xff": "UTF-16",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"%PDF": "PDF",
}


def kind_of(path: Path) -> str:
    """Return a name's suffix in small letters, without .gz."""
    name = path.name.lower().removesuffix(".gz")
    return os.path.splitext(name)[1]


def decoded(path: Path) -> Iterator[str]:
    """Yield the text of a file in pieces, without byte order mark and with line ends of one character.

    Raises RecipeError (absent, unreadable, no plain file, a git-lfs pointer) and DataError (not UTF-8, NUL, too long,
    damaged).
    """
    found, held = 0, ""
    for piece in _decoded(path):
        found += len(piece)
        if found > MOST:
            raise DataError(f"{path.name} has more than {MOST} characters", fix="give a part of it", where=str(path))
        if "\0" in piece:
            raise DataError(f"{path.name} holds NUL characters: it is no text", fix="give a text file", where=str(path))
        piece, held = held + piece, ""
        if piece.endswith("\r"):  # its line feed may come with the next piece
            piece, held = piece[:-1], "\r"
        yield piece.replace("\r\n", "\n")
    if held:
        yield held


def _decoded(path: Path) -> Iterator[str]:
    decoder, offset = codecs.getincrementaldecoder("utf-8-sig")(), 0
    with _opened(path) as file:
        while True:
            chunk = file.read(READ_AT_ONCE)
            if offset == 0:
                _check_start(chunk, path)
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                pending = len(error.object) - len(chunk)
                raise DataError(
                    f"{path.name} is not UTF-8: byte 0x{error.object[error.start]:02x} "
                    f"at offset {offset - pending + error.start}",
                    fix="convert it, for example: iconv -f latin1 -t utf-8",
                    where=str(path),
                ) from None
            if not chunk:
                return
            offset += len(chunk)


def _check_start(chunk: bytes, path: Path) -> None:
    for mark, name in FOREIGN.items():
        if chunk.startswith(mark):
            fix = "convert it: iconv -f utf-16 -t utf-8" if "UTF" in name else "give text, or JSON lines"
            raise DataError(f"{path.name} is {name}, not UTF-8 text", fix=fix, where=str(path))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a plain file, packed or not; RecipeError for what cannot be opened: a recipe has named it."""
    try:
        file = open_plain(path, "give a readable text file")
    except DataError as error:
        raise RecipeError(error.message, fix=error.fix, where=error.where) from None
    try:
        with file as raw:
            packed = raw.peek(2).startswith(b"\x1f\x8b")
            yield gzip.GzipFile(fileobj=raw) if packed else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path.name} is damaged: {error}", fix="pack it again", where=str(path)) from None
    except OSError as error:
        raise DataError(f"cannot read {path.name}: {error.strerror}", fix="copy it anew", where=str(path)) from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of the lines that hold something; DataError where blank ones have no end."""
    last = 0
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield number, line
            last = number
        elif number - last > MOST_BLANK:
            raise DataError(
                f"more than {MOST_BLANK} blank lines", fix="write one JSON object a line", where=f"{path}:{number}"
            )


def _lines(path: Path) -> Iterator[str]:
    number, held, length = 1, [""], 0
    for piece in decoded(path):
        first, *rest = piece.split("\n")
        held.append(first)
        length += len(first)
        if rest:
            yield "".join(held)
            yield from rest[:-1]
            number, held, length = number + len(rest), rest[-1:], len(rest[-1])
        if length > LONGEST_LINE:
            raise DataError(f"line {number} has no end", fix="write one JSON object a line", where=f"{path}:{number}")
    yield "".join(held)


def read_objects(path: Path, example: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (file:line, object) of a file of JSON lines; DataError, with `example` as fix, for any other line."""
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            said = "is nested too deeply" if isinstance(error, RecursionError) else f"is no JSON: {error}"
            raise DataError(f"line {number} {said}", fix=f"write one {example} a line", where=where) from None
        if not isinstance(found, dict):
            kind = "one JSON list" if line.lstrip().startswith("[") else f"a {type(found).__name__}"
            raise DataError(f"line {number} is {kind}, not an object", fix=f"write one {example} a line", where=where)
        yield where, found


def text_of(row: Mapping[str, Any], field: str, where: str) -> str:
    """Return a row's text; DataError with what is there instead."""
    fix = f'write one {{"{field}": "…"}} a line'
    if field not in row:
        fields = ", ".join(repr(name)[:60] for name in list(row)[:SHOWN]) or "no field at all"
        raise DataError(f"there is no field {field} (there is {fields})", fix=fix, where=where)
    text = row[field]
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        raise DataError(f"{field} is {kind}, not text", fix=fix, where=where)
    check_text(text, where)
    return text


def check_text(text: str, where: str) -> None:
    r"""Raise DataError for half a surrogate pair (JSON can say \ud800) or a NUL, which no tokenizer takes."""
    bad = next((character for character in text if character == "\0" or "\ud800" <= character <= "\udfff"), None)
    if bad is not None:
        raise DataError(f"the text holds the character U+{ord(bad):04X}", fix="take it out", where=where)
