"""python -m benchmarks.onnx: see benchmarks.onnx.run."""

from benchmarks.onnx.run import main

main()
