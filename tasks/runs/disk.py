"""The room that a run will need on disk, exactly enough to refuse early."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.engine.artifacts import Artifact
from tasks.engine.errors import UserError, unwritable_store
from tasks.engine.paths import project_path
from tasks.engine.planning import Plan
from tasks.export.gguf_types import GGUF_TYPES, INTERMEDIATE
from tasks.export.merge_candidates import nf4_merge
from tasks.model.sources import to_fetch
from tasks.ollama.tag_history import same_place
from tasks.runs.waiting import parameter_count, waiting_stages
from tasks.settings.export import GgufType
from tasks.settings.finetune import FinetuneSettings

RESERVE = 512 * 2**20  # logs, tokenizers, a small model's adapter, and what else the disk is used for
CHECKPOINTS = 3  # the last two and the one being written
ADAPTER_SHARE = 0.0055 / 16  # LoRA's share of the weights by rank: Llama 3 8B's with all seven matrices (0.52 % at 16)
TRAINED_WEIGHT_BYTES = 12  # the adapter and Adam's two moments, 4 bytes each


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
    waiting, models = waiting_stages(plan), _ollama_models(settings)
    if not waiting and models is None:
        return []
    parameters = parameter_count(settings, plan)
    if parameters is None:
        return None
    model, gguf = plan.result_of("fetch_model"), plan.result_of("convert")
    needs = [
        Need("logs and small files", RESERVE if waiting else 0, settings.store, "store"),
        *(_base_model(settings) if "fetch_model" in waiting else ()),
        *(_checkpoints(settings, parameters) if "train" in waiting else ()),
        # A merged model has the dtypes of the base model's files.
        *_merged_models(settings, model.size if model else 2 * parameters, waiting.count("merge")),
        *_ggufs(settings, parameters, waiting.count("convert")),
        *(_ollamas_copy(settings, parameters, models) if models and not _registered(models, gguf) else ()),
    ]
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


def disk_lines(needs: list[Need]) -> list[str]:
    """Say in a line for each disk what it must hold, and how much is free there."""
    return [
        f"Disk: at most {sum(need.bytes for need in group) / 1e9:.2f} GB ({_listed(group)}); "
        f"{free / 1e9:.0f} GB are free in {directory}."
        for directory, free, group in _by_file_system(needs)
    ]


def free_bytes(directory: Path) -> int:
    """What is free on the disk of a directory, which need not exist yet."""
    return shutil.disk_usage(_existing(directory)).free


def _base_model(settings: FinetuneSettings) -> list[Need]:
    directory, size = to_fetch(settings.model, settings.store)
    return [Need("base model", size, directory, "store" if directory == settings.store else "HF_HOME")]


def _checkpoints(settings: FinetuneSettings, parameters: int) -> list[Need]:
    adapter = int(parameters * ADAPTER_SHARE * settings.lora.r)
    return [Need("checkpoints", CHECKPOINTS * TRAINED_WEIGHT_BYTES * adapter, settings.store, "store")]


def _merged_models(settings: FinetuneSettings, size: int, merges: int) -> list[Need]:
    needs = [Need("merged model", size * merges, settings.store, "store")]
    if merges and (nf4 := nf4_merge(settings)) and nf4.into == "best":
        needs.append(Need("a second merge, for a while", size, settings.store, "store"))
    return needs


def _ggufs(settings: FinetuneSettings, parameters: int, conversions: int) -> list[Need]:
    gguf_type = settings.export.gguf_type
    needs = [Need("GGUF", _gguf_bytes(gguf_type, parameters) * conversions, settings.store, "store")]
    if conversions and not GGUF_TYPES[gguf_type].by_converter:
        size = _gguf_bytes(INTERMEDIATE, parameters)
        needs.append(Need("GGUF in bfloat16, for a while", size, settings.store, "store"))
    return needs


def _gguf_bytes(gguf_type: GgufType, parameters: int) -> int:
    return int(parameters * GGUF_TYPES[gguf_type].bytes_per_weight)


def _ollamas_copy(settings: FinetuneSettings, parameters: int, models: Path) -> list[Need]:
    setting = "ollama.models" if settings.ollama.target == "store" else "OLLAMA_MODELS"
    return [Need("Ollama's copy", _gguf_bytes(settings.export.gguf_type, parameters), models, setting)]


def _ollama_models(settings: FinetuneSettings) -> Path | None:
    """Ollama's directory on this machine: of a server here, the one that it has unless it was told another."""
    if settings.ollama.target == "store":
        return project_path(settings.ollama.models)
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
    return [(group[0].directory, free_bytes(group[0].directory), group) for group in groups.values()]


def _listed(needs: list[Need]) -> str:
    return ", ".join(f"{need.what} {need.bytes / 1e9:.2f} GB" for need in needs)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)
