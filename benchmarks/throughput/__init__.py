"""What learning scores costs beside the dense model's own forward and backward pass, in turns in one run.

python -m benchmarks.throughput --model smollm2-135m --out benchmarks/throughput/results/smollm2-135m

models.py       the model three times: dense, all components scored, and the survivors of a cut
run.py          the command line: rounds in turns, medians, JSON and Markdown
"""
