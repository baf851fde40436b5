"""A STAND-IN for the module pynvml: answers and refuses as NVML's documentation says, for GPUs that are not there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pynvml import (
    NVML_ERROR_INVALID_ARGUMENT,
    NVML_ERROR_LIBRARY_NOT_FOUND,
    NVML_ERROR_NOT_FOUND,
    NVML_ERROR_NOT_SUPPORTED,
    NVML_ERROR_UNINITIALIZED,
    NVMLError,
)


@dataclass
class Gpu:
    """One GPU; `millijoules` counts from the driver's start."""

    uuid: str
    millijoules: int | None = 0
    """None: it is older than Volta."""


@dataclass
class NvmlStandIn:
    """What stands in the module's place."""

    gpus: list[Gpu] = field(default_factory=list)
    driver: bool = True
    ready: bool = False
    NVMLError: ClassVar[type[Exception]] = NVMLError

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError(NVML_ERROR_LIBRARY_NOT_FOUND)
        self.ready = True

    def nvmlDeviceGetCount(self) -> int:
        return len(self._known())

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        if not 0 <= index < len(self._known()):
            raise NVMLError(NVML_ERROR_INVALID_ARGUMENT)
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        """The whole UUID is wanted, with its prefix."""
        for gpu in self._known():
            if gpu.uuid == uuid:
                return gpu
        raise NVMLError(NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        self._known()
        return gpu.uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: Gpu) -> int:
        self._known()
        if gpu.millijoules is None:
            raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
        return gpu.millijoules

    def _known(self) -> list[Gpu]:
        if not self.ready:
            raise NVMLError(NVML_ERROR_UNINITIALIZED)
        return self.gpus
