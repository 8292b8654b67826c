"""What an operating system refuses becomes a sentence with a fix, whichever library passes it on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from soco_export.files.machine import SAYINGS, machine_limits
from soco_train.errors import DataError, ExitCode, MachineError


@pytest.mark.parametrize("number", [*SAYINGS, errno.ETXTBSY])
def test_every_errno_is_a_machine_error_that_names_the_file(number: int, tmp_path: Path) -> None:
    with pytest.raises(MachineError) as found, machine_limits("train", tmp_path):
        raise OSError(number, os.strerror(number), "some/file")
    assert (found.value.where, found.value.code) == ("some/file", ExitCode.MACHINE)
    assert "(train)" in found.value.message
    assert found.value.fix


@pytest.mark.parametrize(
    "text", ["I/O error: No space left on device (os error 28)", "cannot write: No space left on device"]
)
def test_a_library_that_gives_words_only_is_understood(text: str, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="the disk is full") as found, machine_limits("hf", tmp_path):
        raise RuntimeError(text)
    assert found.value.where == str(tmp_path)


@pytest.mark.parametrize(
    "error", [ValueError("of ours"), DataError("No space left on device", fix="-"), OSError("words")]
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as found, machine_limits():
        raise error
    assert found.value is error
