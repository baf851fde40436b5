"""The methods of a comparison as settings."""

from __future__ import annotations

from typing import get_args

import pytest

from grit.config import Variant
from tasks.analysis.methods import settings_of, settings_that_differ
from tasks.engine.errors import UserError
from tasks.settings.comparison import FAULT, ComparedMethod
from tasks.settings.finetune import ADAMW, FinetuneSettings, Optimizer
from tasks.settings.presets import load_settings

METHODS = [method for method in get_args(ComparedMethod) if method != FAULT]


def test_each_method_is_trained_as_its_name_says_on_the_same_data() -> None:
    demo = load_settings("demo", {"ollama.target": "store"})
    for method in METHODS:
        own = settings_of(method, demo)
        assert own.ollama.target == "none"
        assert own.data == demo.data and own.lora == demo.lora and own.seed == demo.seed
        kind, _, variant = method.partition(":")
        assert own.method == ("grit" if kind == "grit" else "baseline")
        assert not variant or own.grit.variant == variant
        assert FinetuneSettings.model_validate(own.model_dump()) == own
    assert settings_of("baseline-unsloth", demo).training.backend == "unsloth"
    with pytest.raises(ValueError, match="no method"):
        settings_of(FAULT, demo)


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_a_methods_name_says_how_it_optimises_whatever_the_preset_does(optimizer: str) -> None:
    preset = load_settings("demo", {"training.optimizer": optimizer, "training.backend": "unsloth"})
    adamw = optimizer if optimizer in ADAMW else "adamw_torch"
    for method in METHODS:
        training = settings_of(method, preset).training
        assert training.optimizer == (method if method in get_args(Optimizer) else adamw)
        assert training.backend == ("unsloth" if method == "baseline-unsloth" else "transformers")


def test_a_variant_that_the_other_settings_exclude_is_one_clear_line() -> None:
    reprojecting = load_settings("demo", {"grit.reprojection_freq": 10})
    assert settings_of("grit:graft", reprojecting).grit.reprojection_freq == 10
    with pytest.raises(UserError, match="methods: .*reprojection_freq: eigen_adam has a basis of its own.*leave grit:"):
        settings_of("grit:eigen_adam", reprojecting)
    assert {f"grit:{variant}" for variant in get_args(Variant)} < set(METHODS)


def test_settings_that_differ_are_those_and_no_others() -> None:
    demo = load_settings("demo", {})
    rows = dict(settings_that_differ({m: settings_of(m, demo) for m in ("baseline", "lora_fa")}))
    assert rows == {"training.optimizer": {"baseline": "adamw_torch", "lora_fa": "lora_fa"}}
    both = dict(settings_that_differ({m: settings_of(m, demo) for m in ("baseline", "grit")}))
    assert both["grit.variant"] == {"baseline": "—", "grit": "kfac"}
    assert "data.source" not in both
