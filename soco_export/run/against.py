"""The verb `gate`: a finished run by its own gates and against a baseline, for a CI job; reads only."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from soco_export.recipe.recipe import validated
from soco_export.report.baseline import changes, judge_against, parse_tolerances
from soco_export.report.gates import Verdict
from soco_export.report.schema import Results
from soco_export.report.words import verdict_terminal
from soco_export.run.folder.allowed import check_lock
from soco_export.run.folder.manifest import check_uncut
from soco_export.run.folder.results import load_results
from soco_export.run.request import Outcome
from soco_export.run.stages.report import applicable
from soco_train.errors import DataError, ExitCode, RecipeError

# Sections that no verdict depends on: another version, or an extension, may have settings there that are unknown here.
_NOT_JUDGING = frozenset({"description", "layers", "latency", "train", "refine", "validate", "bench"})


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
    check_verdicts(results, run)
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


def check_verdicts(results: Results, where: Path) -> None:
    """Raise DataError for verdicts that are not those of the figures and the recipe beside them: one was edited."""
    judging = {key: value for key, value in results.recipe.items() if key not in _NOT_JUDGING}
    try:
        gates = applicable(validated(judging, {}), results.format)
    except RecipeError as error:
        raise DataError(
            f"these results have no recipe that they could be judged by: {error.message}",
            fix="give results that this version wrote: the run's own, or those of the same command again",
            where=str(where),
        ) from error
    told, found = (
        {verdict.name: _said(verdict) for verdict in verdicts}
        for verdicts in (results.verdicts, results.judged(gates).verdicts)
    )
    if wrong := next((name for name in {**told, **found} if told.get(name) != found.get(name)), None):
        raise DataError(
            f"the verdict on {wrong} is {told.get(wrong, 'none')}, and figures and recipe beside it give "
            f"{found.get(wrong, 'none')}",
            fix="put back what was written; by other gates a run is judged with soco-export report RUN --set",
            where=str(where),
        )


def _said(verdict: Verdict) -> str:
    return f"{verdict.state} ({verdict.figure} at a threshold of {verdict.threshold})"
