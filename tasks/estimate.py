"""What a run will need, before it starts: disk exactly enough to refuse early, time roughly."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from tasks.artifacts import Artifact
from tasks.errors import UserError
from tasks.model import parameters_of_source
from tasks.settings import FinetuneSettings
from tasks.stage import Pending, Plan

BYTES_PER_WEIGHT = {"q8_0": 34 / 32, "f16": 2, "bf16": 2}  # Q8_0: 32 weights of 8 bits and one 16-bit scale
RESERVE = 512 * 2**20  # logs, tokenizers, the adapter, and what else the disk is used for


def disk_bytes(settings: FinetuneSettings, parameters: int) -> dict[str, int]:
    """Bytes that the large files of a run take.

    Args:
        settings: what is exported, and where to.
        parameters: number of weights of the base model.
    """
    gguf = int(parameters * BYTES_PER_WEIGHT[settings.export.gguf_type])
    bytes_per_weight = 4 if settings.model.dtype == "float32" else 2
    needed = {"merged model": parameters * bytes_per_weight, "GGUF": gguf}
    return needed | ({"Ollama's copy": gguf} if settings.ollama.target == "store" else {})


def check_disk(settings: FinetuneSettings, model: Artifact) -> None:
    """Refuse to start where the disk cannot hold what the run writes.

    Raises:
        UserError: too little is free.
    """
    if isinstance(model, Pending):
        return
    needed = sum(disk_bytes(settings, int(model.facts["parameters"])).values()) + RESERVE
    settings.store.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(settings.store).free
    if free < needed:
        raise UserError(
            f"{free / 1e9:.1f} GB are free and the run needs {needed / 1e9:.1f} GB",
            where=settings.store,
            fix="Free some space, or point `store` at a larger disk.",
        )


def estimate(settings: FinetuneSettings, plan: Plan) -> list[str]:
    """Say in a few lines what the stages that are not cached will take.

    Args:
        settings: the run's settings.
        plan: the state of its stages.
    """
    found: dict[str, Any] = dict(plan.found)
    waiting = [name for name, state in plan.stages if state == "to run"]
    if not waiting:
        return ["Nothing to compute: all is cached."]
    model, free = found.get("fetch_model"), shutil.disk_usage(_existing(settings.store)).free
    parameters = model.facts["parameters"] if model else parameters_of_source(settings.model)
    if parameters is None:
        return [f"Disk and time: known once the base model has been fetched ({free / 1e9:.0f} GB are free)."]
    parts = disk_bytes(settings, parameters)
    if model is None:
        parts["base model"] = 2 * parameters
    listed = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
    lines = [f"Disk: at most {sum(parts.values()) / 1e9:.2f} GB ({listed}); {free / 1e9:.0f} GB are free."]
    if "train" in waiting:
        lines.append(_training_time(settings, parameters, found.get("prepare_dataset")))
    return lines


def _training_time(settings: FinetuneSettings, parameters: int, dataset: Artifact | None) -> str:
    training = settings.training
    rows = training.per_device_batch_size * training.gradient_accumulation_steps
    mean = settings.data.max_length
    if dataset is not None:
        card = json.loads((dataset.path / "card.json").read_text(encoding="utf-8"))
        mean = card["tokens"]["train"] / card["rows"]["train"]
    # Forward 2, backward through the activations 2, recomputation 2 floating-point operations per weight and token.
    passes = 6 if training.gradient_checkpointing else 4
    work = passes * parameters * rows * mean * training.max_steps
    seconds = work / (0.5 * _matmul_rate(settings.model.dtype))
    bound = "about" if dataset is not None else "at most"
    return f"Training: {bound} {seconds / 60:.0f} min, roughly, at half of this machine's measured matmul speed."


def _matmul_rate(dtype: str) -> float:
    """Floating-point operations per second of a large matrix product, measured for a moment."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    left = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    float((left @ left)[0, 0])
    started = time.perf_counter()
    for _ in range(4):
        right = left @ left
    float(right[0, 0])
    return 4 * 2 * size**3 / (time.perf_counter() - started)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
