"""One cell's work: spectrum → scores → plan → factors → perplexity, by the very calls that a run makes.

What cells have in common is made once and kept in `work`, by a hash over settings, inputs and training code: the
spectrum of a basis, and the scores of a training (which the cut with and without distillation share). Deleting `work`
costs time, nothing else.

The seed orders the batches, of scores and of distillation, and says where the calibration text begins: a closed-form
score is measured on the first few blocks, and which ones those are is chance too. Seed 0 is what a run does.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

import soco_train
from benchmarks.quality.cells import DENSE, Cell, CellResult, Perplexity, Task, saliency_tokens, training_tokens
from soco_export.checkpoint.layers import apply_factors, count_parameters, record_layers
from soco_export.checkpoint.writer import save_checkpoint
from soco_export.evaluate.decoders.decoder import TorchDecoder
from soco_export.evaluate.items import Item, load_items
from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.evaluate.tasks import TaskAnswers, answer_task, compare_answers
from soco_export.files.atomic import write_atomic
from soco_export.model.load import load_model
from soco_export.recipe.recipe import Recipe
from soco_export.run.folder.manifest import stage_key
from soco_train import method
from soco_train.data.corpus import Blocks, fingerprint, load_blocks
from soco_train.events import Notify, silent
from soco_train.modules.layers import replace_module
from soco_train.modules.subject import Session, Subject
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import plan_ranks
from soco_train.settings.data import DataSettings
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


@dataclass
class Laboratory:
    """A dense model with its texts, and what its cells share. `texts` and `tasks`: what to measure on, by name.

    `models`: where each cell's model is written, in a Hugging Face folder named as the cell's file; None: nowhere.
    """

    model: Any
    tokenizer: Any
    calibration: Blocks
    texts: Mapping[str, Blocks]
    work: Path
    tasks: Mapping[str, Sequence[Item]] = field(default_factory=dict)
    models: Path | None = None
    notify: Notify = field(default=silent)

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        texts: Mapping[str, DataSettings],
        work: Path,
        models: Path | None = None,
        notify: Notify = silent,
    ) -> Self:
        """Load the model, the texts and the tasks of `recipe`; `texts` are more of them to measure on, by name."""
        model, tokenizer = load_model(recipe)
        wanted = {"evaluation": recipe.evaluation, **texts}
        evaluation = {name: load_blocks(tokenizer, text, "evaluation") for name, text in wanted.items()}
        calibration = load_blocks(tokenizer, recipe.data, "calibration")
        tasks = {task.called: load_items(task) for task in recipe.validation.tasks}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(device).requires_grad_(False)
        return cls(model, tokenizer, calibration, evaluation, work, tasks, models, notify)

    def __post_init__(self) -> None:
        self._weights = weights_hash(self.model)
        self._code = code_hash()  # now: files may change under a long benchmark, what it has imported does not

    def inputs(self) -> dict[str, str]:
        """Return the hashes of what a cell depends on beside its settings."""
        evaluation = {f"text {name}": blocks.fingerprint for name, blocks in self.texts.items()}
        tasks = {f"task {name}": _digest(items) for name, items in self.tasks.items()}
        return {"weights": self._weights, "calibration": self.calibration.fingerprint, **evaluation, **tasks}

    def dense(self) -> dict[str, Perplexity]:
        """Return the dense model's perplexities; its answers to the tasks are kept for the comparisons."""
        return self._kept("perplexity", lambda: self._perplexities(DENSE), lambda found: Perplexity(**found))

    def dense_answers(self) -> dict[str, TaskAnswers]:
        """Return the dense model's answers by task."""
        return self._kept("answers", lambda: self._answers(DENSE), lambda found: TaskAnswers(**found))

    def keeps(self, cell: Cell) -> bool:
        """Tell whether a cell's model is there, where models are kept."""
        return self.models is None or (self.models / cell.stem(self.inputs()) / "config.json").exists()

    def measure(self, cell: Cell) -> CellResult:
        """Do the whole cell; raises what the calls below raise."""
        recipe, clock = cell.recipe, _Clock()
        with clock("spectrum"):
            subject = self._subject(recipe)
        tokens = rotated(self.calibration.tokens, recipe.train.seed, recipe.train.fisher_blocks)
        subject = replace(subject, tokens=tokens)
        with clock("scores"):
            scores = self._scores(recipe, subject)
        plan = plan_ranks(scores, recipe.plan)
        with clock("factors"):
            factors = self._factors(recipe, subject, scores, plan)
        with pruned(self.model, subject.linears, factors):
            with clock("evaluation"):
                size, perplexity = count_parameters(self.model), self._perplexities(cell.title)
                answers = self._answers(cell.title)
            if self.models is not None:
                save_checkpoint(self.model, self.tokenizer, self.models / cell.stem(self.inputs()))
        result = self._result(cell, plan, size, perplexity, clock.seconds)
        return replace(result, tasks=self._compared(answers)) if answers else result

    def _result(
        self, cell: Cell, plan: RankPlan, size: int, found: Mapping[str, Perplexity], seconds: Mapping[str, float]
    ) -> CellResult:
        return CellResult(
            method=cell.method,
            description=cell.recipe.description,
            keep=cell.keep,
            seed=cell.seed,
            key=cell.key(self.inputs()),
            storage=plan.storage,
            stored=plan.params_after,
            of=plan.params_before,
            model_parameters=size,
            training_tokens=training_tokens(cell.recipe),
            saliency_tokens=saliency_tokens(cell.recipe, len(self.calibration.tokens)),
            perplexity=found,
            seconds=seconds,
            code=self._code,
        )

    def _subject(self, recipe: Recipe) -> Subject:
        """Return the model's participating layers with their spectra, made from the text in its own order."""
        train = recipe.train
        key = [recipe.layers.model_dump(mode="json"), train.basis, train.ridge, train.statistics_blocks]
        folder = self.work / f"spectrum-{train.basis}-{self._key(key)}"
        subject = method.open_subject(self.model, recipe.layers, self.calibration.tokens, folder)
        subject = method.make_spectra(subject, train, self.notify)
        return subject

    def _scores(self, recipe: Recipe, subject: Subject) -> Scores:
        plan = recipe.plan if recipe.train.keep_params is None else recipe.plan.model_copy(update={"keep_params": None})
        key = self._key([recipe.model_dump(mode="json", include={"train", "layers"}), plan.model_dump()])
        path = self.work / f"scores-{key}.safetensors"
        if not path.exists():
            workspace = self.work / f"training-{key}"
            session = Session(workspace, self.notify, f"{fingerprint(subject.tokens)} {self._weights}")
            method.learn_scores(subject, recipe.train, recipe.plan, session).save(path)
            shutil.rmtree(workspace, ignore_errors=True)
        return Scores.load(path)

    def _factors(self, recipe: Recipe, subject: Subject, scores: Scores, plan: RankPlan) -> Factors:
        key = self._key(recipe.model_dump(mode="json", include={"train", "refine", "layers"}), recipe.plan.model_dump())
        workspace, teacher = self.work / f"distillation-{key}", self.work / f"teacher-{self._weights[:16]}"
        session = Session(workspace, self.notify, key, recipe.train.seed, teacher)
        # made here, where the clock runs
        factors = method.cut_factors(subject, scores, plan, recipe.refine, session).made()
        shutil.rmtree(workspace, ignore_errors=True)
        return factors

    def _perplexities(self, name: str) -> dict[str, Perplexity]:
        decoder = TorchDecoder(self.model, name)
        found = {text: measure_perplexity(decoder, blocks.tokens, self.notify) for text, blocks in self.texts.items()}
        return {text: Perplexity(f.value, f.loss, f.tokens) for text, f in found.items()}

    def _answers(self, name: str) -> dict[str, TaskAnswers]:
        decoder = TorchDecoder(self.model, name)
        return {
            task: answer_task(decoder, self.tokenizer, items, task, self.notify) for task, items in self.tasks.items()
        }

    def _compared(self, answers: Mapping[str, TaskAnswers]) -> dict[str, Task]:
        dense = self.dense_answers()
        found = {}
        for name, own in answers.items():
            comparison = compare_answers(dense[name], own)
            figures = comparison.compressed
            found[name] = Task(figures.items, figures.acc, figures.acc_norm, comparison.agreement)
        return found

    def _kept(
        self, what: str, measure: Callable[[], dict[str, T]], read: Callable[[dict[str, Any]], T]
    ) -> dict[str, T]:
        """Return what was measured of the dense model, from the file if it has been measured on the same texts."""
        path = self.work / f"dense-{what}-{stage_key([], self.inputs())[:16]}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps({name: asdict(entry) for name, entry in measure().items()}))
        return {name: read(entry) for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}

    def _key(self, *settings: Any) -> str:
        inputs = {"weights": self._weights, "calibration": self.calibration.fingerprint, "code": self._code}
        return stage_key(settings, inputs)[:16]


@contextmanager
def pruned(model: Any, linears: Mapping[str, Any], factors: Factors) -> Iterator[None]:
    """Within this context `model` is the pruned one; afterwards it is as it was."""
    apply_factors(model, factors)
    try:
        yield
    finally:
        for name in factors.layers:
            replace_module(model, name, linears[name])
        record_layers(model)


def rotated(tokens: torch.Tensor, seed: int, by: int) -> torch.Tensor:
    """Return the blocks [n, t] in the same order, begun `seed` × `by` blocks later."""
    return tokens.roll(-seed * by, dims=0)


def _digest(items: Sequence[Item]) -> str:
    return hashlib.sha256(repr(list(items)).encode()).hexdigest()


def weights_hash(model: Any) -> str:
    """Return the sha256 over the names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def code_hash() -> str:
    """Return a short hash over the code of soco_train."""
    files: Sequence[Path] = sorted(Path(str(soco_train.__file__)).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


class _Clock:
    """Seconds by name, of the blocks that ran under each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 2)
