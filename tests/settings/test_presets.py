from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from grit.config import GRITConfig
from tasks.engine.paths import REPOSITORY
from tasks.ollama.names import model_name
from tasks.settings.finetune import FinetuneSettings
from tasks.settings.presets import PRESETS, load_settings

STUDY = {
    "seed": 3407,
    "model.name": "meta-llama/Meta-Llama-3-8B",
    "model.quantization": "nf4",
    "model.double_quantization": True,
    "model.dtype": "bfloat16",
    "data.source": "vicgalle/alpaca-gpt4",
    "data.max_length": 2048,
    "chat.format": "alpaca",
    "lora.r": 16,
    "lora.alpha": 16,
    "lora.dropout": 0,
    "lora.target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "training.per_device_batch_size": 2,
    "training.gradient_accumulation_steps": 4,
    "training.max_steps": 200,
    "training.warmup_steps": 5,
    "training.learning_rate": 2e-4,
    "training.lr_scheduler": "linear",
    "training.weight_decay": 0.01,
    "grit.kfac_update_freq": 10,
    "grit.kfac_min_samples": 16,
    "export.gguf_type": "q8_0",
    "ollama.name": "llama3-{method}",
    "ollama.target": "server",
}

DEPLOYED = {"grit": "llama3-grit", "baseline": "llama3-baseline", "demo": "demo-grit"}
"""The deployments of `finetune`, and what each registers."""

DEPARTURES = {
    "training.backend": "transformers",
    "training.optimizer": "adamw_torch",
    "training.batching": "length_grouped",
    "data.validation_fraction": 0.01,
    "grit.variant": "kfac",
    "grit.power": 0.5,
    "grit.norm_match": True,
    "grit.kfac_damping": 0.03,
}
"""Where the reference set-up is not the study's; docs/settings.md says why."""


def value(settings: FinetuneSettings, dotted: str) -> Any:
    setting: Any = settings
    for name in dotted.split("."):
        setting = getattr(setting, name)
    return setting


@pytest.mark.parametrize(("dotted", "wanted"), [*STUDY.items(), *DEPARTURES.items()])
def test_llama3_8b_is_the_reference_set_up(dotted: str, wanted: Any) -> None:
    assert value(load_settings("llama3-8b"), dotted) == wanted


def test_the_reference_set_up_begins_with_the_gradients_basis() -> None:
    """A departure from the study as well; by default the variant decides it."""
    assert GRITConfig(**load_settings("llama3-8b").grit.model_dump()).first_basis == "gradient"


@pytest.mark.parametrize("preset", [path.stem for path in PRESETS.glob("*.yaml")])
@pytest.mark.parametrize("method", ["baseline", "grit"])
def test_every_preset_loads_for_both_methods_and_names_the_model_after_it(preset: str, method: str) -> None:
    settings = load_settings(preset, {"method": method})
    assert model_name(settings).endswith(f"-{method}")
    assert settings.training.optimizer == "adamw_torch"


def test_the_demo_needs_no_hub_and_no_server() -> None:
    settings = load_settings("demo")
    assert settings.model.name.startswith("package:")
    assert settings.data.source.startswith("generated:")
    assert settings.ollama.target == "store"
    assert settings.ollama.parameters == {"temperature": 0}


def test_the_demos_lm_eval_task_is_right_only_for_the_exact_line(tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM

    from tasks.evaluation.lm_eval_tasks import load_tasks

    line = '{"intent":"order","name":"Ann Lee","city":"Leeds","item":"lamp","quantity":2,"date":null}'
    answers = {"right": line, "white space": f"\n {line} ", "wrong": line.replace("2", "3"), "cut": line[:-1]}
    rows = [{"messages": [], "prompt": prompt, "completion": line} for prompt in answers]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: list[dict[str, Any]] = []

    class Scripted(LM):
        def generate_until(self, requests: list[Any]) -> list[str]:
            asked.extend(request.args[1] for request in requests)
            return [answers[request.args[0]] for request in requests]

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise AssertionError("the task is scored by generated text")

        loglikelihood_rolling = loglikelihood

    tasks = load_tasks(load_settings("demo").scoring, tmp_path)
    results: Any = simple_evaluate(model=Scripted(), tasks=tasks, bootstrap_iters=0)
    assert results["results"]["extraction"]["exact_match,none"] == 0.5
    assert all(kwargs["until"] == ["\n"] and kwargs["do_sample"] is False for kwargs in asked)
    assert asked[0]["max_gen_toks"] == load_settings("demo").scoring.max_new_tokens


def test_deployments_name_both_methods_and_no_training_runs_by_itself() -> None:
    deployments = yaml.safe_load((PRESETS.parent / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    finetunes = [deployment for deployment in deployments if "finetune" in deployment["entrypoint"]]
    methods = {deployment["name"]: deployment["parameters"]["method"] for deployment in finetunes}
    assert methods == {"grit": "grit", "baseline": "baseline", "demo": "grit"}
    nightly, recover = (schedule for deployment in deployments for schedule in deployment.get("schedules", []))
    assert not nightly["active"] and nightly["timezone"] and nightly["parameters"] == {"skip_unchanged": True}
    assert recover["slug"] == "often"
    for deployment in deployments:
        path, name = deployment["entrypoint"].split(":")
        assert f"def {name}(" in (PRESETS.parent / path).read_text(encoding="utf-8")


def test_the_deployments_are_the_reference_set_up_and_the_demo() -> None:
    deployments = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    of_finetune = {it["name"]: it for it in deployments if it["entrypoint"] == "flows/finetune.py:finetune"}
    parameters = {name: deployment["parameters"] for name, deployment in of_finetune.items()}
    models = {
        name: model_name(load_settings(it["preset"], {"method": it["method"]})) for name, it in parameters.items()
    }
    assert models == DEPLOYED
    active = {
        name: [it["active"] for it in deployment.get("schedules", [])] for name, deployment in of_finetune.items()
    }
    assert active == {"grit": [False], "baseline": [], "demo": []}
