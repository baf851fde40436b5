"""Quantising a 16-bit GGUF to one of llama.cpp's K-quants, in a process of its own.

That process runs `python -m tasks.export.quantization`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from subprocess import CompletedProcess

from tasks.export.gguf_types import GGUF_TYPES
from tasks.llamacpp.load import run_module
from tasks.settings.export import GgufType


def quantize(source: Path, target: Path, gguf_type: GgufType) -> CompletedProcess[str]:
    """Quantise a GGUF by llama.cpp's `llama_model_quantize`.

    Args:
        source: a GGUF in 16 bits.
        target: the file to write.
        gguf_type: a K-quant.

    Returns:
        The ended process, with what it printed.
    """
    return run_module("tasks.export.quantization", str(source), str(target), str(GGUF_TYPES[gguf_type].file_type))


def _main(source: str, target: str, file_type: str) -> int:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(file_type)
    return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params))


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
