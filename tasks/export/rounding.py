"""Stochastic rounding: to a neighbour above or below by chance, the nearer the likelier.

Rounding to the nearest loses each change of a weight that is below half a unit in the last place, all of them to the
same side; of stochastic rounding (Gupta et al. 2015, arXiv 1502.02551, section 3) their sum stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of float32's mantissa that are rounded away."""
CHUNK = 2**18
"""Numbers rounded at a time, so that what this takes beside them stays in the processor's cache."""


def rounded(values: Tensor, dtype: torch.dtype, *, seed: int) -> Tensor:
    """Round by chance, so that the mean is the value itself.

    Random bits are added to the bits that are dropped. What they add up to carries over into what is kept as often as
    the dropped bits' share of the step says: away from zero. Then the dropped bits are cut off.

    Args:
        values: of any floating dtype and any shape; they are rounded from float32.
        dtype: of the result, float16 or bfloat16; for another this is a mere conversion.
        seed: of the chance. The same seed gives the same bits.

    Returns:
        The values in `dtype`. What `dtype` holds exactly stays as it is. Where one is not finite, or would not be, all
        are rounded to the nearest. Float16's steps below 6.1e-5 are wider than its mantissa says: numbers there are
        rounded by chance to the mantissa, and then to the nearest.
    """
    if dtype not in DROPPED_BITS:
        return values.to(dtype)
    values, dropped = values.float(), DROPPED_BITS[dtype]
    if not _all_finite_as(values, dtype):
        return values.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    result = torch.empty(values.shape, dtype=dtype)
    for chunk, target in zip(values.reshape(-1).split(CHUNK), result.view(-1).split(CHUNK), strict=True):
        bits = _random_bits(len(chunk), dropped, generator)
        _add_to_dropped_bits(chunk, bits)
        _cut(bits, dropped)
        target.copy_(bits.view(torch.float32))  # exact, but for float16's smallest numbers
    return result


def _all_finite_as(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether no value, NaN included, is beyond what the dtype holds."""
    least, most = torch.aminmax(values)
    return bool(torch.maximum(-least, most) <= torch.finfo(dtype).max)


def _random_bits(count: int, dropped: int, generator: torch.Generator) -> Tensor:
    """So many random numbers as int32, of as many bits as are dropped; four of them are drawn at a time."""
    quadruples = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return quadruples.view(torch.int16)[:count].int().bitwise_and_(2**dropped - 1)


def _add_to_dropped_bits(values: Tensor, bits: Tensor) -> None:
    """Add the float32 values' bits to random ones, in place; the sum of the lowest carries over into what is kept."""
    bits.add_(values.view(torch.int32))


def _cut(bits: Tensor, dropped: int) -> None:
    """Set the dropped bits to zero, in place."""
    bits.bitwise_and_(-(2**dropped))
