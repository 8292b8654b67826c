"""python -m benchmarks.scale: see benchmarks.scale.run."""

from benchmarks.scale.run import main

main()
