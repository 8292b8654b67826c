"""Tensors on disk: whole or not there, and readable by whom the umask says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from soco_train.store import tensorfile
from soco_train.store.spectra import Spectrum, SpectrumStore
from soco_train.store.tensorfile import read_tensors, write_tensors


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_gives(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)}, {"kind": "a"})
        SpectrumStore(tmp_path / "spectrum").put("layer", Spectrum(torch.ones(2, 1), torch.ones(1, 2), torch.ones(1)))
    finally:
        os.umask(before)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert [path.name for path in files] == ["a.safetensors", "layer.safetensors"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}


def test_what_is_written_over_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for value in (1.0, 2.0):
        write_tensors(path, {"x": torch.full((3,), value)}, {"kind": "a", "value": value})
    tensors, header = read_tensors(path, "a")
    assert tensors["x"].tolist() == [2.0, 2.0, 2.0]
    assert header["value"] == 2.0
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_that_write_one_file_both_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, save = tmp_path / "a.safetensors", tensorfile.write_file

    def overtaken(*arguments, **named) -> None:
        save(*arguments, **named)
        with monkeypatch.context() as other:
            other.setattr(tensorfile, "write_file", save)
            other.setattr(os, "getpid", lambda: -1)
            write_tensors(path, {"x": torch.ones(2)}, {"kind": "test"})

    monkeypatch.setattr(tensorfile, "write_file", overtaken)
    write_tensors(path, {"x": torch.zeros(2)}, {"kind": "test"})
    assert torch.equal(read_tensors(path, "test")[0]["x"], torch.zeros(2))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
