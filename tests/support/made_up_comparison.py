"""Outputs of trainings that never ran, as a comparison takes them: any number of methods, seeds and steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from safetensors.numpy import save_file

from tasks.analysis.compared_runs import BaseFigures, ComparedRun, FaultRun, RateTrial
from tasks.comparison.write_comparison import write_comparison
from tasks.engine.artifacts import Artifact, Store, reference
from tasks.settings.comparison import CompareSettings
from tasks.settings.presets import load_settings

MACHINE = {"processor": "CPU X", "cores": 2, "memory_bytes": 24 * 2**30, "device": "CPU", "system": "Linux"}
ROWS = 12
PROMPTS = 6
EXPECTED = '{"name": "Ada Lovelace", "born": 1815, "address": "12, St James\'s Square, London"}'


class MadeUp:
    """A directory of outputs.

    Args:
        directory: where they are written.
        steps: of each training.
        validations: of each training, beside the one before the first step.
    """

    def __init__(self, directory: Path, steps: int = 20, validations: int = 4) -> None:
        self.directory, self.steps, self.validations = directory, steps, validations
        self.lm_eval: dict[str, Any] = {
            "arc": {"acc": {"value": 0.5, "stderr": 0.1, "higher_is_better": True, "n": PROMPTS}}
        }
        self.documents: dict[str, Any] = {"arc": {"acc": [0.0, 1.0] * (PROMPTS // 2)}}
        self.model = self.artifact("model", {"config.json": "{}"}, {})
        card = {"rows": {"train": 900, "validation": ROWS, "test": PROMPTS}, "max_length": 2048,
                "tokens": {"train": 90_000}, "supervised_tokens": {"train": 27_000}}  # fmt: skip
        self.dataset = self.artifact("dataset", {"card.json": json.dumps(card)}, card)
        self.base = BaseFigures(
            scores=self.scores(0.5), answers=self.answers("base"), forgetting=self.rows("forgetting", 0.1),
            second=self.rows("second_data", 0.3),
        )  # fmt: skip

    def artifact(self, kind: str, files: dict[str, str], facts: dict[str, Any]) -> Artifact:
        """An artifact of these files."""
        number = len(list(self.directory.iterdir())) if self.directory.exists() else 0
        where = self.directory / f"{kind}-{number}"
        for name, text in files.items():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_text(text, encoding="utf-8")
        return reference(kind, where, list(files), facts)

    def rows(self, kind: str, shift: float) -> Artifact:
        """Losses of rows that are the same for all but a shift per token."""
        return self.artifact(kind, {"rows.json": json.dumps(_losses(shift))}, {"of_sha256": f"that of {kind}"})

    def scores(self, shift: float) -> Artifact:
        """The scores of a model, with what `lm_eval` and `documents` hold now."""
        whole = {"validation": {"rows": ROWS}, "lm_eval": self.lm_eval}
        rows = {"validation": _losses(shift), "lm_eval": self.documents}
        return self.artifact("scores", {"scores.json": json.dumps(whole), "rows.json": json.dumps(rows)}, {})

    def answers(self, who: str) -> Artifact:
        """Answers, of which every other one is right."""
        lines = [
            {
                "prompt": f"Extract the person as JSON: Ada Lovelace, born in 1815, lived in London ({index}).",
                "expected": EXPECTED,
                "answer": EXPECTED if index % 2 else f'{{"name": "{who}", "born": {index}',
                "metrics": {"rouge_l": (crc32(who.encode()) + index) % 7 / 7, "exact_match": index % 2, "stopped": 1.0,
                             "repetition": 0.0, "json_valid": index % 2},
            }
            for index in range(PROMPTS)
        ]  # fmt: skip
        return self.artifact("answers", {"answers.jsonl": "".join(json.dumps(line) + "\n" for line in lines)}, {})

    def history(self, shift: float, seed: int, grit: bool = False, **facts: Any) -> Artifact:
        """A training's history; `facts` replace those of the summary."""
        noise = np.random.default_rng(seed).normal(0, 0.05, self.steps)
        numbers = range(1, self.steps + 1)
        losses = [1 + shift + 2 * 0.9 ** (20 * step / self.steps) for step in numbers]
        lines = [
            {"step": step, "loss": loss + noise[step - 1], "faulty_loss": loss / 10, "grad_norm": 0.3,
             "supervised_tokens": 100, "seconds": 1.5}
            for step, loss in zip(numbers, losses, strict=True)
        ]  # fmt: skip
        every = self.steps // self.validations
        points = [[0, 3.0 + shift], *([step, losses[step - 1] + 0.1] for step in numbers[every - 1 :: every])]
        files = {"history.jsonl": "".join(json.dumps(line) + "\n" for line in lines), "tensorboard/events": ""}
        if grit:
            modules = [
                {"step": self.steps, "module": f"model.layers.{layer}.self_attn.{projection}_proj",
                 "cosine": 0.5 + 0.1 * layer, "effective_rank_h": 3.0 + layer, "effective_rank_u": 2.0 + seed % 2}
                for layer in range(4) for projection in "qkvo"
            ]  # fmt: skip
            files["modules.jsonl"] = "".join(json.dumps(line) + "\n" for line in modules)
        summary = {
            "validation": points, "kept": None, "basis_seconds": 2.0 if grit else 0.0, "tokens": 9000,
            "supervised_tokens": 100 * self.steps, "median_seconds_per_step": 1.5, "total_seconds": 1.5 * self.steps,
            "peak_memory_bytes": 2_500_000_000, "peak_memory_kind": "resident set", "trainable_parameters": 4096,
            "energy_joules": None, "gpu_energy_joules": None, "device": "CPU", "machine": MACHINE,
        }  # fmt: skip
        return self.artifact("history", files, summary | facts)

    def run(self, method: str, seed: int, shift: float, **facts: Any) -> ComparedRun:
        """All of one training."""
        adapter = self.artifact("adapter", {"adapter_model.safetensors": ""}, {})
        save_file({"a": np.zeros((4, 8), np.float32)}, adapter.path / "adapter_model.safetensors")
        jitter = shift + 0.002 * (seed % 3)
        return ComparedRun(
            method=method, seed=seed, adapter=adapter,
            history=self.history(jitter, seed, method.partition(":")[0] == "grit", **facts), scores=self.scores(jitter),
            gguf=self.artifact("gguf", {"model.gguf": "x"}, {}), answers=self.answers(f"{method} {seed}"),
            forgetting=self.rows("forgetting", 0.1 + jitter / 10), second=self.rows("second_data", 0.2 + jitter),
        )  # fmt: skip

    def runs(self, methods: Sequence[str], seeds: int) -> tuple[ComparedRun, ...]:
        """Methods of different losses."""
        places = [(seed, place) for seed in range(3407, 3407 + seeds) for place in range(len(methods))]
        return tuple(self.run(methods[place], seed, -0.1 * place) for seed, place in places)

    def report(
        self,
        runs: tuple[ComparedRun, ...],
        trials: tuple[RateTrial, ...] = (),
        fault: bool = False,
        **comparison: Any,
    ) -> Artifact:
        """The report of these runs."""
        faults = (FaultRun(seed=3407, history=self.history(0.2, 1)),) if fault else ()
        methods = tuple(dict.fromkeys(run.method for run in runs))
        wanted = CompareSettings(methods=methods, seeds=len(runs) // len(methods), **comparison)
        store = Store(self.directory / "store")
        return write_comparison.function(
            load_settings("demo"), comparison=wanted, model=self.model, dataset=self.dataset, base=self.base,
            trials=trials, runs=runs, faults=faults, not_run={}, store=store,
        )  # fmt: skip


def by_method(runs: Sequence[ComparedRun]) -> dict[str, list[ComparedRun]]:
    """Runs of each method, in their order."""
    return {method: [run for run in runs if run.method == method] for method in dict.fromkeys(r.method for r in runs)}


def _losses(shift: float) -> dict[str, Any]:
    tokens = [10 + row for row in range(ROWS)]
    noise = np.random.default_rng(crc32(str(shift).encode())).normal(0, 0.02, ROWS)
    nll = [(1.2 + 0.05 * row + shift + noise[row]) * count for row, count in enumerate(tokens)]
    return {"nll": nll, "supervised_tokens": tokens}
