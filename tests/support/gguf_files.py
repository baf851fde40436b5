"""GGUF files, read and changed byte by byte: the library `gguf` takes seconds for a vocabulary."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START = 24
"""Where the first key begins: after the magic, the version and the numbers of tensors and keys."""
ALIGNMENT = 32
"""What is put in front is a multiple of this, so that the padding before the tensors stays as it is."""
CHAT_TEMPLATE = "tokenizer.chat_template"
TEXT, LIST = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The formats of numbers, by the type that a file says."""


@dataclass(frozen=True)
class Header:
    """What a GGUF says of itself, lists as none, and the number of its weights."""

    fields: dict[str, Any]
    parameters: int


class _Reader:
    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at = content, START

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.content, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.at += length
        return self.content[self.at - length : self.at].decode()

    def value(self) -> Any:
        kind = self.number("I")
        if kind != LIST:
            return self.text() if kind == TEXT else self.number(SCALARS[kind])
        kind, length = self.number("I"), self.number("Q")
        if kind != TEXT:
            self.at += length * struct.calcsize(f"<{SCALARS[kind]}")
        for _ in range(length if kind == TEXT else 0):
            skipped = self.number("Q")
            self.at += skipped
        return None

    def weights(self) -> int:
        """Of the next tensor: name, number of dimensions, dimensions, type and offset."""
        self.text()
        shape = [self.number("Q") for _ in range(self.number("I"))]
        self.at += 12
        return math.prod(shape)


def read_header(file: Path) -> Header:
    """Read what stands before the weights.

    Args:
        file: a GGUF of this machine's byte order.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        tensors, keys = struct.unpack_from("<QQ", content, 8)
        reader = _Reader(content)
        fields = {reader.text(): reader.value() for _ in range(keys)}
        return Header(fields, sum(reader.weights() for _ in range(tensors)))


def with_key(content: bytes, key: str, text: str) -> bytes:
    """Put a text into a GGUF's metadata, and a second one that fills up to the alignment.

    Args:
        content: the file.
        key: which it does not have.
        text: the key's value.

    Returns:
        The new file.
    """
    tensors, keys = struct.unpack_from("<QQ", content, 8)
    filler = f"{key}.padding"
    new = _entry(key, text)
    new += _entry(filler, "." * (-(len(new) + len(_entry(filler, ""))) % ALIGNMENT))
    return content[:8] + struct.pack("<QQ", tensors, keys + 2) + new + content[START:]


def with_chat_template(content: bytes, jinja: str | None) -> bytes:
    """Give a GGUF another chat template; the one that it has lies under a key that nobody reads.

    Args:
        content: a file with a chat template.
        jinja: its new one, or none.

    Returns:
        The new file.
    """
    key = _text(CHAT_TEMPLATE)
    assert content.count(key) == 1
    content = content.replace(key, _text(CHAT_TEMPLATE.replace("chat", "past")))
    return content if jinja is None else with_key(content, CHAT_TEMPLATE, jinja)


def _entry(key: str, text: str) -> bytes:
    return _text(key) + struct.pack("<I", TEXT) + _text(text)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
