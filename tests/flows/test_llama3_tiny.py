"""The preset `llama3-tiny`, whole: vocabulary and format of the reference set-up, from a package to Ollama's store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.finetune import Finetuned, finetune, stages
from tasks.engine.planning import Plan, planning
from tasks.llamacpp.load import load_gguf
from tasks.ollama.directory import OllamaDirectory
from tasks.ollama.names import parse_name
from tasks.settings.presets import load_settings

BEGIN, END = 128_000, 128_001


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Other places, and fewer rows: each validation of 64 rows takes seconds with so large a vocabulary."""
    directory = tmp_path_factory.mktemp("llama3-tiny")
    rows = [{"prompt": f"Add {i} and {i}.", "completion": f"The sum is {2 * i}."} for i in range(20)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "store": str(directory / "store"),
        "data": {"source": str(directory / "rows.jsonl"), "validation_fraction": 0.2},
        "ollama": {"models": str(directory / "ollama")},
    }


@pytest.fixture(scope="module")
def finetuned(overrides: dict[str, Any], in_this_process: None, prefect_server: None) -> Finetuned:
    result = finetune("llama3-tiny", "grit", overrides)
    assert isinstance(result, Finetuned)
    return result


@pytest.fixture(scope="module")
def done(overrides: dict[str, Any], finetuned: Finetuned) -> Iterator[Plan]:
    """The run's stages and their results."""
    with planning() as plan:
        stages(load_settings("llama3-tiny", overrides | {"method": "grit"}))
    yield plan


def test_it_ends_with_a_promoted_model_in_a_store(finetuned: Finetuned, overrides: dict[str, Any]) -> None:
    assert finetuned.promotion.facts["promoted"], finetuned.promotion.facts["checks"]
    place, version = OllamaDirectory(Path(overrides["ollama"]["models"])), finetuned.registration.facts["model"]
    assert version.startswith("llama3-tiny-grit:")
    assert place.digest(parse_name("llama3-tiny-grit")) == place.digest(parse_name(version)) is not None
    modelfile = (finetuned.registration.path / "Modelfile").read_text()
    assert "### Instruction:" in modelfile and "llama3" in modelfile


def test_llama_cpp_reads_its_texts_as_the_tokenizer_does(done: Plan) -> None:
    assert done.result_of("check_vocabulary").facts["wrong_texts"] == []


def test_the_gguf_has_llama_3s_vocabulary_under_llama_cpps_name_of_it(finetuned: Finetuned) -> None:
    gguf = load_gguf(finetuned.gguf.path / "model.gguf", vocab_only=True)
    try:
        assert gguf.metadata["tokenizer.ggml.pre"] == "llama-bpe"
        assert (gguf.n_vocab(), gguf.token_bos(), gguf.token_eos()) == (128_256, BEGIN, END)
    finally:
        gguf.close()


def test_each_row_begins_once_and_ends_its_answer(done: Plan) -> None:
    rows = pq.read_table(done.result_of("prepare_dataset").path / "train.parquet").to_pylist()
    assert rows
    for row in rows:
        assert row["input_ids"].index(BEGIN) == 0 and row["input_ids"].count(BEGIN) == 1
        assert END in row["labels"], "that an answer ends is learned"
