"""The one place that knows model families: a file for each, or for a few close relatives.

A family is a decorated function from a config to an `Architecture`. A config key that would change the mathematics and
is not part of the description is refused by name. Every file of this folder is imported: a new one is all it takes.
"""

from importlib import import_module
from pkgutil import iter_modules

from soco_export.onnx.families.registry import FAMILIES, describe

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["FAMILIES", "describe"]
