"""Peak resident memory of one ONNX folder, in a process of its own so that nothing else is counted.

    python -m soco_export.bench.memory FOLDER PROVIDER THREADS TOKENS

writes one JSON object: the high-water mark after a prefill of TOKENS tokens and a decode step and, to compare, that
of the interpreter with all libraries imported and no model open.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from soco_export.bench.figures import PEAK_METHOD, PeakMemory
from soco_export.evaluate.settings import CPU
from soco_train.errors import MachineError

TIMEOUT_S = 1800
# As `python -m` of this file, but for the working folder, in which Python would look for modules first: it may be a
# model's, and hold a numpy.py.
_START = f"import sys; sys.path[:] = filter(None, sys.path); from {__name__} import _main; _main(*sys.argv[1:])"


def measure_peak_memory(folder: Path, provider: str, threads: int, tokens: int) -> PeakMemory:
    """Open `folder` in a fresh process and return its peak memory; raises MachineError if that process fails."""
    command = [sys.executable, "-c", _START, str(folder), provider, str(threads), str(tokens)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False)
        code, reason = done.returncode, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        code, reason = 1, f"it took more than {TIMEOUT_S} s"
    if code != 0:
        raise MachineError(
            f"the memory of {folder.name} could not be measured: {reason}",
            fix="free memory, or set bench.memory: false",
            where=str(folder),
        )
    found = json.loads(done.stdout.splitlines()[-1])
    method = PEAK_METHOD if provider == CPU else f"{PEAK_METHOD}; the host's memory only"
    return PeakMemory(found["peak"], found["interpreter"], method)


def high_water_mark() -> int:
    """Return this process's peak resident memory in bytes.

    Not ru_maxrss on Linux: a child inherits its parent's there.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))


def _main(folder: str, provider: str, threads: str, tokens: str) -> None:
    import numpy as np

    from soco_export.evaluate.decoders.session import OnnxDecoder

    interpreter = high_water_mark()
    decoder = OnnxDecoder(Path(folder), provider, int(threads))
    decoder.prefill(np.zeros((1, int(tokens)), dtype=np.int64))
    decoder.step(np.zeros((1, 1), dtype=np.int64))
    sys.stdout.write(json.dumps({"peak": high_water_mark(), "interpreter": interpreter}) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
