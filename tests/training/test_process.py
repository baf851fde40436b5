"""Trainings that are killed, stopped and damaged, in real processes, and what they end with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import TemporaryError, UserError, is_temporary
from tasks.settings.finetune import GritSettings, LoraSettings, ModelSettings, TrainingSettings
from tasks.train import Training, train
from tasks.training import run as training_run
from tasks.training.job import Job
from tasks.training.process import facts_of
from tasks.training.progress import ProgressArtifact

BASE = ModelSettings(name="tiny", dtype="float32", quantization="none")
LORA = LoraSettings(r=4, alpha=8, dropout=0.1)
SIX_STEPS = TrainingSettings(
    max_steps=6, warmup_steps=1, learning_rate=1e-2, gradient_checkpointing=False, per_device_batch_size=2,
    gradient_accumulation_steps=2, save_steps=2, eval_steps=3,
)  # fmt: skip
GRIT = GritSettings(kfac_min_samples=1, kfac_update_freq=4, cov_update_freq=1)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of another number of threads differ in their last bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


@pytest.fixture(scope="module")
def dataset(tokenized_rows: Callable[[int, int], Artifact]) -> Artifact:
    return tokenized_rows(14, 2)


@pytest.fixture
def run(tiny_model: Artifact, dataset: Artifact, store: Store) -> Callable[..., Training]:
    def call(**changes: Any) -> Training:
        arguments = {"base": BASE, "lora": LORA, "training": SIX_STEPS, "grit": GRIT} | changes
        return train.function(tiny_model, dataset, seed=7, store=store, **arguments)

    return call


@pytest.fixture
def whole(run: Callable[..., Training], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Training]:
    """A training without a process of its own, which takes longer to begin than to train."""

    def call(**changes: Any) -> Training:
        with monkeypatch.context() as here:
            here.setattr("tasks.train.train_in_child", lambda job, show: training_run.Training(job, show).run())
            return run(**changes)

    return call


def at_step(number: int, act: Callable[[psutil.Process], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something to the training's process when it tells of a step."""

    def show(self: ProgressArtifact, step: int, steps: int, line: dict[str, Any]) -> None:
        if step == number:
            for child in psutil.Process().children():
                if "tasks.training.process" in child.cmdline():
                    act(child)

    monkeypatch.setattr(ProgressArtifact, "show", show)


def checkpoints(store: Store) -> list[Path]:
    return sorted((store.root / "checkpoints").glob("*/checkpoint-*"))


def lines(training: Training) -> list[dict[str, Any]]:
    text = (training.history.path / "history.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]


@pytest.mark.parametrize("grit", [None, GRIT])
def test_killed_and_run_again_it_ends_with_the_bits_of_an_undisturbed_run(
    run: Callable[..., Training],
    whole: Callable[..., Training],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    grit: GritSettings | None,
) -> None:
    undisturbed = whole(grit=grit)
    with monkeypatch.context() as context:
        at_step(5, lambda child: child.kill(), context)
        with pytest.raises(
            TemporaryError, match="ended by SIGKILL, perhaps by the system for want of memory"
        ) as caught:
            run(grit=grit)
    assert is_temporary(caught.value)
    assert [path.name for path in checkpoints(store)] == ["checkpoint-2", "checkpoint-4"]
    assert not list((store.root / "drafts").iterdir())
    seen: list[int] = []
    monkeypatch.setattr(ProgressArtifact, "show", lambda self, step, steps, line: seen.append(step))
    training = whole(grit=grit)
    assert seen == [5, 6], "it went on from the newest checkpoint"
    for name, weight in load_file(undisturbed.adapter.path / "adapter_model.safetensors").items():
        assert torch.equal(load_file(training.adapter.path / "adapter_model.safetensors")[name], weight)
    assert training.adapter.digest == undisturbed.adapter.digest
    assert lines(training) == lines(undisturbed)
    assert training.history.facts["validation"] == undisturbed.history.facts["validation"]
    assert not checkpoints(store)


def test_stopped_it_leaves_a_checkpoint_of_the_step_it_was_at(
    run: Callable[..., Training], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = SIX_STEPS.model_copy(update={"save_steps": None})
    with monkeypatch.context() as context:
        at_step(3, lambda child: child.send_signal(signal.SIGTERM), context)
        with pytest.raises(TemporaryError, match=r"stopped after step [345]; it can go on from there"):
            run(training=never)
    (left,) = checkpoints(store)
    # When a checkpoint is written decides nothing about the result, so the same training goes on.
    training = run()
    assert [line["step"] for line in lines(training)] == [1, 2, 3, 4, 5, 6]
    assert not left.exists()


def test_a_damaged_checkpoint_is_not_gone_on_from(
    run: Callable[..., Training], whole: Callable[..., Training], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        at_step(5, lambda child: child.kill(), context)
        with pytest.raises(TemporaryError):
            run()
    damaged = checkpoints(store)[-1] / "optimizer.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    seen: list[int] = []
    monkeypatch.setattr(ProgressArtifact, "show", lambda self, step, steps, line: seen.append(step))
    training = whole()
    assert seen == [3, 4, 5, 6]
    assert training.adapter.digest == whole().adapter.digest


def test_what_goes_wrong_comes_through(
    run: Callable[..., Training], tiny_model: Artifact, dataset: Artifact, store: Store
) -> None:
    with pytest.raises(UserError, match="training diverged at step"):
        run(training=SIX_STEPS.model_copy(update={"learning_rate": 1e30}))
    moved = tiny_model.model_copy(update={"path": Path("/nowhere")})
    with pytest.raises(RuntimeError, match="the training failed: .*Error: .*nowhere"):
        train.function(moved, dataset, base=BASE, lora=LORA, training=SIX_STEPS, grit=None, seed=7, store=store)


SMALL_DEVICE = """
import torch

embed = torch.nn.Embedding.forward

def forward(self, ids):
    if torch.is_grad_enabled() and len(ids) > {rows}:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return embed(self, ids)

torch.nn.Embedding.forward = forward
"""


@pytest.fixture
def small_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the training's process hold only so many rows at a time."""

    def hold(rows: int) -> None:
        (tmp_path / "sitecustomize.py").write_text(SMALL_DEVICE.format(rows=rows))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return hold


def test_out_of_memory_halves_the_rows_at_a_time_and_keeps_the_batch(
    run: Callable[..., Training],
    whole: Callable[..., Training],
    small_device: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    four = SIX_STEPS.model_copy(update={"per_device_batch_size": 4, "gradient_accumulation_steps": 1})
    small_device(1)
    lora = LORA.model_copy(update={"dropout": 0.0})  # what is dropped depends on how the batch is split
    training = run(training=four, lora=lora)
    warnings = [record.getMessage() for record in caplog.records if "Out of memory" in record.getMessage()]
    assert [("2 rows" in line, "1 rows" in line) for line in warnings] == [(True, False), (False, True)]
    assert "with 1 rows at a time and 4 accumulation steps" in warnings[-1]
    facts = training.history.facts
    assert (facts["per_device_batch_size"], facts["gradient_accumulation_steps"]) == (1, 4), "as it really ended"
    undisturbed = whole(training=four, lora=lora)
    for step, expected in zip(lines(training), lines(undisturbed), strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5), "the same batch of the same rows"
        assert step["supervised_tokens"] == expected["supervised_tokens"]
        assert step["learning_rate"] == expected["learning_rate"]


def test_where_a_single_row_does_not_fit_the_user_is_told(
    run: Callable[..., Training], small_device: Callable[[int], None]
) -> None:
    small_device(0)
    with pytest.raises(UserError, match=r"a single row does not fit into memory: .*Lower data\.max_length"):
        run(training=SIX_STEPS.model_copy(update={"per_device_batch_size": 1}), grit=None)


def test_a_busy_gpu_may_be_free_later() -> None:
    end = {"error": "AcceleratorError: CUDA error: all CUDA-capable devices are busy or unavailable"}
    with pytest.raises(TemporaryError, match="the GPU is busy"):
        facts_of(end, 1)


PARENT = """
import sys
import time
from pathlib import Path
from tasks.training.process import train_in_child
from tasks.training.job import Job

job = Job.model_validate_json(Path(sys.argv[1]).read_text())
with open(sys.argv[2], "w") as steps:
    train_in_child(job, lambda step, *_: print(step, file=steps, flush=True))
"""


def test_when_its_parent_dies_the_training_stops_with_a_checkpoint_and_the_next_goes_on(
    tiny_model: Artifact, dataset: Artifact, tmp_path: Path
) -> None:
    long = SIX_STEPS.model_copy(update={"max_steps": 10_000, "save_steps": None, "eval_steps": None})
    directories = {name: tmp_path / name for name in ("adapter", "history", "checkpoints")}
    for directory in directories.values():
        directory.mkdir()
    job = Job(model=tiny_model, dataset=dataset, base=BASE, lora=LORA, training=long, grit=None, seed=7, **directories)
    (tmp_path / "job.json").write_text(job.model_dump_json())
    outputs = [tmp_path / "one", tmp_path / "another"]

    def first_step(parent: subprocess.Popen[bytes], path: Path) -> tuple[int, psutil.Process]:
        while not path.is_file() or not path.read_text():
            assert parent.poll() is None
            time.sleep(0.1)
        (training,) = psutil.Process(parent.pid).children()
        return int(path.read_text().split()[0]), training

    with ExitStack() as stack:
        parents = []
        for path in outputs:
            command = [sys.executable, "-c", PARENT, str(tmp_path / "job.json"), str(path)]
            parents.append(stack.enter_context(subprocess.Popen(command, start_new_session=True)))
            stack.callback(parents[-1].kill)
        while not any(path.is_file() and path.read_text() for path in outputs):
            time.sleep(0.1)
        # Whichever comes second waits for the other's training, since both would write to the same place.
        first = 0 if outputs[0].read_text() else 1
        step, training = first_step(parents[first], outputs[first])
        assert step == 1
        assert not outputs[1 - first].read_text()
        parents[first].kill()
        assert psutil.wait_procs([training], timeout=300)[1] == []
        left = max(int(path.name.split("-")[1]) for path in (tmp_path / "checkpoints").glob("checkpoint-*"))
        step, training = first_step(parents[1 - first], outputs[1 - first])
        assert step == left + 1, "it went on from there"
        parents[1 - first].kill()
        assert psutil.wait_procs([training], timeout=300)[1] == []
