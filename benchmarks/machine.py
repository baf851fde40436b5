"""What a measurement ran on."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def machine() -> dict[str, Any]:
    """Processor, GPU if there is one, threads of this process, and versions of the libraries that do the work."""
    found = {"processor": processor(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found | {"versions": {name: version(name) for name in LIBRARIES}}


def processor() -> str:
    """Name of the processor's model, as far as the system tells it."""
    information = Path("/proc/cpuinfo")
    found = information.is_file() and re.search(r"^model name\s*: (.*)$", information.read_text(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
