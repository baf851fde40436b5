"""The NVIDIA GPU that this process uses, by NVML: CUDA itself takes seconds and memory to start."""

from __future__ import annotations

import os

import pynvml


def first_gpu() -> str | None:
    """UUID of the first GPU that CUDA shows to this process, which all is computed on; none without GPU or driver.

    Where a machine has unlike GPUs, CUDA may number them in another order than NVML; each number still means one.
    """
    try:
        pynvml.nvmlInit()
        indices = range(pynvml.nvmlDeviceGetCount())
        uuids = [pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in indices]
    except pynvml.NVMLError:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first.startswith("MIG-"):
        return first
    return next((uuid for n, uuid in enumerate(uuids) if first == str(n) or (first and uuid.startswith(first))), None)
