"""Numbers that are none, and numbers that a type has no room for: what is wrong with a tensor, in one phrase."""

from __future__ import annotations

import math

import torch

from soco_train.errors import DataError

# float32 below this has lost digits, and most kernels take it for 0 (IEEE 754: the smallest normal number)
_NORMAL = torch.finfo(torch.float32).tiny
# Beyond this a norm, a variance or a covariance in float32 is infinite.
_SQUARED = math.sqrt(torch.finfo(torch.float32).max)
NONE = "NaN or infinity"
_FIX = "look for where it appears first: the base model, the calibration, or half precision"


def number_fault(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> str:
    """Return what a tensor of weights holds that it must not, "" if nothing; takes no memory unless there is some.

    NaN, infinity and what overflows in `dtype`; in matrices also what overflows when squared, nothing but subnormal
    numbers, and nothing that `dtype` does not round to 0.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return ""
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # float8 knows no order
    low, high = (float(end) for end in wide.aminmax())
    fault = range_fault(low, high, tensor.dim() > 1, dtype or tensor.dtype)
    if fault != NONE:
        return fault
    return f"{NONE} in {int((~torch.isfinite(wide)).sum()):,} of {tensor.numel():,} values"


def range_fault(low: float, high: float, matrix: bool, dtype: torch.dtype) -> str:
    """Return what is wrong with numbers between `low` and `high` (NaN if there is one) that are written as `dtype`."""
    if not math.isfinite(low) or not math.isfinite(high):
        return NONE
    largest = max(-low, high)
    rounded = float(torch.tensor(largest, dtype=torch.float64).to(dtype))
    if not math.isfinite(rounded):
        return f"|w| = {largest:.5g}, and {dtype} ends at {torch.finfo(dtype).max:.5g}"
    if not matrix or not largest:
        return ""
    if largest > _SQUARED:
        return f"|w| = {largest:.5g}, and float32 has no room for its square"
    if largest < _NORMAL:
        return f"nothing but subnormal numbers (up to {largest:.3g}), which most kernels take for 0"
    return "" if rounded else f"nothing that {dtype} does not round to 0 (up to {largest:.3g})"


def check_numbers(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor; DataError, naming it, for what `number_fault` finds."""
    fault = number_fault(tensor)
    if fault:
        raise DataError(f"{name} holds {fault}", fix=_FIX, where=name)
    return tensor
