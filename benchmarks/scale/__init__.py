"""Decomposition, score training, cut and export at a 7B model's true sizes: what each takes, and what the whole would.

python -m benchmarks.scale --model mistral-7b --recipe shared/7b-soco --out benchmarks/scale/results/mistral-7b

parts.py        the work, a part in a process of its own, so that its peak memory is its own
estimate.py     from the parts to all layers and all tokens (pure)
run.py          the command line, JSON and Markdown
"""
