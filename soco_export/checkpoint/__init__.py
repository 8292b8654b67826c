"""The HF folder of a pruned model: write, read, check, and the card that goes with it.

Loading with plain transformers goes through `quantizer`, which registers itself (soco_export.autoload).
"""
