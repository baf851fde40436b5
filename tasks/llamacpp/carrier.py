"""A GGUF with the vocabulary of another and the smallest of models: llama.cpp's server takes none without weights.

The values of the vocabulary are copied as bytes. The library `gguf` takes them apart, which takes 17 seconds for the
128,256 tokens of Llama 3.
"""

from __future__ import annotations

import errno
import mmap
import struct
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

KEPT = b"tokenizer."
"""How the names of what is kept begin: the vocabulary, how it is read, and the chat template."""
TOKENS = b"tokenizer.ggml.tokens"
HIDDEN = 16
CONTEXT = 64
ALIGNMENT = 32
"""Tensors begin at multiples of it."""
_HEADER = struct.Struct("<4sIQQ")
"""The letters GGUF, version, number of tensors, number of values."""
_TYPE, _LENGTH = struct.Struct("<I"), struct.Struct("<Q")


def has_tensors(file: Path) -> bool:
    """Whether a GGUF holds a model, and not a vocabulary alone.

    Args:
        file: the GGUF.
    """
    with file.open("rb") as content:
        magic, _version, tensors, _values = _HEADER.unpack(content.read(_HEADER.size).ljust(_HEADER.size, b"\0"))
    return bool(magic == b"GGUF" and tensors)


def write_carrier(vocabulary: Path, file: Path) -> None:
    """Write a Llama of one layer, whose weights are zeros, since nobody asks it for an answer.

    Args:
        vocabulary: a GGUF, with tensors or without.
        file: where the carrier goes.
    """
    with vocabulary.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as content:
        values, size = _kept(content)
    _write_model(file, size)
    model = file.read_bytes()
    magic, version, tensors, own = _HEADER.unpack_from(model)
    # A value without meaning fills up, so that the tensors behind all of them stay where they must begin.
    filler = _text(b"carrier.filler") + _TYPE.pack(GGUFValueType.STRING)
    room = -(sum(map(len, values)) + len(filler) + _LENGTH.size) % ALIGNMENT
    header = _HEADER.pack(magic, version, tensors, own + len(values) + 1)
    file.write_bytes(b"".join([header, *values, filler, _text(b" " * room), model[_HEADER.size :]]))


def _write_model(file: Path, size: int) -> None:
    writer = GGUFWriter(file, "llama")
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
    try:
        writer.write_tensors_to_file()
    except OSError as error:  # NumPy's own, which tells no reason
        raise OSError(error.errno or errno.ENOSPC, "no room for a model to ask llama.cpp by", str(file)) from error
    writer.close()


def _kept(content: mmap.mmap) -> tuple[list[bytes], int]:
    """The values of the vocabulary with their names, and how many tokens it has."""
    values, size, offset = [], 0, _HEADER.size
    for _ in range(_HEADER.unpack_from(content)[3]):
        start = offset
        offset = _after_text(content, offset)
        name = content[start + _LENGTH.size : offset]
        if name == TOKENS:
            (size,) = _LENGTH.unpack_from(content, offset + 2 * _TYPE.size)
        (kind,) = _TYPE.unpack_from(content, offset)
        offset = _after_value(content, offset + _TYPE.size, kind)
        if name.startswith(KEPT):
            values.append(content[start:offset])
    return values, size


def _after_value(content: mmap.mmap, offset: int, kind: int) -> int:
    count = 1
    if kind == GGUFValueType.ARRAY:
        (kind,), (count,) = _TYPE.unpack_from(content, offset), _LENGTH.unpack_from(content, offset + _TYPE.size)
        offset += _TYPE.size + _LENGTH.size
    if kind != GGUFValueType.STRING:
        return offset + count * GGUFReader.gguf_scalar_to_np[GGUFValueType(kind)]().itemsize
    for _ in range(count):
        offset = _after_text(content, offset)
    return offset


def _after_text(content: mmap.mmap, offset: int) -> int:
    return int(offset + _LENGTH.size + _LENGTH.unpack_from(content, offset)[0])


def _text(text: bytes) -> bytes:
    return _LENGTH.pack(len(text)) + text
