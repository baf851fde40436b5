"""Rounding by chance: to one of the two neighbours, so that the mean is the value."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.export.rounding import CHUNK, rounded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float8_e4m3fn])
def test_other_dtypes_are_converted(dtype: torch.dtype) -> None:
    values = torch.linspace(-2, 2, 1001)
    assert torch.equal(rounded(values, dtype, seed=0).double(), values.to(dtype).double())


FLOATS = st.floats(width=32, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(
    numbers=st.lists(FLOATS, min_size=1, max_size=9), seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_it_is_rounded_to_one_of_the_two_neighbours(numbers: list[float], seed: int, dtype: torch.dtype) -> None:
    values = torch.tensor(numbers)
    nearest = values.to(dtype)
    below = torch.where(nearest.float() > values, nearest.nextafter(torch.tensor(-torch.inf, dtype=dtype)), nearest)
    above = torch.where(nearest.float() < values, nearest.nextafter(torch.tensor(torch.inf, dtype=dtype)), nearest)
    result = rounded(values, dtype, seed=seed)
    assert bool(((result == below) | (result == above)).all())
    assert torch.equal(rounded(nearest.float(), dtype, seed=seed), nearest), "what is exact stays"
    assert torch.equal(result.isfinite(), nearest.isfinite()) and torch.equal(result.signbit(), values.signbit())


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_of_what_is_rounded_is_the_value(dtype: torch.dtype, step: float, sign: int) -> None:
    for share in (0.01, 0.25, 0.5, 0.9):
        values = torch.full((400, 1001), sign * (1 + share * step))
        ups = (rounded(values, dtype, seed=3).double() * sign - 1) / step
        assert ups.unique().tolist() == [0, 1]
        assert float(ups.mean()) == pytest.approx(share, abs=5 * (share * (1 - share) / values.numel()) ** 0.5)
        columns = ups.mean(0)
        assert float(columns.std()) == pytest.approx((share * (1 - share) / 400) ** 0.5, rel=0.2), "independent"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3.4e38])
def test_what_is_not_finite_stays_so(dtype: torch.dtype, value: float) -> None:
    values = torch.tensor([1.0, value, 2.0])
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # with all bits, which a carry would end
    for tensor in (values, torch.cat([values, nan])):
        torch.testing.assert_close(rounded(tensor, dtype, seed=0), tensor.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (CHUNK - 1,), (CHUNK + 5,), (3, CHUNK // 2 + 1)])
def test_any_size_is_rounded_to_the_end_in_its_own_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    step = torch.finfo(dtype).eps
    values = torch.full(shape, 1 + step / 2)
    result = rounded(values, dtype, seed=0)
    assert result.shape == values.shape and result.dtype == dtype
    assert set(result.unique().tolist()) <= {1.0, 1.0 + step}
    draws = torch.stack([rounded(values, dtype, seed=seed).view(-1)[-5:] for seed in range(20)])
    assert bool((draws != draws[0]).any(0).all()), "chance reaches the last numbers too"
