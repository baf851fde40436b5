"""The methods of a comparison as settings."""

from __future__ import annotations

from typing import get_args

import pytest

from grit.config import Variant
from tasks.analysis.methods import settings_of, settings_that_differ
from tasks.settings.comparison import ComparedMethod
from tasks.settings.presets import load_settings
from tasks.training.optimizers import PEFT_OPTIMIZERS


def test_each_variant_and_optimizer_is_a_method() -> None:
    methods: tuple[ComparedMethod, ...] = get_args(ComparedMethod)
    assert {f"grit:{variant}" for variant in get_args(Variant)} < set(methods)
    demo = load_settings("demo", {"ollama.target": "store"})
    for method in methods[:-1]:
        own = settings_of(method, demo)
        assert own.ollama.target == "none"
        assert own.data == demo.data and own.lora == demo.lora and own.seed == demo.seed
        kind, _, variant = method.partition(":")
        assert own.method == ("grit" if kind == "grit" else "baseline")
        assert not variant or own.grit.variant == variant
        if kind in ("lora_plus", "lora_fa", "riemannian"):
            assert own.training.optimizer == kind
    assert settings_of("baseline-unsloth", demo).training.backend == "unsloth"
    with pytest.raises(ValueError, match="no method"):
        settings_of("study-fault", demo)


@pytest.mark.parametrize("optimizer", [*PEFT_OPTIMIZERS, "adamw_8bit"])
def test_a_methods_name_says_how_it_optimises_whatever_the_preset_does(optimizer: str) -> None:
    preset = load_settings("demo", {"training.optimizer": optimizer, "training.backend": "unsloth"})
    adamw = optimizer if optimizer == "adamw_8bit" else "adamw_torch"
    methods: tuple[ComparedMethod, ...] = get_args(ComparedMethod)
    for method in methods[:-1]:
        training = settings_of(method, preset).training
        assert training.optimizer == (method if method in PEFT_OPTIMIZERS else adamw)
        assert training.backend == ("unsloth" if method == "baseline-unsloth" else "transformers")


def test_settings_that_differ_are_those_and_no_others() -> None:
    demo = load_settings("demo", {})
    rows = dict(settings_that_differ({m: settings_of(m, demo) for m in ("baseline", "lora_fa")}))
    assert rows == {"training.optimizer": {"baseline": "adamw_torch", "lora_fa": "lora_fa"}}
    both = dict(settings_that_differ({m: settings_of(m, demo) for m in ("baseline", "grit")}))
    assert both["grit.variant"] == {"baseline": "—", "grit": "kfac"}
    assert "data.source" not in both
