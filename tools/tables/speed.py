"""Tables of onnx.md: speed beside the dense model, over the series of benchmarks/speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.speed.table import DECODE, PREFILL, floors
from tools.tables.read import four, megabytes, read

RESULTS = "speed/results"
MODELS = {"1b": "1B width (2048)", "smollm2": "SmolLM2-135M (576)"}
OTHERS = (  # row → the models of it
    ("ours, 0.6 stacked, `contrib`", ("0.6 stacked, ours, contrib",)),
    ("ours, 0.6 stacked, `standard`", ("0.6 stacked, ours, standard",)),
    ("ours, dense, `standard`", ("dense, ours, standard",)),
    ("onnxruntime-genai's builder, dense", ("dense, onnxruntime-genai",)),
    ("llama.cpp, dense (F32, Q4_0)", ("dense, llama.cpp F32", "dense, llama.cpp Q4_0")),
    ("optimum-onnx: dense, the same 0.6 model", ("dense, optimum-onnx", "0.6 stacked, optimum-onnx")),
    ("PyTorch eager: dense, the same 0.6 model", ("dense, PyTorch eager", "0.6 stacked, PyTorch eager")),
)
FRONTIER = (
    ("dense", "dense"),
    ("0.8 stacked", "0.8"),
    ("0.8 stacked, trained as rounded", "0.8-int4"),
    ("0.8 stacked, trained as rounded in blocks of 64", "0.8-int4-64"),
    ("0.8 pivoted", "0.8-pivoted"),
    ("0.6 stacked", "0.6"),
    ("0.6 stacked, trained as rounded", "0.6-int4"),
    ("0.6 pivoted", "0.6-pivoted"),
    ("0.4 stacked, 102k tokens", "0.4"),
)
INT4 = {"SmolLM2-135M (576)": "smollm2", "1B width (2048)": "1b", "7B width (4096)": "7b"}
DRAFTS = {"SmolLM2-135M, float32": "smollm2-fp32"}
Rows = list[tuple[str, ...]]
Entry = Mapping[str, Any]


def _speeds(entry: Entry, dense: Entry) -> str:
    """Return decode and prefill speed-ups; bold below the floor by more than the spread, as benchmarks.speed judges."""
    owed = floors(entry, dense) or (0.0, 0.0)
    pairs = zip((entry["speedups"][work] for work in (DECODE, PREFILL)), owed, strict=True)
    return " · ".join(f"**{value:.2f}**" if high < floor else f"{value:.2f}" for (value, _, high), floor in pairs)


def _forms(folder: str) -> Rows:
    """Return each form and type against dense, at two widths and two sizes."""
    head = [f"{name}, 0.8" if keep == "0.8" else "0.6" for name in MODELS.values() for keep in ("0.8", "0.6")]
    found: Rows = [("", *head)]
    for planned in ("", ", planned"):
        for weights in ("fp32", "int8", "int4"):
            for form in ("stacked", "pivoted"):
                cells = [
                    _form(folder, model, weights, f"{keep} {form}{planned} (")
                    for model in MODELS
                    for keep in ("0.8", "0.6")
                ]
                found.append((f"{weights} {form}{planned}", *cells))
    return found


def _form(folder: str, model: str, weights: str, name: str) -> str:
    entries = read(f"{folder}/{model}-{weights}.json")["entries"]
    return next((_speeds(entry, entries[0]) for entry in entries if entry["name"].startswith(name)), "no such plan")


def others() -> Rows:
    """Return other runtimes against our dense graph."""
    types = {
        weights: {e["name"]: e for e in read(f"{RESULTS}/others-smollm2-{weights}.json")["entries"]}
        for weights in ("fp32", "int4")
    }
    found: Rows = [("", *types)]
    for title, names in OTHERS:
        cells = [", ".join(_pair(entries[name]) for name in names if name in entries) for entries in types.values()]
        found.append((title, *cells))
    return found


def _pair(entry: Entry) -> str:
    return " · ".join(f"{entry['speedups'][work][0]:.2f}" for work in (DECODE, PREFILL))


def int4() -> Rows:
    """Return decode and prefill of int4 models against onnxruntime-genai's, and the bandwidth that a decode reaches."""
    found: dict[str, list[str]] = {}
    for width in INT4.values():
        document = read(f"{RESULTS}/int4/{width}.json")
        for entry in document["entries"]:
            of_bandwidth = 1e5 * entry["bytes"] / document["bandwidth"] / entry["milliseconds"][DECODE]
            found.setdefault(entry["name"], []).append(f"{_pair(entry)} · {of_bandwidth:.0f} %")
    return [("", *INT4), *((name, *cells) for name, cells in found.items())]


def drafts() -> Rows:
    """Return every draft of every target: tokens a pass, share of proposals kept, speed-up with its spread."""
    found: Rows = [("target", "draft", "ahead", "tokens a pass", "kept", "speed-up")]
    for title, name in DRAFTS.items():
        for row in read(f"results/draft-{name}.json")["rows"]:
            if row["ahead"]:
                spread = f"{row['speedup']:.2f} ({row['low']:.2f}–{row['high']:.2f})"
                kept = f"{100 * row['accepted']:.0f} %"
                found.append((title, row["name"], str(row["ahead"]), f"{row['tokens_per_pass']:.2f}", kept, spread))
    return found


def frontier() -> Rows:
    """Return bytes on disk and perplexity of each form in each type."""
    points = {(one["model"], one["weights"]): one for one in read(f"{RESULTS}/frontier-smollm2/frontier.json")}
    types = {"fp32": "fp32", "int8": "int8", "int4": "int4", "int4-all": "int4 throughout"}
    found: Rows = [("MB · perplexity", *types.values())]
    for title, model in FRONTIER:
        cells = [points.get((model, weights)) for weights in types]
        found.append(
            (title, *(f"{megabytes(one['bytes'])} · {four(one['perplexity'])}" if one else "" for one in cells))
        )
    return found


TABLES: dict[str, Callable[[], Rows]] = {
    "speed-forms": lambda: _forms(RESULTS),
    "speed-forms-xeon": lambda: _forms(f"{RESULTS}/xeon"),
    "speed-others": others,
    "speed-int4": int4,
    "speed-drafts": drafts,
    "bytes-and-quality": frontier,
}
