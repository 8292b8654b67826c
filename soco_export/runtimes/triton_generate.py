"""Triton's Python backend reads this: text in, greedy text and token ids out; every step is a call of model `decoder`.

The triton layout copies it to `triton/generate/1/model.py`. It runs inside Triton, which brings
triton_python_backend_utils; numpy and tokenizers must be installed there; nothing of this package is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton
from tokenizers import Tokenizer


class TritonPythonModel:
    """The name and the methods that Triton looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer, and the decoder's form from the parameter that the layout wrote."""
        self.tokenizer = Tokenizer.from_file(str(Path(__file__).with_name("tokenizer.json")))
        form = json.loads(json.loads(args["model_config"])["parameters"]["decoder"]["string_value"])
        self.inputs, self.ends = form["inputs"], set(form["ends"])
        kind = triton.triton_string_to_numpy(form["type"])
        self.empty = {name: np.zeros(shape, kind) for name, shape in form["empty"].items()}
        self.wanted = ["logits", *(name.replace("past_key_values", "present") for name in self.empty)]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; one that fails spoils no other."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        text, count = (triton.get_input_tensor_by_name(request, name) for name in ("text_input", "max_tokens"))
        try:
            ids = self._tokens(text)
            found = self._generate(ids, int(count.as_numpy().item()))
        # ValueError: the text has no token or is not UTF-8, or an input does not hold exactly one value.
        except (triton.TritonModelException, ValueError) as error:
            return triton.InferenceResponse(error=triton.TritonError(str(error)))
        said = np.array([self.tokenizer.decode(found).encode("utf-8")], dtype=object)
        answer = {"text_output": said, "prompt_token_ids": np.array(ids), "token_ids": np.array(found, np.int64)}
        return triton.InferenceResponse([triton.Tensor(name, value) for name, value in answer.items()])

    def _tokens(self, text: Any) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text.as_numpy().item().decode("utf-8")).ids
        if not ids:
            raise ValueError("text_input holds no token to begin with")
        return ids

    def _generate(self, ids: list[int], count: int) -> list[int]:
        cache = self.empty
        found: list[int] = []
        new, seen = np.array([ids], np.int64), 0
        while len(found) < count and not self.ends.intersection(found[-1:]):
            total = seen + new.shape[1]
            feeds = {
                "input_ids": new,
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(seen, total, dtype=np.int64)[None],
            }
            logits, *present = self._step({name: feeds[name] for name in self.inputs} | cache)
            cache = dict(zip(self.empty, present, strict=True))
            found.append(int(logits[0, -1].argmax()))
            new, seen = np.array([found[-1:]], np.int64), total
        return found

    def _step(self, feeds: dict[str, Any]) -> list[Any]:
        request = triton.InferenceRequest(
            model_name="decoder",
            requested_output_names=self.wanted,
            inputs=[triton.Tensor(name, value) for name, value in feeds.items()],
            # The next step and the choice of the token read them here, wherever the decoder runs.
            preferred_memory=triton.PreferredMemory(triton.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise triton.TritonModelException(response.error().message())
        return [triton.get_output_tensor_by_name(response, name).as_numpy() for name in self.wanted]
