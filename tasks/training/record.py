"""What is recorded while a model trains: a line per step, TensorBoard events, validation loss, progress."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.engine.errors import TrainingError
from tasks.settings.finetune import TrainingSettings
from tasks.training.energy import EnergyMeter, GpuEnergyMeter, Meter, gpu_in_use
from tasks.training.history import final_training_loss, last_steps

RECORD = "record.json"


class StepRecorder(TrainerCallback):
    """Writes `history.jsonl` and TensorBoard events, and measures the validation loss during training.

    Args:
        directory: where the history is written.
        validate: returns the validation loss in nats per supervised token; none without validation rows.
        training: when to validate during training; before the first and after the last step in any case.
        report: called after each step with its number, the number of steps, and its line.
    """

    def __init__(
        self,
        directory: Path,
        validate: Callable[[], float] | None,
        training: TrainingSettings,
        report: Callable[[int, int, dict[str, Any]], None],
    ) -> None:
        self.directory, self.validate, self.training = directory, validate, training
        self.steps: list[dict[str, Any]] = []
        self.validation: list[tuple[int, float]] = []
        self.modules: list[dict[str, Any]] = []
        """What GRIT did in each module, at the steps of a validation."""
        self.energy: dict[str, Meter] = {
            "energy_joules": EnergyMeter(),
            "gpu_energy_joules": GpuEnergyMeter(gpu_in_use()),
        }
        """Meters by the name of their figure; what validations take is left out."""
        self.resumed = False
        """Whether a part of the training ran in another process, whose energy is not known here."""
        self.peak_memory_bytes = 0
        """Of the processes before this one."""
        self.trainer: Any = None
        self.report = report
        self._tokens = 0
        """Supervised tokens of the steps recorded."""
        self._writer = SummaryWriter(str(directory / "tensorboard"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the untrained model, unless training goes on from a checkpoint."""
        if not state.global_step:
            self._validate(0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of one optimizer step."""
        self.trainer.diagnose_modules = lambda: self._is_measured(state.global_step + 1, state.max_steps)
        self.trainer.step_losses = {}
        self.trainer.step_tokens = self.trainer.step_supervised_tokens = 0
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock, before logging or validation."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds = time.perf_counter() - self._started
        self._read_meters()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep one optimizer step.

        Raises:
            TrainingError: the loss or the gradient is no finite number.
        """
        if not logs or "loss" not in logs:  # the closing summary
            return
        step = state.global_step
        grit = getattr(self.trainer, "step_statistics", {})
        line: dict[str, Any] = {
            "step": step,
            "loss": logs["loss"],
            "grad_norm": grit.get("grad_norm", logs["grad_norm"]),
            "grad_norm_preconditioned": logs["grad_norm"],
            "learning_rate": logs["learning_rate"],
            "tokens": self.trainer.step_tokens,
            "supervised_tokens": self.trainer.step_supervised_tokens,
            "seconds": round(self._seconds, 4),
        }
        line |= self.trainer.step_losses
        if not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm_preconditioned"])):
            raise TrainingError(
                f"training diverged at step {step}: loss {line['loss']}, gradient norm {logs['grad_norm']}",
                where="training.learning_rate",
                fix="Lower the learning rate or lengthen the warm-up.",
            )
        if grit:
            line["grit"] = {name: value for name, value in grit.items() if name != "grad_norm"}
        if self._is_measured(step, state.max_steps):
            self._validate(step, line)
            self._keep_modules([{"step": step} | module for module in getattr(self.trainer, "module_figures", [])])
        self._keep(line)
        self.report(step, state.max_steps, line)

    def save(self, checkpoint: Path, basis_seconds: float, peak_memory_bytes: int) -> None:
        """Write what was recorded so far into a checkpoint.

        Args:
            checkpoint: its directory.
            basis_seconds: what finding the first basis took.
            peak_memory_bytes: of this process.
        """
        record = {
            "steps": self.steps,
            "validation": self.validation,
            "modules": self.modules,
            "basis_seconds": basis_seconds,
            "peak_memory_bytes": max(self.peak_memory_bytes, peak_memory_bytes),
        }
        (checkpoint / RECORD).write_text(json.dumps(record), encoding="utf-8")

    def go_on_from(self, checkpoint: Path) -> float:
        """Take over what was recorded before the checkpoint, and return the seconds that the first basis took."""
        record = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
        for line in record["steps"]:
            self._keep(line)
        self._keep_modules(record["modules"])
        self.resumed, self.peak_memory_bytes = True, record["peak_memory_bytes"]
        for step, loss in record["validation"]:
            self.validation.append((step, loss))
            self._writer.add_scalar("validation_loss", loss, step)
        return float(record["basis_seconds"])

    def close(self) -> None:
        """Close the TensorBoard file."""
        self._writer.close()

    def summary(self) -> dict[str, Any]:
        """Figures of the whole training, over the steps recorded."""
        return {
            "steps": len(self.steps),
            "final_loss": final_training_loss(self.steps),
            "final_loss_steps": len(last_steps(self.steps)),
            "median_seconds_per_step": statistics.median(step["seconds"] for step in self.steps),
            "total_seconds": round(sum(step["seconds"] for step in self.steps), 3),
            "tokens": sum(step["tokens"] for step in self.steps),
            "supervised_tokens": sum(step["supervised_tokens"] for step in self.steps),
            "validation": [list(point) for point in self.validation],
            **{name: None if self.resumed else joules for name, joules in self._read_meters().items()},
        }

    def _read_meters(self) -> dict[str, float | None]:
        return {name: meter.read() for name, meter in self.energy.items()}

    def _is_measured(self, step: int, last: int) -> bool:
        """Whether the running step ends with a validation; known once its rows were seen."""
        if step == last:
            return True
        if every := self.training.eval_tokens:
            return self._tokens // every < (self._tokens + self.trainer.step_supervised_tokens) // every
        return bool(self.training.eval_steps and step % self.training.eval_steps == 0)

    def _keep_modules(self, figures: list[dict[str, Any]]) -> None:
        self.modules += figures
        if figures:
            with (self.directory / "modules.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(module) + "\n" for module in figures)

    def _keep(self, line: dict[str, Any]) -> None:
        self.steps.append(line)
        self._tokens += line["supervised_tokens"]
        with (self.directory / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in [*line.items(), *((f"grit/{name}", value) for name, value in line.get("grit", {}).items())]:
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, line["step"])

    def _validate(self, step: int, line: dict[str, Any] | None = None) -> None:
        if self.validate is None:
            return
        self._read_meters()
        loss = self.validate()
        for meter in self.energy.values():
            meter.skip()
        self.validation.append((step, loss))
        self._writer.add_scalar("validation_loss", loss, step)
        if line is not None:
            line["validation_loss"] = loss
