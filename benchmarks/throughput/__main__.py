"""python -m benchmarks.throughput: see benchmarks.throughput.run."""

from benchmarks.throughput.run import main

main()
