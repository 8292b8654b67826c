"""The verb `gate`: a finished run by its own gates and against a baseline, for a CI job; reads only."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from soco_export.report.baseline import changes, judge_against, parse_tolerances
from soco_export.report.gates import Verdict
from soco_export.report.words import verdict_terminal
from soco_export.run.folder.allowed import check_lock
from soco_export.run.folder.manifest import check_uncut
from soco_export.run.folder.results import load_results
from soco_export.run.request import Outcome
from soco_train.errors import ExitCode, RecipeError


def gate_run(run: Path, baseline: Path | None, tolerances: list[str] | None) -> Outcome:
    """Judge the results of `run`; a failed gate or a figure worse than the baseline's allows is exit code 3."""
    if tolerances and baseline is None:
        raise RecipeError(
            "a tolerance says how much worse than a baseline, and there is none",
            fix="give --baseline FILE, or no --tolerance",
            where="--tolerance",
        )
    results, allowed = load_results(run), parse_tolerances(tolerances)
    if run.is_dir():  # not measured again, but what lies there is what was measured, as far as a look can tell
        check_lock(run)
        check_uncut(run)
    own = results.verdicts
    against: tuple[Verdict, ...] = ()
    differences: list[str] = []
    if baseline is not None:
        before = load_results(baseline)
        against, differences = judge_against(results, before, allowed), changes(results, before)
    verdicts = (*own, *against)
    document = {
        "run": str(run),
        "baseline": None if baseline is None else str(baseline),
        "passed": not any(verdict.state == "failed" for verdict in verdicts),
        "verdicts": [asdict(verdict) for verdict in own],
        "against_baseline": [asdict(verdict) for verdict in against],
        "changed": differences,
    }
    failed = sum(verdict.state == "failed" for verdict in verdicts)
    head = f"FAILED: {failed} of {len(verdicts)} checks" if failed else f"PASSED: {len(verdicts)} checks, none failed"
    lines = [head if verdicts else "NOT JUDGED: the recipe sets no gate, and there is no baseline"]
    lines += [verdict_terminal(verdict) for verdict in own]
    if baseline is not None:
        lines += [f"against {baseline}:", *map(verdict_terminal, against)]
        lines += [f"changed since: {line}" for line in differences] or ["nothing else changed since"]
    undecided = tuple(f"{verdict.name}: {verdict.message}" for verdict in verdicts if verdict.inconclusive)
    return Outcome(document, "\n".join(lines), ExitCode.GATE if failed else ExitCode.OK, undecided)
