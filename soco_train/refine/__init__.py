"""From scores and a plan to factors: compensate, cut, refit, distil, store. Importing it registers the rungs in it."""

from soco_train.refine import compensate, distill, refit

__all__ = ["compensate", "distill", "refit"]
