"""Energy of a training: the GPU's by NVML, and what both meters leave out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from tasks.settings.finetune import TrainingSettings
from tasks.training import energy
from tasks.training.energy import GpuEnergyMeter, gpu_in_use
from tasks.training.record import StepRecorder
from tests.standins.nvml import Gpu, NvmlStandIn

UUID = "GPU-3f2504e0-4f89-11d3-9a0c-0305e82c3301"


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> NvmlStandIn:
    standin = NvmlStandIn([Gpu("GPU-0", 7), Gpu(UUID, 41_000)])
    monkeypatch.setattr(energy, "pynvml", standin)
    return standin


def test_energy_of_a_gpu_is_what_its_counter_gains(nvml: NvmlStandIn) -> None:
    meter = GpuEnergyMeter(UUID)
    nvml.gpus[0].millijoules = 10**9
    nvml.gpus[1].millijoules = 42_500
    assert meter.read() == pytest.approx(1.5)
    nvml.gpus[1].millijoules = 50_000
    meter.skip()
    nvml.gpus[1].millijoules = 50_250
    assert meter.read() == pytest.approx(1.75)


def test_no_gpu_no_driver_an_old_gpu_or_a_refusal_tell_nothing(nvml: NvmlStandIn) -> None:
    meter = GpuEnergyMeter(UUID)
    nvml.gpus[1].millijoules = None
    assert meter.read() is None
    nvml.gpus[1].millijoules = 43_000
    assert meter.read() is None, "what was counted meanwhile is not known"
    nvml.gpus[1].millijoules = None
    assert [GpuEnergyMeter(uuid).read() for uuid in (UUID, "MIG-1", None)] == [None] * 3
    nvml.driver = nvml.ready = False
    assert GpuEnergyMeter(UUID).read() is None


def test_the_gpu_is_the_one_that_cuda_computes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_in_use() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: {2: SimpleNamespace(uuid=UUID.removeprefix("GPU-"))}[index]
    )
    assert gpu_in_use() == UUID


def test_validations_are_left_out(nvml: NvmlStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.training.record.gpu_in_use", lambda: UUID)
    gpu = nvml.gpus[1]
    assert gpu.millijoules is not None

    def spend(joules: float) -> float:
        gpu.millijoules += round(1000 * joules)
        return joules

    recorder = StepRecorder(tmp_path, lambda: spend(100), TrainingSettings(), lambda *_: None)
    state, control = TrainerState(max_steps=2), TrainerControl()
    recorder.trainer = SimpleNamespace(step_losses={}, step_tokens=1, step_supervised_tokens=1)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    recorder.on_train_begin(arguments, state, control)
    for step in (1, 2):
        recorder.on_step_begin(arguments, state, control)
        recorder.trainer.step_supervised_tokens = 1
        spend(2)
        recorder.on_step_end(arguments, state, control)
        state.global_step = step
        recorder.on_log(arguments, state, control, {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0})
    recorder.close()
    summary = recorder.summary()
    assert [step for step, _ in summary["validation"]] == [0, 2]
    assert summary["gpu_energy_joules"] == pytest.approx(4)
    recorder.resumed = True
    assert recorder.summary()["gpu_energy_joules"] is None
