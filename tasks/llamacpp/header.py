"""What Ollama writes down about a GGUF, read from its header."""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.engine.errors import UserError


def gguf_config(gguf: Path, name_of_type: Callable[[str], str]) -> dict[str, Any]:
    """The config blob of a GGUF: format, family, size and quantisation.

    Args:
        name_of_type: called with llama.cpp's number of the file's type, as text, which is empty where the header has
            none; returns Ollama's name of it.

    Raises:
        UserError: llama.cpp cannot load it.
    """
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # else it tells all that it reads
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True  # of the tensors it then reads the sizes alone
    model = llama_cpp.llama_model_load_from_file(os.fsencode(gguf), parameters)
    if model is None:
        fix = "Run again, and it is made anew; if that does not help, check the disk and the base model's files."
        raise UserError("llama.cpp cannot load the GGUF", where=gguf, fix=fix)
    try:
        general = {name: _metadata(model, f"general.{name}") for name in ("architecture", "file_type")}
        count = int(llama_cpp.llama_model_n_params(model))
    finally:
        llama_cpp.llama_model_free(model)
    return {
        "model_format": "gguf",
        "model_family": general["architecture"],
        "model_families": [general["architecture"]],
        "model_type": human_parameters(count),
        "file_type": name_of_type(general["file_type"]),
        "architecture": "amd64",
        "os": "linux",
    }


def _metadata(model: Any, key: str) -> str:
    """A value of the header as text; empty where there is none."""
    import llama_cpp

    text = ctypes.create_string_buffer(256)
    llama_cpp.llama_model_meta_val_str(model, key.encode(), text, len(text))
    return text.value.decode()


def human_parameters(count: int) -> str:
    """A number of parameters as Ollama writes it, in decimal units: 8.0B, 134.52M.

    Args:
        count: parameters.
    """
    for unit, letter, digits in ((1e9, "B", 1), (1e6, "M", 2), (1e3, "K", 0)):
        if count >= unit:
            value = count / unit
            return f"{value:.0f}{letter}" if value == math.floor(value) else f"{value:.{digits}f}{letter}"
    return str(count)
