"""The names of what can be compared."""

from __future__ import annotations

from typing import get_args

from grit.config import Variant
from tasks.settings.comparison import ComparedMethod, CompareSettings, method_names
from tasks.settings.finetune import ADAMW, Optimizer


def test_a_variant_or_an_optimizer_more_is_a_method_more() -> None:
    present = method_names(get_args(Variant), get_args(Optimizer))
    more = method_names([*get_args(Variant), "made_up"], [*get_args(Optimizer), "made_up"])
    assert set(more) - set(present) == {"grit:made_up", "made_up"}


def test_what_can_be_compared_follows_from_variants_and_optimizers() -> None:
    assert get_args(ComparedMethod) == method_names(get_args(Variant), get_args(Optimizer))
    named = {"baseline", "baseline-unsloth", "grit", "grit:kfac", "lora_fa", "study-fault"}
    assert named < set(get_args(ComparedMethod))
    assert not set(ADAMW) & set(get_args(ComparedMethod)), "the baseline's, with or without 8-bit state"


def test_pages_offer_the_names() -> None:
    methods = CompareSettings.model_json_schema()["properties"]["methods"]["items"]
    assert tuple(methods["enum"]) == get_args(ComparedMethod)
