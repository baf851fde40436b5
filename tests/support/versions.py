"""The end of a run, for tests of what is in use: models that nobody runs, with scores as wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tasks.engine.artifacts import Artifact, Store
from tasks.export.checks import Check
from tasks.ollama.names import ModelName
from tasks.ollama.registry import Registry, registry
from tasks.ollama.rollback import Versions
from tasks.promote import in_use_as_judged, present_model, promote
from tasks.register import register
from tasks.settings.export import OllamaSettings, PromotionSettings
from tasks.settings.finetune import FinetuneSettings
from tests.support.made_artifacts import make, make_dataset, scores

BASE = [20.0, 30.0, 40.0, 50.0]
"""Negative log-likelihood of each row by the base model."""
LATEST = ModelName("it")


def write_gguf(path: Path, number: int) -> None:
    """A small whole file without a vocabulary; nobody runs it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tensor("token_embd.weight", np.full((64, 128), number, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Pipeline:
    """The end of a run, with scores as wanted."""

    def __init__(self, store: Store, ollama_settings: OllamaSettings) -> None:
        self.store, self.ollama = store, ollama_settings
        self.dataset, self.registrations = make_dataset(store), dict[int, Artifact]()
        place = registry(ollama_settings)
        assert place is not None
        self.place: Registry = place

    def settings(self, **promotion: Any) -> FinetuneSettings:
        return FinetuneSettings(ollama=self.ollama, promotion=PromotionSettings(**promotion))

    def registered(self, number: int, chat_fault: str | None = None) -> Artifact:
        with self.store.draft("gguf") as draft:
            write_gguf(draft.path / "model.gguf", number)
        registration = register.function(
            draft.done(), dataset=self.dataset, settings=self.ollama, name="it", license_name=None, store=self.store
        )
        self.registrations[number] = registration
        if "chat_fault" in registration.facts:
            return registration.model_copy(update={"facts": registration.facts | {"chat_fault": chat_fault}})
        return registration

    def run(
        self,
        number: int,
        gain: float,
        *,
        exact: tuple[float, float] | None = None,
        faithful: bool = True,
        compared: bool = True,
        chat_fault: str | None = None,
        **promotion: Any,
    ) -> Artifact:
        """Judge the model of that number, whose likelihood is better than the base model's by `gain` nats a row.

        Args:
            number: tells models apart.
            gain: in nats.
            exact: exact match of base and tuned model.
            faithful: whether the GGUF is.
            compared: whether the model in use can be scored.
            chat_fault: what a server says.
            promotion: settings.
        """
        reading = "passed" if faithful else "failed"
        fidelity = make(self.store, "fidelity", {"checks": [Check("mean KL divergence", "1", "0", reading)._asdict()]})
        registration = self.registered(number, chat_fault)
        base = scores(self.store, BASE, exact[0] if exact else None)
        tuned = scores(self.store, self.rows(number, gain), exact[1] if exact else None)
        merged = make(self.store, "merged", {}, weights=[number, gain])
        settings = self.settings(**promotion)
        present = present_model(self.ollama, "it", registration, self.store)
        present_scores = None
        if present and compared:
            weights = json.loads((present.merged.path / "weights.json").read_text())
            present_scores = scores(self.store, self.rows(*weights), exact[0] if exact else None)
        arguments: dict[str, Any] = {
            "dataset": self.dataset, "merged": merged, "fidelity": fidelity, "registration": registration,
            "base": base, "tuned": tuned, "present": present_scores,
            "present_digest": present.digest if present else None,
        }  # fmt: skip
        artifact = promote.function(settings, **arguments, store=self.store)
        assert in_use_as_judged(artifact, settings=settings, **arguments)
        assert artifact.facts["promoted"] == (self.in_use() == registration.facts["digest"])
        return artifact

    def rows(self, number: int, gain: float) -> list[float]:
        return [nll - gain + 0.01 * number * (-1) ** i for i, nll in enumerate(BASE)]

    def in_use(self) -> str | None:
        return self.place.digest(LATEST)

    def versions(self) -> Versions:
        return Versions(self.ollama, "it", self.store)

    def states(self) -> dict[str, str]:
        return {version.digest: version.state for version in self.versions().all()}


def tag_of(pipeline: Pipeline, number: int) -> str:
    return str(pipeline.registered(number).facts["model"])


def failed(promotion: Artifact) -> list[str]:
    return [check["key"] for check in promotion.facts["checks"] if check["reading"] == "failed"]
