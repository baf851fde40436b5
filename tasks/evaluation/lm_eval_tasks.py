"""lm-eval on a loaded model: tasks by name, from the user's directory or from lm-eval's own collection."""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HfHubHTTPError

from tasks.chat.rendering import THINKING
from tasks.chat.thinking import end_of_thinking
from tasks.engine.errors import NO_ANSWER, TemporaryError, UserError
from tasks.engine.paths import REPOSITORY
from tasks.settings.finetune import ScoringSettings

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel

TASK_FILES = (".yaml", ".py")
DATASET = "${dataset}"
"""Stands for the data set's directory in the user's task files."""


@dataclass(frozen=True)
class TaskResults:
    """The scores that lm-eval gives a model."""

    metrics: dict[str, dict[str, dict[str, Any]]]
    """By task and metric: value, stderr (None where unknown), higher_is_better, n (documents)."""
    versions: dict[str, Any]
    """By task, as its author counts them."""
    num_fewshot: dict[str, int]
    """Examples in the prompt, by task."""
    documents: dict[str, dict[str, list[float]]]
    """By task and metric, the value of each document, where the metric is their mean."""


def load_tasks(settings: ScoringSettings, dataset: Path) -> list[Any]:
    """Find the tasks of the settings and load their data.

    The built-in collection is looked through only when a name is not among the user's own tasks. Tasks of the
    user's own on local files need no network.

    Args:
        settings: task names, directory of own tasks.
        dataset: directory that `${dataset}` in own task files stands for.

    Returns:
        lm-eval's tasks and groups; none if no task is named.

    Raises:
        UserError: no such directory or task, or the task's data is not there.
        TemporaryError: the Hub cannot be reached.
    """
    if not settings.tasks:
        return []
    import datasets.config
    from lm_eval.tasks import TaskManager

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else every local file read is reported to a server
    own = _own_files(settings.include_path)
    with tempfile.TemporaryDirectory() as directory:
        for path in own:
            text = path.read_text(encoding="utf-8")
            filled = text.replace(DATASET, dataset.as_posix()) if path.suffix == ".yaml" else text
            (Path(directory) / path.name).write_text(filled, encoding="utf-8")
        manager = TaskManager(include_path=directory, include_defaults=False)
        if not set(settings.tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=directory)
        for name in settings.tasks:
            _check_known(manager, name)
        return [item for name in settings.tasks for item in _load(manager, name)]


def run_tasks(
    tasks: list[Any],
    *,
    model: PreTrainedModel,
    tokenizer: Any,
    settings: ScoringSettings,
    system: str | None,
    seed: int,
) -> TaskResults:
    """Run tasks on a model that is already in memory, through the tokenizer's chat template.

    Args:
        tasks: from `load_tasks`.
        model: in evaluation mode, answering greedily.
        tokenizer: with chat template.
        settings: few-shot examples, limit, batch size.
        system: system prompt; none if there is none.
        seed: rules the choice of few-shot examples.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # It warns of a model that is already loaded, which is what saves memory here.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    results: Any = simple_evaluate(
        model=HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=settings.batch_size,
            chat_template_args=THINKING,
            think_end_token=end_of_thinking(tokenizer),
        ),
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),  # it would search 14,000 files for tasks that it was given
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        system_instruction=system,
        apply_chat_template=True,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    parts = {part for group, names in results["group_subtasks"].items() if _scores(results, group) for part in names}
    wanted = [name for name in results["results"] if name not in parts]
    return TaskResults(
        metrics={name: _scores(results, name) for name in wanted},
        versions={name: results["versions"].get(name) for name in wanted},
        num_fewshot={name: results["n-shot"][name] for name in wanted if name in results["n-shot"]},
        documents={name: _documents(results, name) for name in wanted if name in results["samples"]},
    )


def own_tasks_sha256(include_path: Path | None) -> str:
    """Digest of the names and contents of the user's task files."""
    digest = hashlib.sha256()
    for path in _own_files(include_path):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _own_files(include_path: Path | None) -> list[Path]:
    """Task files of a directory, given as it is or relative to the repository."""
    if include_path is None:
        return []
    where = [include_path.expanduser(), REPOSITORY / include_path]
    directory = next((path for path in where if path.is_dir()), None)
    if directory is None:
        raise UserError(
            f"{include_path} is no directory",
            where="scoring.include_path",
            fix="Give a directory of lm-eval tasks; those of `presets/` come with a checkout only.",
        )
    return sorted(path for path in directory.iterdir() if path.suffix in TASK_FILES and path.is_file())


def _check_known(manager: TaskManager, name: str) -> None:
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=5)
        fix = f"Did you mean {', '.join(near)}?" if near else "List all names with `lm-eval ls tasks`."
        raise UserError("no such lm-eval task", where=f"scoring.tasks: {name}", fix=fix)


def _load(manager: TaskManager, name: str) -> list[Any]:
    where = f"scoring.tasks: {name}"
    try:
        loaded = manager.load([name])
    except (ConnectionError, TimeoutError, *NO_ANSWER, HfHubHTTPError) as error:
        raise TemporaryError(f"{where}: the Hub cannot be reached for the task's data ({error})") from error
    except FileNotFoundError as error:
        raise UserError(
            f"the task's data is not there ({error})", where=where, fix="Set data.test_fraction or data.test_source."
        ) from error
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _scores(results: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    values = results["results"][task]
    scores = {}
    for key, value in values.items():
        metric, _, choice = key.partition(",")
        if not choice or metric.endswith("_stderr"):
            continue
        scores[_metric_name(metric, choice)] = {
            "value": _finite(value),
            "stderr": _finite(values.get(f"{metric}_stderr,{choice}")),
            "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
            "n": values["sample_len"],
        }
    return scores


def _documents(results: Mapping[str, Any], task: str) -> dict[str, list[float]]:
    """The values that were averaged; a metric that is no mean over documents (BLEU, perplexity) has none."""
    documents: dict[str, list[float]] = {}
    for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            documents.setdefault(_metric_name(metric, sample["filter"]), []).append(sample[metric])
    scores = _scores(results, task)
    return {
        name: [float(value) for value in values]
        for name, values in documents.items()
        if all(isinstance(value, int | float) for value in values)
        and math.isclose(math.fsum(values) / len(values), scores[name]["value"] or 0.0, abs_tol=1e-9)
    }


def _metric_name(metric: str, choice: str) -> str:
    """`choice` is lm-eval's filter of the answers; named only where there is one."""
    return metric if choice == "none" else f"{metric},{choice}"


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
