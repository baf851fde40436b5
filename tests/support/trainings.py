"""A quick training of the tests' tiny model in this process, and all that it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file

from tasks.engine.artifacts import Artifact
from tasks.settings.finetune import LoraSettings, ModelSettings, TrainingSettings
from tasks.training.job import Job
from tasks.training.network import load_network
from tasks.training.run import Training

BASE = ModelSettings(name="tiny", dtype="float32", quantization="none")
LORA = LoraSettings(r=4, alpha=8)
QUICK = TrainingSettings(
    max_steps=4, warmup_steps=1, learning_rate=1e-2, gradient_checkpointing=False, per_device_batch_size=4,
    gradient_accumulation_steps=1, eval_steps=2,
)  # fmt: skip


def fresh_network(model: Artifact, seed: int) -> PeftModel:
    """The network with which a `Run` begins; a run's own seed is 7."""
    return load_network(model, base=BASE, lora=LORA, training=QUICK, max_length=64, seed=seed)


class Run:
    """One training in this process, stopped after a step and gone on with where that is said."""

    def __init__(
        self, directory: Path, model: Artifact, dataset: Artifact, stop_after: int | None = None, **changes: Any
    ) -> None:
        self.history = directory / "history"
        for number in range(1 if stop_after is None else 2):
            for name in ("history", "adapter"):
                (directory / f"{name}{number}").mkdir(parents=True)
            self.history = directory / f"history{number}"
            values = {"base": BASE, "lora": LORA, "training": QUICK, "grit": None} | changes
            job = Job(
                model=model, dataset=dataset, seed=7, adapter=directory / f"adapter{number}", history=self.history,
                checkpoints=directory / "checkpoints", **values,
            )  # fmt: skip

            def report(step: int, steps: int, line: dict[str, Any], number: int = number) -> None:
                if number == 0 and step == stop_after:
                    self.training.checkpoints.stop = True

            self.training = Training(job, report)
            self.facts = self.training.run()
        self.weights = load_file(directory / f"adapter{number}" / "adapter_model.safetensors")

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.history / f"{name}.jsonl").read_text().splitlines()]
