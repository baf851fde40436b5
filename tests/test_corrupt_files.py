"""Damaged files: truncated anywhere, with bits flipped anywhere, they end no process and register nothing."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tasks.chat.applying import apply_chat_format
from tasks.engine.artifacts import Artifact, Store, reference
from tasks.engine.errors import UserError
from tasks.llamacpp.load import check_loads
from tasks.merge import merge
from tasks.model.files import model_facts
from tasks.register import register
from tasks.settings.export import OllamaSettings
from tests.support.made_artifacts import SERVING

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"


def damaged(content: bytes, bits: list[int], end: int | None = None) -> bytes:
    """The content up to `end`, with bits flipped."""
    changed = bytearray(content[:end])
    for bit in bits:
        changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    return bytes(changed)


def header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


@pytest.fixture
def dataset(smollm2_tokenizer: PreTrainedTokenizerFast, store: Store) -> Artifact:
    with store.draft("dataset") as draft:
        apply_chat_format(smollm2_tokenizer, "chatml").save_pretrained(draft.path / "tokenizer")
        draft.facts = SERVING | {"stops": [], "max_length": 64}
    return draft.done()


@pytest.fixture
def adapter(tiny_model: Artifact, store: Store) -> Artifact:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    with store.draft("adapter") as draft:
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model.path), config).save_pretrained(str(draft.path))
    return draft.done()


def copied(artifact: Artifact, directory: Path) -> Artifact:
    shutil.copytree(artifact.path, directory)
    return reference(artifact.kind, directory, [path.name for path in directory.iterdir() if path.is_file()], {})


@pytest.mark.parametrize("name", [MODEL, ADAPTER])
def test_damaged_weights_are_merged_or_refused(
    tiny_model: Artifact, dataset: Artifact, adapter: Artifact, store: Store, tmp_path: Path, name: str
) -> None:
    """A flipped weight is still a weight; a header that does not fit is refused, and nothing is left half-written."""
    model, change = copied(tiny_model, tmp_path / "model"), copied(adapter, tmp_path / "adapter")
    file = (model if name == MODEL else change).path / name
    whole, refused = file.read_bytes(), 0
    bits = st.lists(st.integers(0, 8 * header_size(whole) - 1), min_size=1, max_size=4)
    ends = st.none() | st.integers(1, len(whole) - 1)

    @FUZZ
    @given(bits, ends)
    def harmless(bits: list[int], end: int | None) -> None:
        nonlocal refused
        file.write_bytes(damaged(whole, bits, end))
        shutil.rmtree(store.root / "merged", ignore_errors=True)
        try:
            if name == MODEL:
                model_facts(model.path, False)
            merged = merge.function(model, dataset, change, False, None, store=store)
        except (UserError, RuntimeError) as error:
            assert str(error)
            refused += 1
            assert not (store.root / "merged").exists() and not list((store.root / "drafts").iterdir())
        else:
            assert {path.name for path in merged.path.iterdir()} == set(merged.files)

    harmless()
    assert refused > 30


def flips(file: Path) -> Iterator[tuple[int, int]]:
    """Bits in each part of a GGUF: counts, keys, types, lengths, tensors' names, shapes and offsets."""
    reader, chosen = GGUFReader(file), random.Random(3)  # noqa: S311, no secrets here
    keys = [field.offset for field in reader.fields.values() if field.offset]
    tensors = [tensor.field.offset for tensor in reader.tensors]
    places = [4, 8, 15, 16, 23, *(offset + chosen.randrange(16) for offset in chosen.sample(keys, 5))]
    places += [offset + chosen.randrange(40) for offset in chosen.sample(tensors, 4)]
    yield from ((place, chosen.randrange(8)) for place in places)


def test_a_damaged_gguf_is_loaded_or_refused_in_a_process_of_its_own(tiny_gguf: Path, tmp_path: Path) -> None:
    whole, file, refused = tiny_gguf.read_bytes(), tmp_path / "model.gguf", []
    ends = [0, 3, 24, 4096, len(whole) // 2]
    for content in [
        *(damaged(whole, [8 * place + bit]) for place, bit in flips(tiny_gguf)),
        *(whole[:end] for end in ends),
    ]:
        file.write_bytes(content)
        try:
            check_loads(file)
        except UserError as error:
            refused.append(str(error))
    assert all("llama.cpp cannot load the GGUF: " in message for message in refused)
    assert len(refused) > len(ends) + 3
    check_loads(tiny_gguf)


@pytest.mark.parametrize("harm", ["flip", "truncate"])
def test_a_file_that_is_not_what_was_made_is_not_registered(
    tiny_gguf: Path, dataset: Artifact, store: Store, tmp_path: Path, harm: str
) -> None:
    with store.draft("gguf") as draft:
        shutil.copyfile(tiny_gguf, draft.path / "model.gguf")
    gguf, target = draft.done(), OllamaSettings(target="store", models=tmp_path / "models")
    file = gguf.path / "model.gguf"
    if harm == "flip":
        file.write_bytes(damaged(file.read_bytes(), [8 * (file.stat().st_size - 5)]))
    else:
        os.truncate(file, file.stat().st_size - 1)
    with pytest.raises((UserError, RuntimeError), match="digest differs"):
        register.function(gguf, dataset=dataset, settings=target, name="it", license_name=None, store=store)
    assert not list((tmp_path / "models").rglob("sha256-*")) and not (tmp_path / "models" / "manifests").exists()
