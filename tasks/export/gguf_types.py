"""Types of GGUF files."""

from __future__ import annotations

from tasks.settings.export import GgufType

FILE_TYPES: dict[GgufType, int] = {"f16": 1, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18, "bf16": 32}
"""llama.cpp's number of each type, `general.file_type` in the GGUF (enum llama_ftype in llama.h)."""
