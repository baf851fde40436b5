"""GGUF files, changed byte by byte where the library `gguf` would take seconds to write them anew."""

from __future__ import annotations

import struct

START = 24
"""Where the first key begins: after the magic, the version and the numbers of tensors and keys."""
ALIGNMENT = 32
"""What is put in front is a multiple of this, so that the padding before the tensors stays as it is."""
CHAT_TEMPLATE = "tokenizer.chat_template"


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
    return _text(key) + struct.pack("<I", 8) + _text(text)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
