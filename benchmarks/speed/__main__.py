"""python -m benchmarks.speed: see benchmarks.speed.run."""

from benchmarks.speed.run import main

main()
