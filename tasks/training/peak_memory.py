"""Peak memory of a block of work: CUDA's own count on a GPU, the resident set otherwise."""

from __future__ import annotations

import gc
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class PeakMemory:
    """Highest memory use within the block, read when it ends."""

    bytes: int = 0
    kind: str = ""
    """`CUDA allocated`, `resident set`, or `resident set of the whole process` where no reset is possible."""

    def so_far(self) -> int:
        """Bytes since the block began."""
        return peak_bytes(self.kind)


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the peak memory of a block, starting from a clean slate as far as the system allows it."""
    peak = PeakMemory()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        peak.kind = "CUDA allocated"
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # resets VmHWM, proc(5)
        peak.kind = "resident set"
    else:
        peak.kind = "resident set of the whole process"
    yield peak
    peak.bytes = peak.so_far()


def peak_bytes(kind: str) -> int:
    """Highest memory use of this process, as the system counts it.

    Args:
        kind: as in `PeakMemory`.
    """
    if kind == "CUDA allocated":
        return torch.cuda.max_memory_allocated()
    if kind == "resident set" and (peak := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
        return int(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
