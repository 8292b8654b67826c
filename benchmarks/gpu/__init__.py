"""Everything that only a GPU shows, in one command, for the minutes in which one is at hand.

python -m benchmarks.gpu --out benchmarks/gpu/results --minutes 12

run.py          the command line; sections one after the other, each part in a process of its own, and the table
sections.py     which sections there are, in order of worth, and their share of the time
box.py          the time a part has
document.py     what a section has measured: one JSON, written after every piece
tests.py        a: pytest -m gpu
language.py     b: a real model at several sizes, with many more tokens than a CPU has patience for
choices.py      b's cells, tokens and learning rates, as data
calibration.py  b's text, and text sampled from the model itself
shapes.py       c: a 7B model's true sizes: seconds, tokens/s, FLOP/s, and memory beside what the dry run predicts
torch_models.py d's PyTorch
runtime.py      d: ONNX Runtime's CUDA provider beside PyTorch with CUDA graphs

carry.py        tools/gpu-carry: what must travel to a GPU machine without network, and the calls that use it
packing.py, parcels.py, calls.py, checking.py, gguf_model.py    its parts
"""
