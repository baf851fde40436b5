"""The machine that computes, for records: what it is, not whose."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil

LIBRARIES = (
    *("llama3-grit", "torch", "transformers", "peft", "trl"),
    *("bitsandbytes", "lm-eval", "llama-cpp-python", "prefect"),
)
"""Whose versions reports and records name; the first is this project's."""
CPUINFO = Path("/proc/cpuinfo")


def machine(device: str) -> dict[str, Any]:
    """Processor, cores, memory, device and system; no name of the host.

    Args:
        device: what is computed on: the GPU's name, or CPU.
    """
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": device,
        "system": platform.platform(),
    }


def processor(cpuinfo: Path = CPUINFO) -> str:
    """The processor's model; where that is not told, as on ARM, its architecture.

    Args:
        cpuinfo: where Linux tells it.
    """
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.*\S)", text, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()
