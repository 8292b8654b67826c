"""From scores and a plan to factors: compensate, cut, refit, distil, store."""
