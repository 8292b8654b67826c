"""The CUDA devices of a machine as its driver shows them, asked in milliseconds where importing torch takes seconds.

Source: the CUDA driver API (cuInit, cuDriverGetVersion, cuDeviceGetCount, cuDeviceGetName, cuDeviceTotalMem_v2).
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

_GIB = 1 << 30
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_LONGEST_NAME = 256  # bytes


@dataclass(frozen=True)
class CudaDevices:
    """The newest CUDA that the driver runs, (0, 0) without one, and its devices: name and memory in words."""

    version: tuple[int, int] = (0, 0)
    names: tuple[str, ...] = ()


def cuda_devices() -> CudaDevices:
    """Return what CUDA_VISIBLE_DEVICES leaves to see; nothing where there is no driver, or it does not start."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return CudaDevices()
    version, count = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDriverGetVersion(ctypes.byref(version)):
        return CudaDevices()
    driver.cuDeviceGetCount(ctypes.byref(count))
    names = tuple(_described(driver, number) for number in range(count.value))
    return CudaDevices((version.value // 1000, version.value % 1000 // 10), names)


def _described(driver: Any, number: int) -> str:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(_LONGEST_NAME), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, _LONGEST_NAME, device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return f"{name.value.decode(errors='replace')} {memory.value / _GIB:.0f} GiB"
