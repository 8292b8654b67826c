"""Scorers: one importance per singular component. Importing this package registers the scorers in it."""

from soco_train.scores import acip, closed_form, soco

__all__ = ["acip", "closed_form", "soco"]
