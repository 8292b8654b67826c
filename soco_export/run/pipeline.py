"""Stages as data, and the one loop that runs them: what is done and unchanged is skipped, with the reason said.

    stage = name · what it reads · which recipe keys matter · what it writes · the function that does it

A stage works in unfinished/<name>.<key>/ and its results are moved into place when they are whole. The key names the
settings and inputs, so a killed stage finds its own checkpoints there and never those of another task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from soco_export.files.atomic import remove
from soco_export.files.machine import is_out_of_memory, machine_limits
from soco_export.run.folder.held import RunFolder, workspaces
from soco_export.run.folder.manifest import NEW, StageRecord, digest, record_outputs, stage_key, why_stale
from soco_train import parallel
from soco_train.errors import MachineError, SocoError
from soco_train.events import Event, Notify, silent

Context = TypeVar("Context")


@dataclass(frozen=True)
class Stage(Generic[Context]):
    """One step of a run. `reads`: names of stages or of sources; `settings`: dotted recipe keys; `writes`: paths.

    `work(context, folder)` writes `writes` into `folder`; what else it leaves there is lost once the stage is done. A
    `cache` is made only when a stage that reads it runs, so it may be deleted to save disk. Where there are several
    processes all of them do the work of a `shared` one, and only the leading one writes (soco_train.parallel).
    `cedes`: paths inside of `writes` that another stage writes anew, whether or not it takes part this time.
    """

    name: str
    reads: tuple[str, ...]
    settings: tuple[str, ...]
    writes: tuple[str, ...]
    work: Callable[[Context, Path], None]
    cache: bool = False
    shared: bool = False
    cedes: tuple[str, ...] = ()


@dataclass
class Pipeline(Generic[Context]):
    """Runs stages in order. `sources` give the hash of what comes from outside; `homes` places single stages elsewhere.

    A run that re-cuts another one to a new size has its first stages in the folder of that other run.
    """

    folder: RunFolder
    stages: Sequence[Stage[Context]]
    context: Context
    sources: Mapping[str, Callable[[], str]]
    homes: Mapping[str, RunFolder] = field(default_factory=dict)
    notify: Notify = silent

    def run(self) -> None:
        """Bring every stage up to date; RecipeError first if that would replace what is not the run's own."""
        self._check_own()
        for stage in self.stages:
            reason = self.why(stage)
            if not reason:
                self.notify(Event(stage.name, 1, 1, {"": "up to date"}, "skipped"))
            elif not stage.cache or any(self.why(reader) for reader in self.stages if stage.name in reader.reads):
                self._execute(stage, reason)

        self.folder.drop_orphans()

    def _check_own(self) -> None:
        """Check the outputs of all stages that run, or that read from one that does and so may run."""
        running: set[str] = set()
        for stage in self.stages:
            if running.intersection(stage.reads) or self.why(stage):
                running.add(stage.name)
                home = self._home(stage)
                home.manifest.check_own(home.root, stage.writes)

    def why(self, stage: Stage[Context]) -> str:
        """Return why a stage must run, "" if it need not."""
        home = self._home(stage)
        return why_stale(home.root, home.manifest.stages.get(stage.name), self._keys(stage))

    def gives_key(self, stage: Stage[Context]) -> bool:
        """Tell whether settings and inputs are those under which the manifest has a stage done."""
        record = self._home(stage).manifest.stages[stage.name]
        return record.key in self._keys(stage)

    def adopt(self, stage: Stage[Context]) -> None:
        """Record what lies in the places of a stage as what it wrote; whoever calls knows that it did."""
        home = self._home(stage)
        inputs = {name: self._hash(name) for name in stage.reads}
        outputs = record_outputs(home.root, stage.writes, self._of_others(stage))
        record = StageRecord(status="done", key=self._key(stage), inputs=inputs, outputs=outputs)
        home.manifest.stages[stage.name] = record
        home.manifest.written.update(outputs)

    def _home(self, stage: Stage[Context]) -> RunFolder:
        return self.homes.get(stage.name, self.folder)

    def _keys(self, stage: Stage[Context]) -> tuple[str, str]:
        return self._key(stage), self._key(stage, whole=True)

    def _key(self, stage: Stage[Context], whole: bool = False) -> str:
        """Hash what a stage reads: of its settings what differs from the default, or, as runs once had it, all.

        A setting that is new since a run was made, and left at its default, leaves the run's stages done.
        """
        values = self._home(stage).recipe.model_dump(mode="json", by_alias=True, exclude_defaults=not whole)
        settings = {key: _value(values, key) for key in stage.settings}
        return stage_key(settings, {name: self._hash(name, whole) for name in stage.reads})

    def _hash(self, name: str, whole: bool = False) -> str:
        """Name the content of a source or of a stage's output; a cache is named by its key, for it may be gone."""
        if name in self.sources:
            return self.sources[name]()
        stage = next(stage for stage in self.stages if stage.name == name)
        if stage.cache:
            return self._key(stage, whole)
        return digest(self._home(stage).manifest.stages.get(name, StageRecord(status="running", key="")))

    def _execute(self, stage: Stage[Context], reason: str) -> None:
        home, key = self._home(stage), self._key(stage)
        inputs = {name: self._hash(name) for name in stage.reads}
        home.manifest.stages[stage.name] = StageRecord(status="running", key=key, inputs=inputs)
        home.save()
        self.notify(Event(stage.name, 0, 1, {"": "running" if reason == NEW else f"running: {reason}"}, "begun"))
        workspace = self._workspace(stage, key)
        started = time.monotonic()
        with _limits(stage.name, home.root):
            if stage.shared:
                parallel.call(f"{stage.name}\n{workspace}")
            stage.work(self.context, workspace)
        seconds = time.monotonic() - started
        done = StageRecord(status="done", key=key, inputs=inputs, seconds=round(seconds, 3))
        home.install(workspace, stage.name, done, stage.writes, self._of_others(stage))
        self.notify(Event(stage.name, 1, 1, {"": f"done in {seconds:.1f} s"}, "done"))

    def _of_others(self, stage: Stage[Context]) -> set[str]:
        """Return the paths inside of what a stage writes that another one has written since."""
        others = {name for other in self.stages if other is not stage for name in other.writes}
        return others | set(stage.cedes)

    def _workspace(self, stage: Stage[Context], key: str) -> Path:
        """Return the stage's own folder in unfinished/; those of its earlier tasks go."""
        home = self._home(stage)
        own = home.unfinished / f"{stage.name}.{key[:12]}"
        for other in workspaces(home.root, stage.name):
            if other != own:
                remove(other)
        for name in () if stage.cache else stage.writes:
            remove(own / name)
        own.mkdir(parents=True, exist_ok=True)
        for left in list(own.rglob("*.partial")):  # files and folders of a process that was killed as it wrote
            remove(left)
        return own


def assist(stages: Sequence[Stage[Context]], open_context: Callable[[], Context]) -> None:
    """Take part in the stages that the leading process calls to, until it lets go."""
    context: Context | None = None
    while message := parallel.called():
        name, _, workspace = message.partition("\n")
        context = context or open_context()
        next(stage for stage in stages if stage.name == name).work(context, Path(workspace))


@contextmanager
def _limits(stage: str, root: Path) -> Iterator[None]:
    """Turn what disk or memory refuse, from whichever library, into MachineError; what is done stays done."""
    try:
        with machine_limits(stage, root):
            yield
    except SocoError:
        raise
    except Exception as error:  # ONNX Runtime's own are of no common type
        if not is_out_of_memory(error):
            raise
        fix = "lower train.batch_tokens or data.block, or use a larger machine; --dry-run shows what each phase needs"
        raise MachineError(f"out of memory ({stage}): {str(error)[:200]}", fix=fix, where=str(root)) from error


def _value(values: Mapping[str, Any], key: str) -> Any:
    """Return a dotted key's value, None where it is left at its default."""
    found: Any = values
    for part in key.split("."):
        found = None if found is None else found.get(part)
    return found
