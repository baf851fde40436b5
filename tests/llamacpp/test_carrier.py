"""A vocabulary in a model that llama.cpp loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from tasks.llamacpp.carrier import has_tensors, write_carrier
from tasks.llamacpp.load import check_loads


def kept(file: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(file).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


def test_it_loads_and_has_all_of_the_vocabulary(tiny_gguf: Path, tmp_path: Path) -> None:
    carrier = tmp_path / "carrier.gguf"
    write_carrier(tiny_gguf, carrier)
    assert has_tensors(carrier)
    check_loads(carrier)
    before, after = map(kept, (tiny_gguf, carrier))
    assert after == before
    assert carrier.stat().st_size < 64 * 2 * len(before["tokenizer.ggml.tokens"]) + 5_000_000


def test_what_is_no_gguf_has_no_tensors(tmp_path: Path) -> None:
    for content in (b"GGUF" + bytes(16), b"GGUX" + bytes(15) + b"\1"):
        (tmp_path / "file").write_bytes(content)
        assert not has_tensors(tmp_path / "file")
