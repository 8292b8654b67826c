"""Tables of onnx.md on rounding and on download sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tools.tables.read import four, megabytes, read

Rows = list[tuple[str, ...]]
FOLDERS = {
    "runs/demo/onnx": "demo, `onnx/` in float32",
    "runs/demo-int8/onnx": "the same in int8",
    "runs/demo-int4/onnx": "the same in int4",
    "runs/demo/hf": "demo, `hf/` (float32)",
    "soco_train/builtin/tiny": "the built-in model, float16",
    "soco_train/builtin/tiny in bfloat16": "the same in bfloat16",
}
WAYS = {"bytes": "as it is", "zstd_19": "zstd -19", "zipnn": "ZipNN", "pack": "`pack`"}


def rounding() -> Rows:
    """Return what rounding adds to the loss of the built-in model, and how much of it each rule removes."""
    found: Rows = [("model", "weights", "rule", "MB", "perplexity", "excess loss", "removed", "seconds")]
    rows = read("bits/results/tiny/bits.json")["rows"]
    exact = {row["model"]: row["loss"] for row in rows if not row["rule"]}
    nearest = {(row["model"], row["grid"]): row["loss"] for row in rows if row["rule"] == "nearest"}
    for row in rows:
        excess = row["loss"] - exact[row["model"]]
        before = nearest.get((row["model"], row["grid"]), row["loss"]) - exact[row["model"]]
        removed = f"{1 - excess / before:.0%}" if row["rule"] not in ("", "nearest") else ""
        shown = (megabytes(row["bytes"], 1), four(row["perplexity"]), f"{excess:.4f}" if row["rule"] else "", removed)
        rule = "trained as rounded" if row["rule"] == "trained" else row["rule"]
        found.append((row["model"], row["grid"], rule, *shown, f"{row['seconds']:.0f}"))
    return found


def packing() -> Rows:
    """Return download sizes in MB."""
    rows = read("packing/results.json")["rows"]
    found: Rows = [("folder, MB", *WAYS.values())]
    for folder, name in FOLDERS.items():
        found.append((name, *(megabytes(rows[folder][way], 2) for way in WAYS)))
    return found


def budget(model: str, digits: int = 3) -> Rows:
    """Return what keep_bytes chose in so many bytes, beside the best dense model that is no larger."""
    found: Rows = [("MB asked", "rule", "best dense", "perplexity", "chosen by keep_bytes", "perplexity")]
    rows = read(f"bits/results/{model}-budget/budget.json")["rows"]
    for row in sorted((row for row in rows if row["asked"]), key=lambda row: (-row["asked"], row["rule"])):
        fits = [one for one in rows if not one["asked"] and one["rule"] == row["rule"] and one["bytes"] <= row["asked"]]
        best = min(fits, key=lambda one: float(one["perplexity"]), default=None)
        beside = (best["grid"], four(best["perplexity"])) if best else ("none is as small", "")
        shown = (*beside, row["chosen"], four(row["perplexity"]))
        found.append((megabytes(row["asked"], digits), row["rule"], *shown))
    return found


def values() -> Rows:
    """Return what values of fewer numbers cost and save in the built-in model."""
    ways = {"absorbed": "absorbed", "distilled": "distilled", "svd, refitted": "SVD, refitted", "svd": "SVD"}
    found = read("kv/results.json")
    first, last = found["dense_step_bytes"]
    rows: Rows = [("keep", "cache, bytes a token", *ways.values(), f"MB read after {first}", f"after {last}")]
    dense = {way: found["dense"] for way in ways}
    dense |= {"cache_bytes_a_token": found["dense_cache_bytes_a_token"], "step_bytes": found["dense_step_bytes"]}
    for row in ({"keep_values": 1, **dense}, *found["rows"]):
        figures = [
            *(four(row[way]) for way in ways),
            *(megabytes(row["step_bytes"][past], 2) for past in (first, last)),
        ]
        rows.append((f"{row['keep_values']:g}", f"{row['cache_bytes_a_token']:,}", *figures))
    return rows


def value_budget() -> Rows:
    """Return what ranks, fewer numbers a value head, and a plan that weighs both make of as many parameters."""
    titles = {"built-in": "budget", "SmolLM2-135M": "budget-smollm2"}
    said = {"ranks": "ranks alone", "planned": "`planned`"}
    rows: Rows = [("model", "keep_params", "refine.values.keep", "cache, bytes a token", "perplexity", "distilled")]
    for title, name in titles.items():
        known = {(row["method"], row["keep"]): row for row in read(f"kv/{name}.json")["rows"]}
        for (way, keep), row in sorted(known.items(), key=lambda pair: -pair[0][1]):
            if not way.endswith(", distilled"):
                found = row["texts"]["evaluation"]["mean"]
                trained = known.get((f"{way}, distilled", keep))
                after = four(trained["texts"]["evaluation"]["mean"]) if trained else "–"
                cells = said.get(way, way), f"{row['cache_bytes_a_token']:,}", four(found), after
                rows.append((title, f"{keep:g}", *cells))
    return rows


def cache() -> Rows:
    """Return what a rounded cache costs and saves in the built-in model and in SmolLM2."""
    titles = {"built-in": "rounded", "SmolLM2-135M": "rounded-smollm2"}
    rows: Rows = [
        (
            "model",
            "export.cache",
            "cache, bytes a token",
            "perplexity",
            "KL",
            "MB read after 128",
            "with the context full",
        )
    ]
    for title, name in titles.items():
        for kind, row in read(f"kv/{name}.json")["rows"].items():
            sizes = [megabytes(size, 2) for size in row["step_bytes"].values()]
            figures = f"{row['cache_bytes_a_token']:,}", four(row["perplexity"]), f"{row['kl']:.4f}"
            rows.append((title, kind, *figures, *sizes))
    return rows


def pairs() -> Rows:
    """Return what fewer rotary pairs cost in the built-in model and in SmolLM2."""
    ways = {
        "fisher, alike": "by Fisher",
        "fisher, apart": "apart",
        "energy, alike": "by energy",
        "energy, apart": "apart",
        "distilled": "distilled",
    }
    rows: Rows = [("model", "pairs", *ways.values())]
    for title, name in {"built-in": "pairs", "SmolLM2-135M": "pairs-smollm2"}.items():
        found = read(f"kv/{name}.json")
        rows.append((title, "all", *[four(found["dense"])] * len(ways)))
        for row in found["rows"]:
            rows.append((title, f"{row['keep']:g}", *(four(row[way]) if way in row else "–" for way in ways)))
    return rows


def decode(name: str) -> Rows:
    """Return how many times less CPU time a decode step takes with a smaller cache."""
    found = read(f"kv/{name}.json")["rows"]
    lengths = list(found[0]["decode"])
    rows: Rows = [("setting", "beside the same in", *(f"after {past} tokens" for past in lengths))]
    for row in found:
        timed = (row["decode"][past] for past in lengths)
        speeds = (f"{one['speedup']:.2f} × ({one['low']:.2f}–{one['high']:.2f})" for one in timed)
        rows.append((f"`{row['name']}`", f"`{row['beside']}`", *speeds))
    return rows


TABLES: dict[str, Callable[[], Rows]] = {
    "rounding": rounding,
    "packing": packing,
    "budget": partial(budget, "tiny"),
    "budget-smollm2": partial(budget, "smollm2", digits=1),
    "values": values,
    "value-budget": value_budget,
    "cache": cache,
    "cache-decode": partial(decode, "speed"),
    "cache-decode-smollm2": partial(decode, "speed-smollm2"),
    "pairs": pairs,
}
