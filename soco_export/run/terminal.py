"""What a finished run says on stdout: the verdict first, then sizes, quality, speed, gates, and where to read on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from soco_export.files.records import folder_bytes
from soco_export.files.text import folded, human_bytes, one_line
from soco_export.report.rendering import ratio_text
from soco_export.report.schema import RESULTS_FILE, Results
from soco_export.report.sentences import verdict_sentence
from soco_export.report.words import verdict_terminal
from soco_export.run.folder.manifest import places_elsewhere
from soco_export.run.request import Outcome
from soco_train.errors import ExitCode
from soco_train.plan.rank_plan import RankPlan


def run_outcome(root: Path) -> Outcome:
    """Return the outcome of the run in `root` from its results.json; a failed gate is exit code 3."""
    results = Results.load(root / RESULTS_FILE)
    document = {"run": str(root), **json.loads(results.model_dump_json())}
    code = ExitCode.OK if results.passed else ExitCode.GATE
    return Outcome(document, "\n".join(map(folded, _lines(results, root))), code, results.undecided)


def _lines(results: Results, root: Path) -> Iterator[str]:
    yield verdict_sentence(results)
    plan = RankPlan.load(places_elsewhere(root).get("plan", root) / "plan.json")
    yield plan.describe(results.sizes.params_before)
    yield from _quality(results)
    yield from _cost(results)
    yield from (f"note: {one_line(note)}" for note in results.notes)
    for verdict in results.verdicts:
        yield verdict_terminal(verdict)
    if (root / "spectrum").is_dir():
        spare = folder_bytes(root / "spectrum") / 1e6
        yield f"other sizes, same scores (reads spectrum/, {spare:,.1f} MB):"
        yield f"  soco-export export {root} --keep-params …"
    yield f"{root / 'report.md'} · {root / 'report.html'} · {root / RESULTS_FILE}"


def _quality(results: Results) -> Iterator[str]:
    found = results.perplexity
    if found:
        forms = {"dense": found.dense, "low rank": found.low_rank, "ONNX": found.onnx}
        parts = [f"{form} {figures.value:.4g}" for form, figures in forms.items() if figures]
        ratio = ratio_text(found.ratio, found.ratio_interval)
        yield f"perplexity: {' · '.join(parts)} ({ratio} dense, {one_line(found.text)})"
    for step, parity in (("dense → low rank", results.parity.compression), ("export", results.parity.export)):
        if parity:
            same = min(parity.prefill.token_agreement, parity.decode.token_agreement)
            worst = max(parity.prefill.mean_kl, parity.decode.mean_kl)
            yield f"{step}: KL {worst:.3g} nats, {same:.1%} of tokens agree"


def _cost(results: Results) -> Iterator[str]:
    if results.latency:
        ratios = [
            f"{name} {work.speedup.value:.2f}× ({work.speedup.low:.2f}–{work.speedup.high:.2f})"
            for name, work in results.latency.workloads.items()
        ]
        yield f"speed, dense ONNX / this: {' · '.join(ratios)}"
    sizes = [f"{name} {human_bytes(count)}" for name, count in results.sizes.bytes.items()]
    yield f"on disk: {' · '.join(sizes)}"
