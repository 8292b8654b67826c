"""A mixture read with its experts apart, as its publisher's files have them: nothing is put together in memory.

transformers 5 makes two stacks of the experts of a layer as it reads them: the model is then in memory, and a stack of
the largest layer a second time. Here its class is opened (modules/experts.py) before it reads. What the files' names
become is asked of transformers, which says which of them it would put where in which stack.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from soco_train.modules.experts import is_stack, open_stacks
from soco_train.spectra.statistics import EXPERT

# what each source of a stack is called in an open mixture, by the operations that would put them together
_PARTS = {
    ("MergeModulelist", "Concatenate"): ("gate_proj", "up_proj"),
    ("MergeModulelist",): ("down_proj",),
}


def names_apart(kind: Any, config: Any, stored: Iterable[str]) -> dict[str, str]:
    """Return tensor names of the files → names in a model of the class `kind` with open mixtures.

    Empty where there is nothing to gain (no experts one by one in the files, none in stacks in the model), or where
    transformers does something else with them than to put them together.
    """
    stored = list(stored)
    if not any(map(EXPERT.search, stored)):
        return {}
    with torch.device("meta"):
        model = kind(config)
    return _renamed(model, stored) if any(map(is_stack, model.modules())) else {}


def _renamed(model: Any, stored: Iterable[str]) -> dict[str, str]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parts: dict[str, str] = {}
    for entry in converters:
        known = _PARTS.get(tuple(type(operation).__name__ for operation in entry.operations), ())
        parts |= dict(zip(entry.source_patterns, known, strict=False))
    state, found = model.state_dict(), {}
    for name in stored:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is not None:
            number = EXPERT.search(name)
            if pattern not in parts or number is None:
                return {}
            renamed = f"{renamed.rpartition('.')[0]}.{number[1]}.{parts[pattern]}.weight"
        found[name] = renamed
    return found


def read_apart(kind: Any, **reading: Any) -> tuple[Any, Any]:
    """Return (model of the class `kind` with open mixtures, report) as `kind.from_pretrained(None, …)` does."""

    class Open(kind):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            open_stacks(self)

    model, report = Open.from_pretrained(None, **reading)
    model.__class__ = kind
    return model, report
