"""The NVIDIA GPUs that this process may use, by NVML: CUDA itself takes seconds and memory to start."""

from __future__ import annotations

import os

import pynvml


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that CUDA shows to this process; none without an NVIDIA GPU or its driver.

    Where a machine has unlike GPUs, CUDA may number them in another order than NVML; each number still means one.
    """
    try:
        pynvml.nvmlInit()
        indices = range(pynvml.nvmlDeviceGetCount())
        known = [pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in indices]
    except pynvml.NVMLError:
        return []
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return known
    found = []
    for one in map(str.strip, wanted.split(",")):
        named = [uuid for index, uuid in enumerate(known) if one == str(index) or (one and uuid.startswith(one))]
        if one.startswith("MIG-"):
            named = [one]
        if not named:  # CUDA ends the list there too
            break
        found.append(named[0])
    return found
