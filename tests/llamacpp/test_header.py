"""What is read of a GGUF's header."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from tasks.engine.errors import UserError
from tasks.llamacpp.header import gguf_config

NAMES = {"7": "Q8_0", "": "unknown"}


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all" * 100])
def test_what_is_no_gguf_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"model.gguf: llama.cpp cannot load the GGUF"):
        gguf_config(tmp_path / "model.gguf", NAMES.__getitem__)


@pytest.mark.parametrize("file_type", [None, 7])
def test_the_config_is_read_from_the_header(tmp_path: Path, file_type: int | None) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("no_vocab")
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_tensor("token_embd.weight", np.zeros((50, 1000), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = gguf_config(tmp_path / "model.gguf", NAMES.__getitem__)
    assert (config["model_family"], config["model_type"]) == ("llama", "50K")
    assert config["file_type"] == ("Q8_0" if file_type else "unknown")
