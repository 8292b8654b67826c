"""Make `AutoModelForCausalLM.from_pretrained` know our checkpoints wherever this package is installed.

PyTorch calls every entry point of the group `torch.backends` at the end of `import torch`, and ours is `install`. It
imports nothing heavy: it waits until transformers imports its table of quantizers, and adds ours to that. With
TORCH_DEVICE_BACKEND_AUTOLOAD=0 in the environment PyTorch does not call it; `import soco_export` then does.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLE = "transformers.quantizers.auto"
# Imports the table, and is imported before any model is loaded. If it was the table that imported PyTorch, and so
# called `install`, the table itself can no longer be waited for.
USER = "transformers.modeling_utils"
LORA = "peft.tuners.lora.model"


def install() -> None:
    """Register our quantizer with transformers and our layers with PEFT, now or as soon as they are. Idempotent."""
    table = sys.modules.get(TABLE)
    if table is not None and hasattr(table, "register_quantizer"):
        register_checkpoints(table)
    if hasattr(sys.modules.get(LORA), "dispatch_default"):
        register_lora(sys.modules[LORA])
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def register_checkpoints(table: ModuleType) -> None:
    """Add our quantizer and its configuration to transformers' table, once."""
    from soco_export.checkpoint.record import QUANT_METHOD

    if QUANT_METHOD in table.AUTO_QUANTIZER_MAPPING:
        return
    from soco_export.checkpoint.quantizer import SocoExportConfig, SocoExportQuantizer

    table.register_quantization_config(QUANT_METHOD)(SocoExportConfig)
    table.register_quantizer(QUANT_METHOD)(SocoExportQuantizer)


def register_lora(lora: ModuleType) -> None:
    """Let PEFT's LoRA adapt pruned layers."""
    from soco_export.adapters import register_adapters

    register_adapters(lora)


class _Watch(MetaPathFinder):
    """Finds only the modules that are waited for, by asking the other finders, and wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (TABLE, USER, LORA):
            return None
        for finder in sys.meta_path:
            spec = None if isinstance(finder, _Watch) else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Then(spec.loader)
                return spec
        return None


class _Then(Loader):
    """Runs the module's own loader, then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        try:
            register_lora(module) if module.__name__ == LORA else register_checkpoints(sys.modules[TABLE])
        except (ImportError, AttributeError) as error:
            # Every user of these libraries passes here; a broken install of ours must not take theirs down.
            warnings.warn(f"soco-export cannot register with {module.__name__}: {error}", stacklevel=2)
