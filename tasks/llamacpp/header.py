"""What Ollama writes down about a GGUF, read from its header."""

from __future__ import annotations

import ctypes
import logging
import math
import os
from pathlib import Path
from typing import Any

from tasks.engine.errors import UserError

FILE_TYPES = {"1": "F16", "7": "Q8_0", "15": "Q4_K_M", "17": "Q5_K_M", "18": "Q6_K", "32": "BF16"}


def gguf_config(gguf: Path) -> dict[str, Any]:
    """The config blob of a GGUF: format, family, size and quantisation.

    Args:
        gguf: the model file.

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
        said = {name: _metadata(model, f"general.{name}") for name in ("architecture", "file_type")}
        count = int(llama_cpp.llama_model_n_params(model))
    finally:
        llama_cpp.llama_model_free(model)
    return {
        "model_format": "gguf",
        "model_family": said["architecture"],
        "model_families": [said["architecture"]],
        "model_type": human_parameters(count),
        "file_type": FILE_TYPES.get(said["file_type"], "unknown"),
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
