"""From scores and a plan to factors: compensate, cut, refit, flatten, distil, store.

Importing it registers the rungs in it; those in closed form are climbed in this order.
"""

from soco_train.refine import compensate, distill, refit, svs, values

__all__ = ["compensate", "distill", "refit", "svs", "values"]
