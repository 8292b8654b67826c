"""Seeded SIGKILLs: a run that is killed again and again ends with the files of one that was not.

    python -m tests.whole.kills --kills 200 --seed 7

One process imports everything and forks. A child runs the command; at the file operation that the seed names, or some
milliseconds after it (in the middle of what a library computes or writes), it is killed. After each kill every folder
that is there must be whole, the old one or the new; in the end all files must be those of a run that nobody killed.
Every second run, by the seed the first or the second, starts over, with --fresh, on a finished run of another seed.
Exit code 1: something differed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.cli import contents, soco
from tests.support.fresh import seed_all
from tests.support.models import VOCABULARY, make_tokenizer, small_llama

CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod")
WHOLE = ("hf/", "onnx/", "onnx-dense/")
KEPT = (
    *WHOLE,
    "spectrum/",
    "scores.safetensors",
    "plan.json",
    "factors.safetensors",
    "recipe.lock.yaml",
    "evidence/card.json",
)
SETTINGS = (
    "train.steps=4",
    "train.checkpoint_every=1",
    "train.batch_tokens=128",
    "train.statistics_blocks=2",
    "data.blocks=4",
    "data.block=64",
    "evaluation.block=64",
    "validate.parity.prompt=16",
    "refine.distill.steps=2",
    "refine.distill.batch_tokens=128",
    "evaluation.blocks=1",
    "validate.parity.blocks=1",
    "validate.parity.greedy_prompts=1",
    "bench.enabled=false",
    "gates.max_ppl_ratio=null",
)
PATIENCE = 600  # seconds that one command may take
LONGEST = 0.3  # seconds after an operation
Files = dict[str, str]


@dataclass
class Figures:
    """What was done and found. `where`: operations at which a process was killed; `wrong`: what must not be."""

    kills: int = 0
    runs: int = 0
    again_fresh: int = 0
    where: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Kill as often as is asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", default="hf", choices=("hf", "onnx"))
    given = parser.parse_args(argv)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        found = campaign(Path(work), given.kills, given.seed, given.format)
    document = {**vars(found), "seed": given.seed, "format": given.format, "seconds": round(time.monotonic() - started)}
    sys.stdout.write(json.dumps(document, indent=1) + "\n")
    return int(bool(found.wrong))


def campaign(work: Path, kills: int, seed: int, format: str) -> Figures:
    """Kill runs in `work` until there were `kills`, and let each end; return what was found."""
    luck, found = random.Random(seed), Figures()
    make_dense(work / "model")
    operations, expected = undisturbed(work / "straight", format, 0)
    older: Files = {}
    first_is_fresh = luck.random() < 0.5
    while found.kills < kills:
        root, fresh = work / f"run{found.runs}", found.runs % 2 != first_is_fresh
        if fresh and not older:
            older = undisturbed(work / "older", format, 1)[1]
        if fresh:
            shutil.copytree(work / "older", root)
        states = [expected, older] if fresh else [expected]
        for _ in range(luck.randint(1, 6)):
            code, where = run(
                root, format, fresh, luck.randint(1, operations), luck.choice((0.0, luck.random() * LONGEST))
            )
            if code >= 0:
                break  # it was done before the moment came
            found.kills, found.where = found.kills + 1, found.where + Counter([where])
            found.wrong += [f"run {found.runs}, killed at {where}: {said}" for said in halves(root, states)]
        finish(root, format, fresh, expected, found)
        found.runs += 1
        shutil.rmtree(root)
    return found


def make_dense(folder: Path) -> None:
    """Write a random Llama of two layers."""
    seed_all("kills")
    small_llama(vocab_size=VOCABULARY, max_position_embeddings=128).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def finish(root: Path, format: str, fresh: bool, expected: Files, found: Figures) -> None:
    """Let the run end; the same command without --fresh goes on, unless it was killed before it had begun to."""
    code, said = run(root, format, fresh=False)
    if code == 2 and fresh:
        found.again_fresh += 1
        code, said = run(root, format, fresh=True)
    after = files(root)
    different = sorted(name for name in after.keys() | expected.keys() if after.get(name) != expected.get(name))
    if code or different:
        found.wrong.append(f"run {found.runs} ended with {code}, other files: {different[:5]}: {said}")
    left = [path.name for path in root.rglob("*") if "partial" in path.name]
    if left or any((root / "unfinished").iterdir()):
        found.wrong.append(f"run {found.runs} left {left} behind, or something in unfinished/")


def undisturbed(root: Path, format: str, seed: int) -> tuple[int, Files]:
    """Return how many operations a run makes that nobody kills, and its files."""
    code, said = run(root, format, seed=seed, at=sys.maxsize)
    assert code == 0, said
    return int(said), files(root)


def files(root: Path) -> Files:
    """Return the hash of each file that must be the same whatever happened; the card tells dates."""
    found = {name: data for name, data in contents(root).items() if name.startswith(KEPT) and name != "hf/README.md"}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def halves(root: Path, states: Sequence[Files]) -> list[str]:
    """Return the folders in `root` that are there and are whole in none of the `states`."""
    there = files(root)
    parts = [({name: value for name, value in there.items() if name.startswith(part)}, part) for part in WHOLE]
    return [
        f"{part} is neither the old one nor the new one"
        for held, part in parts
        if held and all(held != {n: v for n, v in state.items() if n.startswith(part)} for state in states)
    ]


def run(
    root: Path, format: str, fresh: bool = False, at: int = 0, delay: float = 0.0, seed: int = 0
) -> tuple[int, str]:
    """Run the command in a child that is killed at its operation `at`, `delay` seconds after (0: never, it ends).

    Returns (exit code, negative for a signal; where it was killed, how many operations it made, or what it said).
    """
    note = root.with_name(f"{root.name}.note")
    child = os.fork()
    if not child:
        os._exit(_command(root, format, fresh, seed, Watch(str(root), note, at, delay)))
    deadline = time.monotonic() + PATIENCE
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    said = note.read_text(encoding="utf-8") if note.exists() else ""
    note.unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(ended[1]), said


def _command(root: Path, format: str, fresh: bool, seed: int, watch: Watch) -> int:
    sys.addaudithook(watch)
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    flags = ("--seed", seed, "-q", *(("--fresh",) if fresh else ()))
    done = soco(
        "train-and-export", "--model", root.parent / "model", "--format", format, "--out", root, *settings, *flags
    )
    watch.root = ""
    watch.note.write_text(str(watch.count) if watch.at and not done.code else done.err[-500:], encoding="utf-8")
    return done.code


@dataclass
class Watch:
    """Counts operations below `root`, and ends the process `delay` seconds after number `at`."""

    root: str
    note: Path
    at: int
    delay: float
    count: int = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Look at one audit event."""
        if not self.root or event not in CHANGES or not str(arguments[0]).startswith(self.root):
            return
        self.count += 1
        if self.count == self.at:
            with os.fdopen(os.open(self.note, os.O_WRONLY | os.O_CREAT), "w", encoding="utf-8") as file:
                file.write(f"{event} {Path(str(arguments[0])).name}{' +' if self.delay else ''}")
            end: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            threading.Timer(self.delay, end).start() if self.delay else end()


if __name__ == "__main__":
    sys.exit(main())
