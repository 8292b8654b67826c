"""What a recipe may set about the proof: how many blocks, how many decode steps, which provider, which tasks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pydantic import Field, field_validator

from soco_train.settings.section import Section

CPU = "CPUExecutionProvider"


class ParitySettings(Section):
    """Parity is measured on `blocks` evaluation blocks: a prefill of `prompt` tokens, then `decode_steps` cached steps.

    Greedy continuations of `greedy_prompts` prompts, `greedy_tokens` tokens each, are compared token by token.
    """

    blocks: int = Field(default=4, ge=1)
    prompt: int = Field(default=128, ge=1, description="tokens of the prefill")
    decode_steps: int = Field(default=16, ge=1)
    greedy_prompts: int = Field(default=5, ge=0)
    greedy_tokens: int = Field(default=32, ge=1)


class TaskSettings(Section):
    """One local jsonl file of likelihood items; `limit` takes the first items only (None: all)."""

    path: Path
    name: str | None = Field(default=None, description="as it appears in the report; default: the file's name")
    limit: int | None = Field(default=None, ge=1)

    @property
    def called(self) -> str:
        """What results call the task."""
        return self.name or self.path.stem


class ValidateSettings(Section):
    """The proof. `runtime`: what runs the ONNX folder in it (soco_export/runtimes/).

    `provider`: ONNX Runtime execution provider; `threads`: of the runtime, intra-op.
    """

    runtime: str = "ort"
    provider: str = CPU
    threads: int = Field(default=2, ge=1, le=1024)
    parity: ParitySettings = ParitySettings()
    tasks: tuple[TaskSettings, ...] = ()

    @field_validator("tasks")
    @classmethod
    def _of_different_names(cls, tasks: tuple[TaskSettings, ...]) -> tuple[TaskSettings, ...]:
        """Refuse two tasks of one name: results tell of the last alone."""
        for name, count in Counter(task.called for task in tasks).items():
            if count > 1:
                raise ValueError(f"{count} tasks are called {name[:60]!r}; give each a name of its own")
        return tasks
