"""From a request to a finished run folder: check everything first, hold the folder, bring its stages up to date."""

from __future__ import annotations

from collections.abc import Sequence

from soco_export.run.context import RunContext
from soco_export.run.folder import check_folder, open_folder
from soco_export.run.pipeline import Pipeline, Stage
from soco_export.run.request import Outcome, Request
from soco_export.run.stages import ARTEFACTS, TRAINING
from soco_train.events import Notify


def training(request: Request, notify: Notify) -> Outcome:
    """Run the stages up to the scores."""
    recipe = request.resolve()
    root = request.folder(recipe)
    _run(request, TRAINING, notify)
    return Outcome({"run": str(root), "scores": str(root / "scores.safetensors")}, str(root))


def whole_road(request: Request, notify: Notify) -> Outcome:
    """Run all stages."""
    recipe = request.resolve()
    root = request.folder(recipe)
    _run(request, (*TRAINING, *ARTEFACTS[request.format]), notify)
    return Outcome({"run": str(root)}, str(root))


def _run(request: Request, stages: Sequence[Stage[RunContext]], notify: Notify) -> None:
    recipe = request.resolve()
    root = request.folder(recipe)
    check_folder(root, recipe, request.fresh)
    with open_folder(root, recipe, request.argv, request.fresh) as folder:
        context = RunContext(folder, request.format, notify)
        Pipeline(folder, stages, context, context.sources(), notify=notify).run()
