"""What a run will need, before it starts: disk exactly enough to refuse early, time roughly."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.engine.artifacts import Artifact
from tasks.engine.errors import UserError, unwritable_store
from tasks.engine.planning import Plan
from tasks.export.merge_candidates import nf4_merge
from tasks.export.quantization import CONVERTED
from tasks.model.sources import parameters_of_source, to_fetch
from tasks.ollama.tag_history import same_place
from tasks.settings.finetune import FinetuneSettings
from tasks.training.token_counts import supervised_tokens, tokens_per_step

BYTES_PER_WEIGHT = {"q8_0": 34 / 32, "f16": 2, "bf16": 2, "q6_k": 0.83, "q5_k_m": 0.75, "q4_k_m": 0.65}
"""Q8_0: 32 weights of 8 bits and one 16-bit scale. K-quants: the most of a large model, whose embedding takes more."""
RESERVE = 512 * 2**20  # logs, tokenizers, a small model's adapter, and what else the disk is used for
CHECKPOINTS = 3  # the last two and the one being written
ADAPTER_SHARE = 0.0055 / 16  # LoRA's share of the weights by rank: Llama 3 8B's with all seven matrices (0.52 % at 16)

ON_TOP = {
    "merge": "merging",
    "convert": "conversion",
    "check_fidelity": "the GGUF's check",
    "answer_prompts": "answers",
    "measure_forgetting": "forgetting",
    "measure_second_data": "the second data set",
    "judge_answers": "the judge",
}
"""Stages whose time nothing is said of, and what they are called."""


@dataclass(frozen=True)
class Need:
    """Room that a run will take."""

    what: str
    bytes: int
    directory: Path
    """Where; it need not exist yet."""
    setting: str
    """What moves it elsewhere."""


def disk_needs(settings: FinetuneSettings, plan: Plan) -> list[Need] | None:
    """The large files that the stages which are not cached will write; none if the model's size is not known.

    Args:
        settings: what is exported, and where to.
        plan: the state of the stages.

    Raises:
        UserError: there is no such model.
    """
    waiting = _waiting(plan)
    if not waiting and _ollama_models(settings) is None:
        return []
    parameters = _parameters(settings, plan)
    if parameters is None:
        return None
    gguf = int(parameters * BYTES_PER_WEIGHT[settings.export.gguf_type])
    needs = [Need("logs and small files", RESERVE if waiting else 0, settings.store, "store")]
    if "fetch_model" in waiting:
        directory, size = to_fetch(settings.model, settings.store)
        setting = "store" if directory == settings.store else "HF_HOME"
        needs.append(Need("base model", size, directory, setting))
    if "train" in waiting:
        adapter = int(parameters * ADAPTER_SHARE * settings.lora.r)
        # The adapter and Adam's two moments, 4 bytes each.
        needs.append(Need("checkpoints", CHECKPOINTS * 12 * adapter, settings.store, "store"))
    if "merge" in waiting:
        model = plan.result_of("fetch_model")  # its files, whose dtype a merged model has
        size = (model.size if model else 2 * parameters) * waiting.count("merge")
        needs.append(Need("merged model", size, settings.store, "store"))
        if (nf4 := nf4_merge(settings)) and nf4.into == "best":
            needs.append(Need("a second merge, for a while", size // waiting.count("merge"), settings.store, "store"))
    if "convert" in waiting:
        needs.append(Need("GGUF", gguf * waiting.count("convert"), settings.store, "store"))
        if settings.export.gguf_type not in CONVERTED:
            needs.append(Need("GGUF in bfloat16, for a while", 2 * parameters, settings.store, "store"))
    models = _ollama_models(settings)
    if models is not None and not _registered(models, plan.result_of("convert")):
        setting = "ollama.models" if settings.ollama.target == "store" else "OLLAMA_MODELS"
        needs.append(Need("Ollama's copy", gguf, models, setting))
    return [need for need in needs if need.bytes]


def check_disk(settings: FinetuneSettings, plan: Plan) -> None:
    """Refuse to start where a disk cannot hold what the run writes, or nothing at all.

    Raises:
        UserError: too little is free, or the store cannot be written to.
    """
    for directory, free, needs in _by_file_system(disk_needs(settings, plan) or []):
        if free < (needed := sum(need.bytes for need in needs)):
            movable = " or ".join(dict.fromkeys(f"`{need.setting}`" for need in needs))
            raise UserError(
                f"{free / 1e9:.1f} GB are free and the run needs {needed / 1e9:.1f} GB ({_listed(needs)})",
                where=directory,
                fix=f"Free some space, or point {movable} at a larger disk.",
            )
    try:
        settings.store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.store):
            pass
    except OSError as error:
        raise unwritable_store(settings.store, error.strerror or str(error)) from None


def estimate(settings: FinetuneSettings, plan: Plan) -> list[str]:
    """Say in a few lines what the stages that are not cached will take.

    Args:
        settings: the run's settings.
        plan: the state of its stages.
    """
    waiting = _waiting(plan)
    if not waiting:
        return ["Nothing to compute: all is cached."]
    needs, parameters = disk_needs(settings, plan), _parameters(settings, plan)
    if needs is None or parameters is None:
        free = shutil.disk_usage(_existing(settings.store)).free
        return [f"Disk and time: known once the base model has been fetched ({free / 1e9:.0f} GB are free)."]
    lines = [
        f"Disk: at most {sum(need.bytes for need in group) / 1e9:.2f} GB ({_listed(group)}); "
        f"{free / 1e9:.0f} GB are free in {directory}."
        for directory, free, group in _by_file_system(needs)
    ]
    if {"train", "reproduce_fault", "score"} & set(waiting):
        lines.append(_time(settings, parameters, plan))
    return lines


def _time(settings: FinetuneSettings, parameters: int, plan: Plan) -> str:
    training, waiting = settings.training, _waiting(plan)
    trainings, faults = waiting.count("train"), waiting.count("reproduce_fault")
    longest = settings.data.max_length
    rows, bound = None, "at most"
    card: dict[str, Any] = {"max_length": longest, "tokens": {"train": longest}, "rows": {"train": 1}}
    dataset = plan.result_of("prepare_dataset")
    if dataset is not None:
        card = dataset.facts
        rows, bound = card["rows"]["validation"], "about"
    length, in_step = card["tokens"]["train"] / card["rows"]["train"], tokens_per_step(training, card)
    rate = 0.5 * _matmul_rate(settings.model.dtype)
    parts = []
    if trainings or faults:
        # Forward 2, backward through the activations 2, recomputation 2 floating-point operations per weight and token.
        passes = 6 if training.gradient_checkpointing else 4
        padded = training.per_device_batch_size * training.gradient_accumulation_steps * longest
        tokens = training.max_steps * (trainings * in_step + faults * padded)
        counted = f" (each row as {length:.0f} tokens, until they are read)" if rows is None else ""
        parts.append(f"training {bound} {_minutes(passes * parameters * tokens / rate)}{counted}")
    if rows is not None:
        measured = waiting.count("score")
        if (nf4 := nf4_merge(settings)) and nf4.into == "best":
            measured += 2 * waiting.count("merge")
        intervals = training.max_steps / training.eval_steps if training.eval_steps else 1.0
        if training.eval_tokens:
            intervals = min(training.max_steps, supervised_tokens(training, card) / training.eval_tokens)
        measured += (trainings + faults) * (1 + math.ceil(intervals))
        parts.append(f"validation {bound} {_minutes(2 * parameters * measured * rows * length / rate)}")
    others = [what for name, what in ON_TOP.items() if name in waiting]
    others += ["GRIT's first basis"] if trainings and settings.method == "grit" else []
    others += ["lm-eval's answers"] if "score" in waiting and settings.scoring.tasks else []
    others += ["validation"] if rows is None else []
    said = ", ".join(parts) or "not known"
    on_top = f" On top: {', '.join(others)}." if others else ""
    return f"Time: {said}, at half of this machine's measured matmul speed.{on_top}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _waiting(plan: Plan) -> list[str]:
    return [name for name, state in plan.stages if state == "to run"]


def _parameters(settings: FinetuneSettings, plan: Plan) -> int | None:
    model = plan.result_of("fetch_model")
    return int(model.facts["parameters"]) if model else parameters_of_source(settings.model)


def _ollama_models(settings: FinetuneSettings) -> Path | None:
    """Ollama's directory on this machine: of a server here, the one that it has unless it was told another."""
    if settings.ollama.target == "store":
        return settings.ollama.models.expanduser()
    local = settings.ollama.target == "server" and same_place(settings.ollama.host).startswith("127.0.0.1:")
    return Path(os.environ.get("OLLAMA_MODELS", "~/.ollama/models")).expanduser() if local else None


def _registered(models: Path, gguf: Any) -> bool:
    """Whether Ollama's directory holds the GGUF file already, as a blob named by its SHA-256."""
    if not isinstance(gguf, Artifact):
        return False
    return (models / "blobs" / f"sha256-{gguf.files['model.gguf']}").is_file()


def _by_file_system(needs: list[Need]) -> list[tuple[Path, int, list[Need]]]:
    """Needs that share a disk: the directory that the first of them goes to, free bytes there, and the needs."""
    groups: dict[int, list[Need]] = defaultdict(list)
    for need in needs:
        groups[_existing(need.directory).stat().st_dev].append(need)
    return [
        (group[0].directory, shutil.disk_usage(_existing(group[0].directory)).free, group) for group in groups.values()
    ]


def _listed(needs: list[Need]) -> str:
    return ", ".join(f"{need.what} {need.bytes / 1e9:.2f} GB" for need in needs)


def _matmul_rate(dtype: str) -> float:
    """Floating-point operations per second of a large matrix product, measured for a moment."""
    import torch

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
    return path if path.exists() else _existing(path.absolute().parent)
