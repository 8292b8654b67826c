"""Start every server that is installed here, compare its greedy tokens with PyTorch's low-rank model, then load one.

    python -m benchmarks.servers --run runs/demo                       # agreement, then 16 clients on the OpenAI server
    python -m benchmarks.servers --run runs/demo --weights int8,int4   # and perplexity of quantised exports

RUN is a finished run: hf/ is what PyTorch loads, onnx/ what the servers load (fp32). Everything stays on the loopback
interface. Exit code 1: a server disagrees, failed, or made an error under load. A server that is not installed is a row
that says what it would need.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.servers.contenders import CONTENDERS, Absent, Task
from benchmarks.servers.load import Figures, load_test
from benchmarks.servers.prompts import PROMPTS
from benchmarks.servers.quantised import TOLERANCE, Comparison, compare
from benchmarks.servers.reference import TIE, Reference, Verdict

Say = Callable[[str], None]
COLUMNS = "| server | prompts that agree | tokens compared | tied (largest gap) | seconds | |\n" + "|---" * 6 + "|"


@dataclass(frozen=True)
class Row:
    """One server: verdicts in the order of the prompts; `note` says why there are none."""

    server: str
    verdicts: list[Verdict]
    seconds: float = 0.0
    note: str = ""
    failed: bool = False

    def line(self) -> str:
        """Return the row of the table."""
        if not self.verdicts:
            return f"| {self.server} | {'**failed**' if self.failed else 'not installed'} | | | | {self.note} |"
        good = [verdict for verdict in self.verdicts if not verdict.why]
        ties = [verdict.gap for verdict in good if verdict.gap]
        tied = f"{len(ties)} ({max(ties):.1e})" if ties else "0"
        tokens = sum(verdict.tokens for verdict in self.verdicts)
        agree = f"{len(good)}/{len(self.verdicts)}"
        return f"| {self.server} | {agree} | {tokens} | {tied} | {self.seconds:.0f} | {self.note} |"


def main(argv: Sequence[str] | None = None, say: Say = print) -> int:
    """Run the checks that are asked for; return the exit code."""
    given = parse(argv)
    rows = check(given, say)
    quantised = [compare_one(given, weights, say) for weights in given.weights.split(",") if weights]
    loads = load(given, say)
    if given.json:
        results = {
            name: [asdict(entry) for entry in found]
            for name, found in (("servers", rows), ("quantised", quantised), ("load", loads))
        }
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    bad = any(row.failed for row in rows) or any(abs(found.ratio - 1) > TOLERANCE for found in quantised)
    bad = bad or any(figures.errors for figures in loads)
    say("FAILED" if bad else "ok")
    return int(bad)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.servers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a finished run")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="servers, by the names of the table; '' for none")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--weights", default="", help="int8,int4: perplexity of quantised exports too")
    parser.add_argument("--blocks", type=int, default=8, help="of 256 tokens, for perplexity")
    parser.add_argument("--clients", type=int, default=16, help="of the load test; 0 leaves it out")
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--load-tokens", type=int, default=32, help="of each answer in the load test")
    parser.add_argument("--optimum", type=Path, default=Task.optimum, help="a Python that has optimum")
    parser.add_argument("--triton", type=Path, default=Task.triton, help="where nvidia-pytriton is installed")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args(argv)


def check(given: argparse.Namespace, say: Say) -> list[Row]:
    """Compare every server with PyTorch, printing the table row by row."""
    names = [name for name in given.only.split(",") if name]
    if not names:
        return []
    prompts = PROMPTS[: given.prompts]
    reference = Reference(given.run, prompts, given.tokens)
    task = Task(given.run / "onnx", prompts, given.tokens, given.optimum, given.triton)
    say(f"{len(prompts)} prompts × {given.tokens} tokens, {given.run / 'onnx'} against {given.run / 'hf'} in PyTorch\n")
    say(COLUMNS)
    rows = []
    for name in names:
        rows.append(_row(name, task, reference))
        say(rows[-1].line())
    for row in rows:
        for number, verdict in enumerate(row.verdicts):
            if verdict.why:
                say(f"{row.server}, prompt {number + 1} {prompts[number][:40]!r}: {verdict.why}")
    say(f"tied: with another token than PyTorch's, whose logit in PyTorch is less than {TIE} below the largest\n")
    return rows


def _row(name: str, task: Task, reference: Reference) -> Row:
    start = time.monotonic()
    try:
        answers = CONTENDERS[name](task)
    except Absent as absent:
        return Row(name, [], note=str(absent))
    except (RuntimeError, OSError) as error:
        return Row(name, [], note=str(error).strip().replace("\n", " ")[-300:], failed=True)
    verdicts = [reference.judge(number, answer) for number, answer in enumerate(answers)]
    wrong = len(verdicts) != len(task.prompts) or any(verdict.why for verdict in verdicts)
    return Row(name, verdicts, time.monotonic() - start, failed=wrong)


def compare_one(given: argparse.Namespace, weights: str, say: Say) -> Comparison:
    """Measure one quantised export."""
    with tempfile.TemporaryDirectory() as scratch:
        found = compare(given.run, weights, Path(scratch), given.blocks)  # type: ignore[arg-type]
    say(
        f"{weights}: perplexity {found.exported:.3f}, PyTorch with rounded weights {found.rounded:.3f} "
        f"(ratio {found.ratio:.4f}, at most {1 + TOLERANCE}), in fp32 {found.plain:.3f}"
    )
    return found


def load(given: argparse.Namespace, say: Say) -> list[Figures]:
    """Run the load test, if its server is here."""
    if not given.clients:
        return []
    absent = [name for name in ("fastapi", "uvicorn", "onnxruntime_genai") if find_spec(name) is None]
    if absent:
        say(f"load test left out: {', '.join(absent)} missing, pip install '.[serve]'")
        return []
    loads = load_test(given.run / "onnx", given.clients, given.requests, given.load_tokens, PROMPTS)
    for figures in loads:
        say(figures.line())
        for error in figures.errors[:5]:
            say(f"  error: {error}")
    return loads
