"""The number format that a machine computes in at full speed."""

from __future__ import annotations

import functools
from typing import Literal

Dtype = Literal["bfloat16", "float16", "float32"]


@functools.cache
def native_dtype() -> Dtype:
    """The shortest format that keeps training stable and that this machine multiplies matrices in.

    A GPU that has bfloat16 takes it, an older one float16. Of CPUs, those with AVX512-BF16, AMX or Arm's BF16 take
    bfloat16, through oneDNN; on others torch converts number by number, which takes many times as long as float32.
    """
    import torch  # takes seconds, which settings that name a format have no need for

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    features = torch.cpu.get_capabilities()
    has_bfloat16 = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if has_bfloat16 and torch.backends.mkldnn.is_available() else "float32"
