"""What a measurement ran on."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from benchmarks.workload import DEVICE
from tasks.training.machine import machine as hardware

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def machine() -> dict[str, Any]:
    """The hardware, threads of this process, and versions of the libraries that do the work."""
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    versions = {name: version(name) for name in LIBRARIES}
    return hardware(device) | {"threads": torch.get_num_threads(), "versions": versions}
