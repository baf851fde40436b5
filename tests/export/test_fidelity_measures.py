"""What is measured of a GGUF: which tokens of which rows, and the figures of each row."""

from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tasks.engine.artifacts import Store
from tasks.export.fidelity_measures import compare_row, rows_to_compare
from tasks.settings.export import FidelitySettings


def test_of_a_long_prompt_the_end_is_read(store: Store) -> None:
    """Rows whose answers begin after the longest that is read would else leave nothing to compare."""
    with store.draft("dataset") as draft:
        rows = [
            ([-100] * prompt + list(range(1, 1 + answer))) for prompt, answer in ((5, 3), (15, 9), (16, 4), (90, 2))
        ]
        table = pa.table({"input_ids": [list(range(len(row))) for row in rows], "labels": rows})
        pq.write_table(table, draft.path / "validation.parquet")
    compared = rows_to_compare(draft.done(), FidelitySettings(rows=4, max_tokens=16))
    assert [(row.ids[0], len(row.ids), row.targets.tolist()) for row in compared] == [
        (0, 8, [1, 2, 3]), (0, 16, [1]), (8, 12, [1, 2, 3, 4]), (82, 10, [1, 2]),
    ]  # fmt: skip
    assert all(
        row.ids[before] + 1 == prompt
        for row, (before, *_), prompt in zip(compared, (row.before for row in compared), (5, 15, 16, 90), strict=True)
    )


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 2**31))
def test_a_rows_measures_are_those_of_torch(length: int, vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    merged, gguf = torch.randn(2, length, vocabulary, generator=generator) * 3
    targets = torch.randint(vocabulary, (length,), generator=generator)
    base = torch.rand(length, generator=generator)
    row = compare_row(merged=merged.numpy(), gguf=gguf.numpy(), targets=targets.numpy(), nll_base=base.double().numpy())
    p, q = (functional.log_softmax(x.double(), -1) for x in (merged, gguf))
    assert math.isclose(row.kl, float(functional.kl_div(q, p, log_target=True, reduction="sum")), abs_tol=1e-6)
    nll = [functional.nll_loss(x, targets, reduction="none") for x in (p, q)]
    assert math.isclose(row.nll_merged, float(nll[0].sum()), abs_tol=1e-6)
    assert math.isclose(row.nll_gguf, float(nll[1].sum()), abs_tol=1e-6)
    likelihood = p.exp().gather(1, gguf.argmax(-1, keepdim=True))[:, 0]
    assert row.kept_top == int((likelihood >= p.exp().max(-1).values / 2).sum())
    assert math.isclose(row.shown, float(((base - nll[0]) * (base - nll[1])).sum()), abs_tol=1e-5)
    assert row.kl >= -1e-9
