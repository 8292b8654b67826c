"""The names a run goes by: the forms of a model that can be asked for, and the files in its folder."""

from __future__ import annotations

from typing import Literal

Format = Literal["onnx", "hf", "dense"]

MANIFEST, LOCK = "manifest.json", "recipe.lock.yaml"
# where stages work, and what is locked while a process holds the folder
UNFINISHED, HELD = "unfinished", "run.held"
# what plans go by: times of layers on this machine, what each layer loses in each form and type
PROFILE, DAMAGE = "latency.json", "damage.safetensors"
# written by the checkpoint, the export, the proof and the bench
CARD_FILE, EXPORT_FILE = "evidence/card.json", "evidence/onnx.json"
PROOF_FILE, BENCH_FILE = "evidence/proof.json", "evidence/bench.json"
# the training curves of the two stages that train
SCORES_CURVE, FACTORS_CURVE = "evidence/scores.jsonl", "evidence/factors.jsonl"
# factors that were distilled for all sizes of refine.distill.sizes
SIZES_FILE = "any-size.safetensors"
# the points of a sweep of the run
FRONTIER_FILE = "evidence/frontier.json"
# what a report tells beside results.json
EVIDENCE_FILES = (CARD_FILE, EXPORT_FILE, PROOF_FILE, BENCH_FILE, SCORES_CURVE, FACTORS_CURVE, FRONTIER_FILE)
KEPT_CURVE = "work/curve.jsonl"
REPORT_FILES = ("results.json", "report.md", "report.html", "comment.md", "junit.xml", "hf/README.md")
