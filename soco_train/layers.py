"""Which Linears take part, and the one way to put another module in the place of one."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from soco_train.errors import RecipeError
from soco_train.settings import LayerSettings


def select_linears(model: nn.Module, settings: LayerSettings) -> dict[str, nn.Linear]:
    """Return the participating `nn.Linear` modules by qualified name, in model order.

    A module takes part if a glob of `include` matches its name and none of `exclude` does. Modules whose weight is
    shared with another parameter (a tied head) never take part. Raises RecipeError if nothing matches.
    """
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    chosen = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and owners[id(module.weight)] == 1 and _matches(name, settings)
    }
    if not chosen:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise RecipeError(
            f"no Linear of the model matches layers.include {list(settings.include)}",
            fix=f"adjust layers.include; the model's Linears look like {linears[:3] or 'none at all'}",
            where="recipe: layers.include",
        )
    return chosen


def _matches(name: str, settings: LayerSettings) -> bool:
    included = any(fnmatchcase(name, glob) for glob in settings.include)
    return included and not any(fnmatchcase(name, glob) for glob in settings.exclude)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` (dotted) is in `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
