"""Energy that a training takes, where the machine tells: the processor's RAPL counters, and the GPU's by NVML."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import pynvml

POWERCAP = Path("/sys/class/powercap")


class Meter(ABC):
    """Sums what a device's counters count from the meter's making on; other programs' use is counted as well."""

    _joules: float | None = 0.0

    def read(self) -> float | None:
        """Joules since the meter was made, without what was skipped; none where the machine does not tell."""
        more = self._counted()
        self._joules = None if more is None or self._joules is None else self._joules + more
        return self._joules

    def skip(self) -> None:
        """Leave out what was counted since the last reading."""
        if self._counted() is None:
            self._joules = None

    @abstractmethod
    def _counted(self) -> float | None:
        """Joules since it was last called; none where the machine does not tell."""


class EnergyMeter(Meter):
    """The energy of all processor packages, as Linux shows their RAPL counters.

    A counter starts again from 0 at its range (minutes under load), so `read` must be called more often than that.

    Args:
        powercap: where the kernel shows the counters, in microjoules.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._last: dict[Path, int] = {}
        try:
            self._last = {path: _number(path / "energy_uj") for path in _packages(powercap)}
            self._ranges = {path: _number(path / "max_energy_range_uj") for path in self._last}
        except (OSError, ValueError):  # most kernels show them to root alone
            self._last = {}

    def _counted(self) -> float | None:
        joules = 0.0
        try:
            for path, before in self._last.items():
                now = _number(path / "energy_uj")
                joules += ((now - before) % (self._ranges[path] + 1)) / 1e6
                self._last[path] = now
        except (OSError, ValueError):
            self._last = {}
        return joules if self._last else None


class GpuEnergyMeter(Meter):
    """The energy of one NVIDIA GPU with its memory, which NVML tells from Volta on.

    Args:
        uuid: the GPU's; none without one.
    """

    def __init__(self, uuid: str | None) -> None:
        self._last: int | None = None
        if uuid is not None:
            try:
                pynvml.nvmlInit()
                self._gpu = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                self._last = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)
            except pynvml.NVMLError:
                self._last = None

    def _counted(self) -> float | None:
        if self._last is None:
            return None
        before = self._last
        try:
            self._last = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)
        except pynvml.NVMLError:
            self._last = None
            return None
        return (self._last - before) / 1e3


def gpu_in_use() -> str | None:
    """UUID of the GPU that PyTorch computes on, whatever CUDA_VISIBLE_DEVICES calls it; none without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _packages(powercap: Path) -> list[Path]:
    """Whole processors: zones such as `intel-rapl:0` (AMD's as well), not their parts such as `intel-rapl:0:0`."""
    return sorted(path for path in powercap.glob("*-rapl:*") if path.name.count(":") == 1 and "mmio" not in path.name)


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
