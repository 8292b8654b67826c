"""ONNX Runtime's MoE and QMoE beside the plain operators that an export has for a mixture: error and time.

    python -m benchmarks.mixture_operators --out benchmarks/results/mixture-operators.json

Both get the same tokens, gated experts with random weights and a softmax router; int8 and int4 are in symmetric blocks
of 32. An error is the largest one relative to the largest output, against float64 on the weights as they are rounded:
what is left is what the operator's own arithmetic loses. Times are CPU time of one thread, the least of several runs
in turns. Low-rank experts are two products and have no place in these operators.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from soco_export.onnx.describe.architecture import Experts, Mlp
from soco_export.onnx.emit.experts import emit_experts
from soco_export.onnx.emit.linear import Linears
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.source import StoredForm
from soco_export.onnx.write.graph import CONTRIB, DataFile, Graph

Array = np.ndarray[Any, np.dtype[Any]]
BLOCK = 32
TYPES = {"fp32": ("same", 0), "int8": ("int8", 8), "int4": ("int4", 4)}
FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class Case:
    """Sizes of a mixture: experts, those chosen for a token, hidden numbers and those inside an expert."""

    experts: int = 32
    chosen: int = 4
    hidden: int = 512
    inner: int = 1024
    normalised: bool = True


CASES = (Case(8, 2, 64, 96), Case())


class Weights(dict[str, Array]):
    """Tensors by name, as the graph builder reads them (soco_export/onnx/source.py)."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: array.shape for name, array in self.items()}

    def form(self, name: str) -> StoredForm:
        """Say that every Linear is dense."""
        return StoredForm()

    def read(self, name: str) -> Array:
        """Return a tensor."""
        return self[name]

    def levels(self, name: str) -> None:
        """Say that nothing is rounded yet."""


def random_weights(case: Case, random: np.random.Generator) -> Weights:
    """Return a router and gated experts whose outputs have the size of their inputs."""
    sizes = {"gate_proj": (case.inner, case.hidden), "up_proj": (case.inner, case.hidden)}
    sizes |= {"down_proj": (case.hidden, case.inner)}
    shapes = {f"m.experts.{e}.{part}.weight": s for e in range(case.experts) for part, s in sizes.items()}
    shapes["m.router.weight"] = (case.experts, case.hidden)
    return Weights({n: (random.standard_normal(s) / s[1] ** 0.5).astype(np.float32) for n, s in shapes.items()})


def stacks(case: Case, weights: Weights) -> tuple[Array, Array]:
    """Return [E, 2·inner, hidden], rows of gate and up in turn, and [E, hidden, inner]."""
    gate, up, down = (
        np.stack([weights[f"m.experts.{e}.{part}_proj.weight"] for e in range(case.experts)])
        for part in ("gate", "up", "down")
    )
    return np.stack((gate, up), 2).reshape(case.experts, 2 * case.inner, case.hidden), down


def rounded(stack: Array, bits: int) -> tuple[Array, Array, Array]:
    """Return (levels as QMoE has them, scales, the numbers that they are) of symmetric blocks."""
    middle = 1 << bits - 1
    blocks = stack.reshape(*stack.shape[:-1], -1, BLOCK)
    scales = (np.abs(blocks).max(-1) / (middle - 1)).astype(np.float32)
    levels = np.clip(np.rint(blocks / scales[..., None]), -middle, middle - 1)
    numbers = (levels * scales[..., None]).reshape(stack.shape)
    packed = (levels + middle).astype(np.uint8).reshape(stack.shape)
    return packed if bits == 8 else packed[..., ::2] | packed[..., 1::2] << 4, scales, numbers


def reference(case: Case, stored: tuple[Array, Array], x: Array, scores: Array) -> Array:
    """Return what the mixture computes, in float64."""
    (both, down), shares = (part.astype(np.float64) for part in stored), np.exp(scores.astype(np.float64))
    shares /= shares.sum(-1, keepdims=True)
    found = np.zeros(x.shape)
    for token, share in enumerate(shares):
        chosen = np.argsort(-share)[: case.chosen]
        total = share[chosen].sum() if case.normalised else 1.0
        for expert in chosen:
            gate, up = both[expert][::2] @ x[token], both[expert][1::2] @ x[token]
            found[token] += share[expert] / total * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return found


def opened(graph: Graph, data: DataFile) -> onnxruntime.InferenceSession:
    """Return a session of one thread for the finished graph, whose weights are in `data`."""
    data.close()
    path = data.path.with_suffix("")
    ir.save(graph.model("benchmark"), path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def plain(case: Case, weights: Weights, kind: str, folder: Path) -> onnxruntime.InferenceSession:
    """Return the mixture as an export has it."""
    data = DataFile(folder / f"plain-{kind}.onnx.data")
    graph = Graph(data, FLOAT)
    each = Mlp(case.inner, ("gate_proj", "up_proj"), "down_proj", "silu", gated=True)
    experts = Experts(case.experts, case.chosen, "experts.{}", each, "router", normalised=case.normalised)
    settings = ExportSettings(weights=TYPES[kind][0], quantize={"block": BLOCK})  # type: ignore[arg-type]
    x = graph.input("x", FLOAT, [1, "t", case.hidden])
    graph.output(emit_experts(Linears(graph, weights, settings), experts, x, "m"), "y", FLOAT, [1, "t", case.hidden])
    return opened(graph, data)


def fused(
    case: Case, stored: Mapping[str, Array], bits: int, folder: Path, fusion: int = 1
) -> onnxruntime.InferenceSession:
    """Return MoE (`bits` 0) or QMoE with the arrays `stored` in order; `fusion`: rows in turn (1) or in halves (2)."""
    data = DataFile(folder / f"fused-{bits}.onnx.data")
    graph = Graph(data, FLOAT)
    x, scores = graph.input("x", FLOAT, ["t", case.hidden]), graph.input("scores", FLOAT, ["t", case.experts])
    first, *rest = (graph.stored(name, array) for name, array in stored.items())
    inputs = [first, None, *rest] if not bits else [first, rest[0], None, *rest[1:]]  # no biases
    how = {"activation_type": "swiglu", "swiglu_fusion": fusion, "activation_alpha": 1.0, "activation_beta": 0.0}
    how |= {"k": case.chosen, "normalize_routing_weights": int(case.normalised)}
    how |= {"expert_weight_bits": bits, "block_size": BLOCK} if bits else {}
    y = graph.op(f"{CONTRIB}::{'QMoE' if bits else 'MoE'}", x, scores, *inputs, **how)
    graph.output(y, "y", FLOAT, ["t", case.hidden])
    return opened(graph, data)


def operators(case: Case, weights: Weights, kind: str, folder: Path) -> tuple[Any, tuple[Array, Array]]:
    """Return (session of MoE or QMoE, the two stacks with the numbers that it stores)."""
    both, down = stacks(case, weights)
    bits = TYPES[kind][1]
    if not bits:
        return fused(case, {"both": both, "down": down}, 0, folder), (both, down)
    (q1, s1, n1), (q2, s2, n2) = rounded(both, bits), rounded(down, bits)
    return fused(case, {"both": q1, "both_scales": s1, "down": q2, "down_scales": s2}, bits, folder), (n1, n2)


def error(case: Case, kind: str, folder: Path, random: np.random.Generator, tokens: int = 19) -> float:
    """Return the largest error of MoE or QMoE, relative to the largest output."""
    weights = random_weights(case, random)
    session, stored = operators(case, weights, kind, folder)
    x = random.standard_normal((tokens, case.hidden)).astype(np.float32)
    scores = x @ weights["m.router.weight"].T
    expected = reference(case, stored, x, scores)
    return float(np.abs(session.run(None, {"x": x, "scores": scores})[0] - expected).max() / np.abs(expected).max())


def least(runs: int, works: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the least CPU milliseconds of each, in turns, after one run each."""
    found = dict.fromkeys(works, float("inf"))
    for turn in range(runs + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            found[name] = min(found[name], 1e3 * (time.process_time() - start)) if turn else found[name]
    return found


def times(case: Case, kind: str, folder: Path, random: np.random.Generator, runs: int) -> list[dict[str, Any]]:
    """Return the milliseconds of both for a step of one token and of eight, and for a prompt of 128."""
    weights = random_weights(case, random)
    ours, (theirs, _) = plain(case, weights, kind, folder), operators(case, weights, kind, folder)
    return [{"tokens": tokens, **_turns((ours, theirs), case, weights, tokens, random, runs)} for tokens in (1, 8, 128)]


def _turns(
    sessions: tuple[Any, Any], case: Case, weights: Weights, tokens: int, random: np.random.Generator, runs: int
) -> dict[str, float]:
    ours, theirs = sessions
    x = random.standard_normal((tokens, case.hidden)).astype(np.float32)
    feed = {"x": x, "scores": x @ weights["m.router.weight"].T}
    works = {"plain": lambda: ours.run(None, {"x": x[None]}), "operator": lambda: theirs.run(None, feed)}
    return {name: round(milliseconds, 4) for name, milliseconds in least(runs, works).items()}


def measure(case: Case, runs: int, random: np.random.Generator) -> dict[str, Any]:
    """Return errors and times of one mixture in all types."""
    found: dict[str, Any] = {"case": asdict(case), "error": {}, "milliseconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        for kind in TYPES:
            for name, normalised in (("normalised", True), ("as they are", False)):
                one = replace(case, normalised=normalised)
                found["error"].setdefault(name, {})[kind] = error(one, kind, Path(folder), random)
            found["milliseconds"][kind] = times(case, kind, Path(folder), random, runs)
            print(kind, found["error"], found["milliseconds"][kind], flush=True)
    return found


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    rows = [measure(case, arguments.runs, np.random.default_rng(0)) for case in CASES]
    result = {"onnxruntime": onnxruntime.__version__, "threads": 1, "block": BLOCK, "cases": rows}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
