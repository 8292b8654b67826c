"""Every write, rename and unlink of a run may fail or be its last: then the same command ends with the same files.

An audit hook sees what Python opens, renames and deletes, whoever calls it, and raises at the k-th time. A sample of k
is tried here; `SOCO_FAULTS=all` tries every one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import FEW_STEPS, Ran, contents, soco
from tests.support.models import VOCABULARY, make_tokenizer, small_llama

ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
SAMPLE = 2
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink"}
ARTEFACTS = ("scores.safetensors", "plan.json", "factors.safetensors", "hf/", "recipe.lock.yaml", "evidence/card.json")


class Death(BaseException):
    """The process is gone: nothing that it would still do at its end happens."""


@dataclass
class Shim:
    """Counts changes below `root`; at number `at` raises `error`, and after a death for ever."""

    root: str = ""
    at: int = -1
    error: BaseException | None = None
    count: int = 0
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.root or not self._changes(event, arguments):
            return
        self.count += 1
        self.seen.append(f"{event} {arguments[0]}")
        if self.error and (self.count == self.at or (self.count > self.at and isinstance(self.error, Death))):
            raise self.error

    def _changes(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            return writes and isinstance(path, str | os.PathLike) and str(path).startswith(self.root)
        return event in CHANGES and str(arguments[0]).startswith(self.root)


SHIM = Shim()
sys.addaudithook(lambda event, arguments: SHIM(event, arguments))


@pytest.fixture
def shim() -> Iterator[Shim]:
    SHIM.__init__()  # type: ignore[misc]
    yield SHIM
    SHIM.__init__()  # type: ignore[misc]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Ran]:
    """Return what compresses a random Llama of two layers into a folder."""
    model = tmp_path_factory.mktemp("faults") / "model"
    small_llama(vocab_size=VOCABULARY, max_position_embeddings=128).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    given = ("train-and-export", "--model", model, "--format", "hf", "-q", *FEW_STEPS)
    return lambda out: soco(*given, "--out", out)


def artefacts(root: Path) -> dict[str, str]:
    found = {name: value for name, value in contents(root).items() if name.startswith(ARTEFACTS)}
    return {name: hashlib.sha256(value).hexdigest() for name, value in found.items() if name != "hf/README.md"}


@pytest.fixture(scope="module")
def whole(command: Callable[[Path], Ran], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], int]:
    """Return the artefacts of an undisturbed run, and how many changes it made."""
    root = tmp_path_factory.mktemp("whole") / "run"
    SHIM.root = str(root)
    done = command(root)
    changes = SHIM.count
    SHIM.__init__()  # type: ignore[misc]
    assert done.code == 0, done.err
    return artefacts(root), changes


def moments(changes: int) -> list[int]:
    if os.environ.get("SOCO_FAULTS") == "all":
        return list(range(1, changes + 1))
    return sorted({random.choice((1, 2)), *random.sample(range(3, changes + 1), SAMPLE)})


def test_an_error_at_any_write_is_the_machine_s_and_the_run_goes_on(
    whole: tuple[dict[str, str], int], command: Callable[[Path], Ran], shim: Shim, tmp_path: Path
) -> None:
    expected, changes = whole
    for at in moments(changes):
        number, root = random.choice(ERRNOS), tmp_path / f"run{at}"
        shim.root, shim.at, shim.count = str(root), at, 0
        shim.error = OSError(number, os.strerror(number), f"{root}/it")
        shim.seen.clear()
        done = command(root)
        where = (at, errno.errorcode[number], shim.seen[at - 1], done.err)
        assert done.code in (0, 4), where  # 0: what failed was not needed, such as a partial file's removal
        assert "Traceback" not in done.err, where
        assert done.code == 0 or "fix:" in done.err, where
        shim.error = None
        again = command(root)
        assert again.code == 0, (*where, again.err)
        assert artefacts(root) == expected, where


def test_a_death_before_any_write_is_made_good_by_the_same_command(
    whole: tuple[dict[str, str], int], command: Callable[[Path], Ran], shim: Shim, tmp_path: Path
) -> None:
    expected, changes = whole
    for at in moments(changes):
        root = tmp_path / f"run{at}"
        shim.root, shim.at, shim.count, shim.error = str(root), at, 0, Death()
        shim.seen.clear()
        with pytest.raises(Death):
            command(root)
        where = (at, shim.seen[at - 1])
        assert (
            not (root / "hf" / "config.json").exists()
            or artefacts(root).items()
            >= {name: value for name, value in expected.items() if name.startswith("hf/")}.items()
        ), where  # never a folder that looks finished and is not
        shim.error = None
        again = command(root)
        assert again.code == 0, (*where, again.err)
        assert artefacts(root) == expected, where


@pytest.mark.parametrize(
    "kind", ["below a file", "below a dangling link", "a dangling link", "a circle of links", "too long"]
)
def test_an_output_that_cannot_be_is_refused_with_a_fix(
    kind: str, command: Callable[[Path], Ran], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "deep")
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    out = {
        "below a file": tmp_path / "file" / "run",
        "below a dangling link": tmp_path / "nowhere" / "run",
        "a dangling link": tmp_path / "nowhere",
        "a circle of links": tmp_path / "one" / "run",
        "too long": tmp_path / ("x" * 300),
    }[kind]
    before = contents(tmp_path)
    done = command(out)
    assert done.code in (2, 4), done.err
    assert "fix:" in done.err
    assert "Traceback" not in done.err
    assert contents(tmp_path) == before
    assert not (tmp_path / "gone").exists()
