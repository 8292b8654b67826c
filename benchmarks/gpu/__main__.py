"""python -m benchmarks.gpu: see benchmarks.gpu.run."""

from benchmarks.gpu.run import main

main()
