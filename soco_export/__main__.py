"""python -m soco_export: the command line, in the form that torchrun and accelerate launch start."""

from soco_export.cli import main

main()
