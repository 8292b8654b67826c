"""What a recipe may set about the proof: how many blocks, how many decode steps, which provider, which tasks."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from soco_train.settings import Section

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


class ValidateSettings(Section):
    """The proof. `runtime`: what runs the ONNX folder in it (soco_export/runtimes/).

    `provider`: ONNX Runtime execution provider; `threads`: of the runtime, intra-op.
    """

    runtime: str = "ort"
    provider: str = CPU
    threads: int = Field(default=2, ge=1, le=1024)
    parity: ParitySettings = ParitySettings()
    tasks: tuple[TaskSettings, ...] = ()
