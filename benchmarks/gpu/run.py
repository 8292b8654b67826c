"""The command line: sections in order, each in its box of time, one line and one JSON each; a short table last.

    python -m benchmarks.gpu --out benchmarks/gpu/results --minutes 12 --model-path models/smollm2-135m \
        --calibrate c4.jsonl wiki.train.raw --evaluate wikitext2=wiki.test.raw:2048

The same command goes on where it was stopped: what is settled is not measured again, unless --fresh. Every part is a
process of its own, so that its peak memory is its own and its failure nobody else's; at the end of its time it stops
between two steps, and GRACE seconds later it is ended. What a process prints is in OUT/log.txt.
"""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import psutil
import torch

from benchmarks.gpu.box import TimeBox, shares
from benchmarks.gpu.document import DONE, FAILED, SKIPPED, TIME, Document
from benchmarks.gpu.options import Options, device, parse
from benchmarks.gpu.sections import SECTIONS, Section, Skipped
from benchmarks.gpu.source import commit
from benchmarks.quality.run import machine
from benchmarks.scale.parts import TimeUp
from soco_export.preflight.doctor import versions

GRACE = 15.0
SHORTEST = 1.0  # seconds for which no process is started
Start = Callable[[Section, Options, str, float], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Do one part where one is named, else every section that is asked for."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = parse(words)
    if options.part:
        letter, _, part = options.part.partition(":")
        work(next(section for section in SECTIONS if section.letter == letter), options, part, options.seconds)
        return
    run(options, lambda section, _, part, seconds: start(words, section, options, part, seconds))


def run(options: Options, begin: Start = lambda *given: work(*given)) -> list[Document]:
    """Do what is asked for, `begin` each part that is not done, and return what the sections have."""
    asked = [section for section in SECTIONS if section.letter in options.sections]
    left, documents = 0.0, []
    for section, seconds in zip(asked, shares(options.minutes, [section.weight for section in asked]), strict=True):
        box = TimeBox(seconds + left)
        if options.fresh:
            document(section, options).path.unlink(missing_ok=True)
        _section(section, options, box, begin)
        left = box.left
        documents.append(document(section, options))
        print(f"{section.letter}: {_said(documents[-1])} ({box.seconds - left:.0f} s)", flush=True)
    for line in table(asked, documents):
        print(line)
    return documents


def _section(section: Section, options: Options, box: TimeBox, begin: Start) -> None:
    for part in section.parts(options):
        if document(section, options).over(part):
            continue
        if box.left < SHORTEST:
            document(section, options).end(part, TIME)
            continue
        begin(section, options, part, box.left)


def document(section: Section, options: Options) -> Document:
    """Open a section's file as it is now."""
    header = {
        "section": section.letter,
        "title": section.title,
        "device": device(),
        "machine": machine(),
        "versions": {**versions(), "cuda": torch.version.cuda},
        "commit": commit(),
    }
    return Document.open(options.out / f"{section.letter}.json", options.key(section.letter), header)


def start(words: Sequence[str], section: Section, options: Options, part: str, seconds: float) -> None:
    """Run one part in a process of its own, and end it where it does not end itself."""
    options.out.mkdir(parents=True, exist_ok=True)
    more = ["--part", f"{section.letter}:{part}", "--seconds", f"{seconds:g}"]
    with (options.out / "log.txt").open("a", encoding="utf-8") as log:
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu", *words, *more], stdout=log, stderr=log)
        try:
            code = process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            document(section, options).end(part, f"{TIME}; it did not stop by itself")
        else:
            if code:
                document(section, options).end(part, f"{FAILED}: exit code {code}, see log.txt")
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it started."""
    if process.poll() is None:
        own = psutil.Process(process.pid)
        for found in (*own.children(recursive=True), own):
            found.kill()
        process.wait()


def work(section: Section, options: Options, part: str, seconds: float) -> None:
    """Measure the pieces of one part that are not settled, until its time is over."""
    box, found = TimeBox(seconds), document(section, options)
    failed = []
    try:
        for name, measure in section.pieces(options, part, box):
            if found.settled(name):
                continue
            box.check()
            started = time.monotonic()
            figures = _measured(measure)
            found.add(name, {**figures, "seconds": round(time.monotonic() - started, 2)})
            failed += [name] if "error" in figures else []
            if "short" in figures:
                raise TimeUp
        found.end(part, f"{FAILED}: {', '.join(failed)}" if failed else DONE)
    except TimeUp:
        found.end(part, TIME)
    except Skipped as reason:
        found.end(part, f"{SKIPPED}: {reason}")


def _measured(measure: Callable[[], dict[str, object]]) -> dict[str, object]:
    """Return a piece's figures, or why there are none: the other pieces are worth their time all the same."""
    try:
        return dict(measure())
    except TimeUp:
        raise
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"}


def _said(found: Document) -> str:
    """Say in a line how far a section is."""
    good = sum(found.settled(name) for name in found.pieces)
    parts = [f"{part}: {how}" for part, how in found.ended.items() if how != DONE]
    return f"{found.header['title']}: {good} measured" + "".join(f"; {part}" for part in parts)


def table(sections: Sequence[Section], documents: Sequence[Document]) -> list[str]:
    """Return every piece in a line."""
    lines = [f"{device()}, torch {torch.__version__}"]
    for section, found in zip(sections, documents, strict=True):
        lines += [f"{section.letter}  {name:<34} {section.row(figures)}" for name, figures in found.pieces.items()]
    return lines
