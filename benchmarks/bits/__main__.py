"""python -m benchmarks.bits: see run.py."""

from benchmarks.bits.run import main

main()
