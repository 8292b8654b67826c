"""What the stages of a run share: the recipe, where files lie, the dense model and the texts, read when needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from soco_export.files.records import record_file
from soco_export.recipe.recipe import Recipe
from soco_export.run.folder.held import RunFolder
from soco_export.run.folder.manifest import stage_key
from soco_export.run.folder.names import Format
from soco_train.events import Notify

if TYPE_CHECKING:
    import torch

    from soco_train.data.corpus import Blocks
    from soco_train.modules.subject import Subject


class RunContext:
    """One run's shared state. `homes`: stages whose files are another run's (`plan` → its folder)."""

    def __init__(
        self, folder: RunFolder, format: Format, notify: Notify, homes: Mapping[str, RunFolder] | None = None
    ) -> None:
        self.folder = folder
        self.format = format
        self.notify = notify
        self.homes = homes or {}
        self._model: Any = None
        self._tokenizer: Any = None
        self._blocks: dict[str, Blocks] = {}
        self._model_hash = ""

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return self.folder.recipe

    def path(self, stage: str, name: str) -> Path:
        """Return where `stage` has put the file or folder `name`."""
        return self.homes.get(stage, self.folder).root / name

    def model(self) -> Any:
        """Return the dense model where it trains: in fp32 on the CPU, in train.factor_dtype on a GPU.

        Stages give it back as they got it. bfloat16 halves what stands beside the factors of a 7B model, and takes
        nothing from models that were published in it.
        """
        if self._model is None:
            self._model = self._load(self.recipe.train.factor_dtype)
        return self._model

    def take_model(self) -> Any:
        """Return the dense model where it runs, in fp32 as its files have it, for good: the caller may change it."""
        import torch

        model, self._model = self._model, None
        if model is None or torch.cuda.is_available():
            del model  # frees the GPU; its weights may have been rounded there
            model = self._load("float32")
        return model

    def take_stored_model(self) -> Any:
        """Return the dense model on the CPU as its files have it, mapped and hardly in memory, for good.

        The one that trains is let go.
        """
        from soco_export.model.load import open_model

        self._model = None
        return open_model(self.recipe)

    def _load(self, dtype: str) -> Any:
        """Read the dense model: onto the GPU in `dtype`, else in fp32 on the CPU, which computes in nothing less."""
        import torch

        from soco_export.model.load import load_model, load_onto

        if torch.cuda.is_available():
            return load_onto(self.recipe, "cuda", getattr(torch, dtype))
        return load_model(self.recipe)[0]

    def tokenizer(self) -> Any:
        """Return the model's tokenizer."""
        if self._tokenizer is None:
            from soco_export.model.load import load_tokenizer

            self._tokenizer = load_tokenizer(self.recipe)
        return self._tokenizer

    def subject(self, spectra: Path) -> Subject:
        """Return the dense model's participating layers with the calibration text; their spectra lie in `spectra`.

        What the spectra that are there leave out takes no part.
        """
        from soco_train import method

        tokens = self.blocks("calibration").tokens
        recipe = self.recipe
        return method.seen(method.open_subject(self.model(), recipe.layers, tokens, spectra, recipe.refine.values))

    def blocks(self, purpose: Literal["calibration", "evaluation"]) -> Blocks:
        """Return the token blocks for one purpose."""
        if purpose not in self._blocks:
            from soco_train.data.corpus import load_blocks

            settings = self.recipe.data if purpose == "calibration" else self.recipe.evaluation
            self._blocks[purpose] = load_blocks(self.tokenizer(), settings, purpose)
        return self._blocks[purpose]

    def calibration(self) -> torch.Tensor:
        """Return the tokens of the calibration text."""
        return self.blocks("calibration").tokens

    def sources(self) -> dict[str, Callable[[], str]]:
        """Return the hash of everything that comes from outside, by the name that stages read it under."""
        return {
            "model": self.model_hash,
            "calibration": lambda: self.blocks("calibration").fingerprint,
            "evaluation": lambda: self.blocks("evaluation").fingerprint,
        }

    def model_hash(self) -> str:
        """Return a hash over the model's configuration and weight files (random weights: over what makes them)."""
        if not self._model_hash:
            model = self.recipe.model
            files = {} if model.weights == "random" else self._weight_files()
            self._model_hash = stage_key([model.architecture, model.weights, self.recipe.train.seed], files)
        return self._model_hash

    def _weight_files(self) -> dict[str, str]:
        from soco_export.files.safetensors import weight_files
        from soco_export.model.source import fetch_folder

        found = {}
        known = self.folder.manifest.inputs
        source = fetch_folder(self.recipe)
        for path in sorted([source / "config.json", *weight_files(source)]):
            known[str(path)] = record_file(path, known.get(str(path)))
            found[path.name] = known[str(path)].sha256
        return found


def quiet_transformers() -> None:
    """Keep its own progress bars off the terminal: a stage says what it does through `notify`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
