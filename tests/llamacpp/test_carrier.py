"""A vocabulary in a model that is small enough; tests/llamacpp/test_template_proof.py has llama.cpp load one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

from tasks.llamacpp.carrier import HIDDEN, has_tensors, write_carrier


def write_vocabulary(file: Path, fillers: int) -> None:
    """Write a vocabulary with values of each type, and one of a length that moves what follows."""
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_context_length(4096)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "é" * 100, ""])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_token_types([1, 3, 4])
    writer.add_token_merges([])
    writer.add_add_bos_token(True)
    writer.add_eos_token_id(2)
    writer.add_chat_template("x" * fillers)
    writer.add_name("not kept")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def values(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("fillers", [1, 9, 20, 32])
def test_it_has_all_of_the_vocabulary_and_a_model_of_its_own(tmp_path: Path, fillers: int) -> None:
    vocabulary, carrier = tmp_path / "vocabulary.gguf", tmp_path / "carrier.gguf"
    write_vocabulary(vocabulary, fillers)
    write_carrier(vocabulary, carrier)
    assert (has_tensors(vocabulary), has_tensors(carrier)) == (False, True)
    before, after = values(vocabulary), values(carrier)
    kept = {name for name in before if name.startswith("tokenizer.")}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept} and len(kept) == 7
    assert (after["general.architecture"], after["llama.block_count"]) == ("llama", 1)
    assert "general.name" not in after and "qwen2.context_length" not in after
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(carrier).tensors}
    assert list(tensors["token_embd.weight"].shape) == [HIDDEN, 3]
    assert all((tensors[name].data == 1).all() for name in ("output_norm.weight", "blk.0.ffn_norm.weight"))
    assert all(tensor.data_offset % 32 == 0 for tensor in tensors.values())


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(20), b"GGUX" + bytes(7) + b"\1" + bytes(12)])
def test_what_is_no_model_has_no_tensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert not has_tensors(tmp_path / "file")
