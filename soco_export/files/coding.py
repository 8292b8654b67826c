"""A block of a file as compressed bytes and back: zstandard, after the bytes of its numbers are parted by their place.

The first byte of a float32 is sign and exponent, which vary little from weight to weight; the last ones are noise.
Lying in turns they hide each other from an entropy coder; gathered by place, each plane has a table of its own.
Which width a block's numbers have is not asked of the file's format: the width that codes it shortest is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from soco_train.errors import DataError, MachineError
from soco_train.installed import install_command

if TYPE_CHECKING:
    import zstandard

BLOCK = 1 << 20  # bytes coded at once; a plane of it still is two of zstandard's own blocks, so its tables are its own
WIDTHS = (1, 2, 4)  # bytes of a number; 1: as the block lies there
LEVEL = 19  # a download is packed once; zstandard's highest level that needs no more memory to unpack
TRIAL = 3  # the level at which widths are compared: zstandard's default
DAMAGED = "download it again, or pack the folder again"


def load_zstandard() -> None:
    """Raise MachineError, with the command that installs it, if zstandard is not installed."""
    try:
        import zstandard  # noqa: F401
    except ImportError as error:
        raise MachineError(
            "pack and unpack need zstandard, which is not installed", fix=install_command("pack")
        ) from error


def encode(block: bytes) -> tuple[int, list[bytes]]:
    """Return (width, one zstandard frame a plane) of at most BLOCK bytes."""
    import zstandard

    quick, thorough = zstandard.ZstdCompressor(level=TRIAL), zstandard.ZstdCompressor(level=LEVEL)
    width = min(WIDTHS, key=lambda width: sum(map(len, _frames(block, width, quick))))
    return width, _frames(block, width, thorough)


def decode(frames: list[bytes], width: int, size: int) -> bytes:
    """Return the `size` bytes of a block; DataError if `frames` are not of exactly that many.

    No more than `size` bytes are ever made: what a frame says of itself is looked at first, and it is made so large
    whatever limit is given.
    """
    import zstandard

    lengths = plane_lengths(size, width)
    try:
        if [zstandard.get_frame_parameters(frame).content_size for frame in frames] != lengths:
            raise DataError("the archive has a block of another size than it says", fix=DAMAGED)
        reader = zstandard.ZstdDecompressor()
        planes = [reader.decompress(frame, allow_extra_data=False) for frame in frames]
    except zstandard.ZstdError as error:
        raise DataError(f"the archive has a block that is damaged: {error}", fix=DAMAGED) from error
    return _join(planes, width)


def _frames(block: bytes, width: int, compressor: zstandard.ZstdCompressor) -> list[bytes]:
    return [compressor.compress(plane) for plane in _planes(block, width)]


def plane_lengths(size: int, width: int) -> list[int]:
    """Return the bytes of each plane of a block of `size`: what is over after whole numbers is a plane of its own.

    DataError if there is no such block.
    """
    if width not in WIDTHS or not 0 < size <= BLOCK:
        raise DataError("the archive has a block of an unknown kind", fix=DAMAGED)
    whole, over = divmod(size, width)
    return [length for length in [*[whole] * width, over] if length]


def _planes(block: bytes, width: int) -> list[bytes]:
    whole = len(block) // width
    parted = np.frombuffer(block, np.uint8, whole * width).reshape(whole, width)
    return [plane for plane in (*(parted[:, i].tobytes() for i in range(width)), block[whole * width :]) if plane]


def _join(planes: list[bytes], width: int) -> bytes:
    if width == 1 or len(planes) < width:
        return b"".join(planes)
    parted = np.stack([np.frombuffer(plane, np.uint8) for plane in planes[:width]], axis=1)
    return parted.tobytes() + b"".join(planes[width:])
