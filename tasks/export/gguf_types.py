"""Types of GGUF files: all that the pipeline knows of each."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.settings.export import GgufType


@dataclass(frozen=True)
class FidelityLimits:
    """From where on a check of the GGUF's fidelity warns or fails."""

    warn_perplexity_ratio: float
    max_perplexity_ratio: float
    max_kl: float
    min_top1: float
    min_difference_kept: float = 0.9


@dataclass(frozen=True)
class GgufTypeFacts:
    """One type."""

    file_type: int
    """llama.cpp's number, `general.file_type` in the GGUF (enum llama_ftype in llama.h)."""
    ollama_name: str
    """How Ollama calls it in a model's config."""
    bytes_per_weight: float
    """Size of the file over the number of weights, for the free disk that a run asks for. K-quants mix types: theirs is
    the most that a large model takes."""
    by_converter: bool
    """Whether llama.cpp's converter writes it itself; the others are quantised from `INTERMEDIATE`."""
    limits: FidelityLimits
    """Unless the user sets others. To choose them, run the demo with the type, and read its report's fidelity."""


NEARLY_EXACT = FidelityLimits(warn_perplexity_ratio=1.002, max_perplexity_ratio=1.01, max_kl=0.01, min_top1=0.97)
"""Published for Q8_0 of Llama 3 8B is a perplexity ratio of 1.0004. Small models lose more by fewer bits."""

GGUF_TYPES: dict[GgufType, GgufTypeFacts] = {
    "f16": GgufTypeFacts(1, "F16", 2, True, NEARLY_EXACT),
    "bf16": GgufTypeFacts(32, "BF16", 2, True, NEARLY_EXACT),
    "q8_0": GgufTypeFacts(7, "Q8_0", 34 / 32, True, NEARLY_EXACT),  # 32 weights of 8 bits and one 16-bit scale
    "q6_k": GgufTypeFacts(18, "Q6_K", 0.83, False, FidelityLimits(1.01, 1.03, 0.05, 0.92)),
    "q5_k_m": GgufTypeFacts(17, "Q5_K_M", 0.75, False, FidelityLimits(1.02, 1.06, 0.1, 0.9)),
    "q4_k_m": GgufTypeFacts(15, "Q4_K_M", 0.65, False, FidelityLimits(1.05, 1.15, 0.25, 0.85)),
}
INTERMEDIATE: GgufType = "bf16"
"""What the types are quantised from that the converter does not write."""
VOCABULARY: GgufType = "f16"
"""What the converter is asked for where there are no weights."""


def ollama_file_type(number: str) -> str:
    """Ollama's name of a file type.

    Args:
        number: llama.cpp's, as the text of `general.file_type`; empty where the header has none.

    Returns:
        The name; `unknown` for what no row of `GGUF_TYPES` has.
    """
    return next((row.ollama_name for row in GGUF_TYPES.values() if str(row.file_type) == number), "unknown")
