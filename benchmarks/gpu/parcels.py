"""Files cut into parcels that fit a small door, and put together again to the very bytes. Plain files, no network.

A parcel is named NUMBER-PART; `list.json` travels with every load and says what belongs to which file, with hashes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

LIST = "list.json"
CHUNK = 1 << 22
Kind = Literal["wheel", "runtime", "weights", "text"]


@dataclass(frozen=True)
class Parcel:
    """A part of a file: `bytes` from `start` on."""

    name: str
    start: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Cargo:
    """A whole file and the parcels it is cut into."""

    name: str
    kind: Kind
    bytes: int
    sha256: str
    parcels: tuple[Parcel, ...]


class Damaged(Exception):
    """What arrived is not what was sent."""


def cut(path: Path, kind: Kind, number: int, size: int, out: Path) -> Cargo:
    """Write a file as parcels of at most `size` bytes into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    parcels, start = [], 0
    with path.open("rb") as file:
        for part, content in enumerate(iter(lambda: file.read(size), b"")):
            name = f"{number:02}-{part:02}"
            (out / name).write_bytes(content)
            parcels.append(Parcel(name, start, len(content), hashlib.sha256(content).hexdigest()))
            start += len(content)
    return Cargo(path.name, kind, start, digest(path), tuple(parcels))


def loads(cargo: Sequence[Cargo], size: int) -> Iterator[list[Parcel]]:
    """Fill one load after the other, in order; no load is larger than `size`."""
    load: list[Parcel] = []
    for parcel in (parcel for file in cargo for parcel in file.parcels):
        if load and sum(other.bytes for other in load) + parcel.bytes > size:
            yield load
            load = []
        load.append(parcel)
    if load:
        yield load


def write_list(cargo: Sequence[Cargo], folder: Path) -> None:
    """Write what belongs together."""
    (folder / LIST).write_text(json.dumps([asdict(file) for file in cargo], indent=1), encoding="utf-8")


def read_list(folder: Path) -> list[Cargo]:
    """Read what `write_list` wrote."""
    found = json.loads((folder / LIST).read_text(encoding="utf-8"))
    return [Cargo(**{**file, "parcels": tuple(Parcel(**parcel) for parcel in file["parcels"])}) for file in found]


def join(load: Path, store: Path) -> list[Path]:
    """Take in a load; return the files that are whole with it. Raises Damaged for a hash that is another."""
    waiting = store / "parcels"
    waiting.mkdir(parents=True, exist_ok=True)
    cargo = read_list(load)
    for parcel in (parcel for file in cargo for parcel in file.parcels if (load / parcel.name).exists()):
        if digest(load / parcel.name) != parcel.sha256:
            raise Damaged(f"{parcel.name} is not what was sent")
        shutil.copyfile(load / parcel.name, waiting / parcel.name)
    return [_whole(file, waiting, store) for file in cargo if _complete(file, waiting, store)]


def _complete(file: Cargo, waiting: Path, store: Path) -> bool:
    return not (store / file.name).exists() and all((waiting / parcel.name).exists() for parcel in file.parcels)


def _whole(file: Cargo, waiting: Path, store: Path) -> Path:
    partial = store / f"{file.name}.partial"
    with partial.open("wb") as out:
        for parcel in file.parcels:
            with (waiting / parcel.name).open("rb") as part:
                shutil.copyfileobj(part, out, CHUNK)
    if digest(partial) != file.sha256:
        raise Damaged(f"{file.name} is not what was sent")
    for parcel in file.parcels:
        (waiting / parcel.name).unlink()
    return partial.replace(store / file.name)


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()
