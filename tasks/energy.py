"""Energy that a training takes, where the machine tells: the processor's RAPL counters, as Linux shows them."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Sums the counters of all processor packages; other programs' use is counted as well.

    A counter starts again from 0 at its range (minutes under load), so `read` must be called more often than that.

    Args:
        powercap: where the kernel shows the counters, in microjoules.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._joules = 0.0
        self._last: dict[Path, int] = {}
        try:
            self._last = {path: _number(path / "energy_uj") for path in _packages(powercap)}
            self._ranges = {path: _number(path / "max_energy_range_uj") for path in self._last}
        except (OSError, ValueError):  # most kernels show them to root alone
            self._last = {}

    def read(self) -> float | None:
        """Joules since the meter was made; none where the machine does not tell."""
        try:
            for path, before in self._last.items():
                now = _number(path / "energy_uj")
                self._joules += ((now - before) % (self._ranges[path] + 1)) / 1e6
                self._last[path] = now
        except (OSError, ValueError):
            self._last = {}
        return self._joules if self._last else None


def _packages(powercap: Path) -> list[Path]:
    """Whole processors: zones such as `intel-rapl:0` (AMD's as well), not their parts such as `intel-rapl:0:0`."""
    return sorted(path for path in powercap.glob("*-rapl:*") if path.name.count(":") == 1 and "mmio" not in path.name)


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
