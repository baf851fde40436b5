"""What a machine computes in, and that `auto` is gone once settings are read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tasks.settings.precision import native_dtype
from tasks.settings.presets import load_settings


@pytest.fixture(autouse=True)
def ask_anew() -> Iterator[None]:
    native_dtype.cache_clear()
    yield
    native_dtype.cache_clear()


@pytest.mark.parametrize(
    ("features", "onednn", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": True}, True, "bfloat16"),
        ({"amx_bf16": True}, True, "bfloat16"),
        ({"neon": True, "bf16": True}, True, "bfloat16"),
        ({"neon": True, "bf16": True}, False, "float32"),  # macOS
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, True, "float32"),
        ({"avx2": True, "avx512_f": True}, True, "float32"),
    ],
)
def test_a_cpu_takes_bfloat16_only_where_it_multiplies_in_it(
    features: dict[str, bool], onednn: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: features)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: onednn)
    assert native_dtype() == expected


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_an_old_gpu_takes_float16(has_bfloat16: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert native_dtype() == expected


def test_this_machines_answer_is_one_that_torch_can_train_in() -> None:
    product = torch.ones(8, 8, dtype=getattr(torch, native_dtype())) @ torch.ones(
        8, 8, dtype=getattr(torch, native_dtype())
    )
    assert float(product[0, 0]) == 8


@pytest.mark.parametrize("preset", ["demo", "own-data"])
def test_settings_say_what_auto_has_come_to(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr("tasks.settings.finetune.native_dtype", lambda dtype=dtype: dtype)
        assert load_settings(preset).model.dtype == dtype
    assert load_settings(preset, {"model.dtype": "float16"}).model.dtype == "float16"
