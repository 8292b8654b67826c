"""The HF folder of a pruned model: write, read, check, and the card that goes with it.

Loading with plain transformers goes through `quantizer`, which registers itself (soco_export.autoload).
"""

from soco_export.checkpoint.card import CardSummary, render_card, summarise
from soco_export.checkpoint.load import load_checkpoint
from soco_export.checkpoint.reader import check_folder
from soco_export.checkpoint.writer import save_checkpoint, save_dense

__all__ = [
    "CardSummary",
    "check_folder",
    "load_checkpoint",
    "render_card",
    "save_checkpoint",
    "save_dense",
    "summarise",
]
