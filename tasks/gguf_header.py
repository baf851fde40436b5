"""What Ollama writes down about a GGUF, read from its header."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gguf import GGUFReader


def gguf_config(gguf: Path) -> dict[str, Any]:
    """The config blob of a GGUF: format, family, size and quantisation.

    Args:
        gguf: the model file.
    """
    reader = GGUFReader(gguf)
    architecture = str(reader.get_field("general.architecture").contents())  # type: ignore[union-attr]
    field = reader.get_field("general.file_type")
    file_types = {1: "F16", 7: "Q8_0", 15: "Q4_K_M", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16"}
    return {
        "model_format": "gguf",
        "model_family": architecture,
        "model_families": [architecture],
        "model_type": human_parameters(sum(int(tensor.n_elements) for tensor in reader.tensors)),
        "file_type": file_types.get(int(field.contents()), "unknown") if field else "unknown",
        "architecture": "amd64",
        "os": "linux",
    }


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
