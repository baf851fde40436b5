"""A GGUF with the vocabulary of another and the smallest of models: llama.cpp's server takes none without weights."""

from __future__ import annotations

import struct
from pathlib import Path

KEPT = "tokenizer."
"""How the names of what is kept begin: the vocabulary, how it is read, and the chat template."""
HIDDEN = 64
CONTEXT = 64
_HEADER = struct.Struct("<4sIQ")


def has_tensors(file: Path) -> bool:
    """Whether a GGUF holds a model, and not a vocabulary alone.

    Args:
        file: the GGUF.
    """
    with file.open("rb") as content:
        magic, _version, tensors = _HEADER.unpack(content.read(_HEADER.size))
    return bool(magic == b"GGUF" and tensors)


def write_carrier(vocabulary: Path, file: Path) -> None:
    """Write a Llama of one layer, whose weights are zeros, since nobody asks it for an answer.

    Args:
        vocabulary: a GGUF, with tensors or without.
        file: where the carrier goes.
    """
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(vocabulary)
    writer = gguf.GGUFWriter(file, "llama")
    for name, field in reader.fields.items():
        if name.startswith(KEPT):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    size = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer.add_vocab_size(size)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((size, HIDDEN), dtype=np.float16))
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", np.ones(HIDDEN, dtype=np.float32))
    for matrix in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{matrix}.weight", np.zeros((HIDDEN, HIDDEN), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
