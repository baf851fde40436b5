"""A GRIT that does nothing is an error, whatever the reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from grit import GRITConfig, GritInactiveError, GRITManager
from grit.config import Variant
from grit.modules import lora_modules
from grit.preconditioning import anisotropy, inverse_power
from grit.proof import check_effect
from tests.support.adapters import QUICK, MakeModel, backward, train
from tests.support.hooks import fuse


def test_bypassed_hooks_are_an_error(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """As with fused kernels, which multiply with the weights and never call the modules."""
    model = make_model()
    manager = GRITManager(model, QUICK)
    for module in lora_modules(model):
        fuse(module)
    backward(model, batch, 1)
    with pytest.raises(GritInactiveError, match="hooks saw no token"):
        manager.step()


def test_hooks_that_are_bypassed_later_are_an_error_too(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    manager = GRITManager(model, QUICK)
    for _ in range(3):
        backward(model, batch, 1)
        manager.step()
    model.set_adapter("other")
    backward(model, batch, 1)
    with pytest.raises(GritInactiveError, match="or another adapter was made active"):
        manager.step()


def test_the_first_factorisation_after_a_capture_tells(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """Captured at 0, 7, 14; factorised at 0, 10, 20: the two periods meet only every 70 steps."""
    model = make_model()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    manager = GRITManager(model, GRITConfig(cov_update_freq=7, kfac_update_freq=10, kfac_min_samples=1))
    for step in range(20):
        if step == 8:
            model.set_adapter("other")
        backward(model, batch, 1)
        manager.step()
    backward(model, batch, 1)
    with pytest.raises(GritInactiveError, match="hooks saw no token"):
        manager.step()


def test_an_overflow_in_the_first_step_is_none(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """As float16 training begins, until its loss scale has come down."""
    model = make_model()
    manager = GRITManager(model, QUICK)
    backward(model, batch, 1, scale=float("inf"))
    manager.step()
    assert manager.last_diagnostics["in_use"] == 0
    model.zero_grad()
    backward(model, batch, 1)
    manager.step()
    assert manager.last_diagnostics["in_use"] == 1


def test_a_manager_that_is_never_called_is_an_error(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """What happened in the study: hooks in place, factors counted, nothing ever preconditioned."""
    model = make_model()
    GRITManager(model, GRITConfig(kfac_update_freq=2))
    with pytest.raises(GritInactiveError, match=r"has stepped 4 times without GRITManager.step"):
        train(model, batch, None, 9)


def test_factors_that_are_never_updated_are_an_error(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    manager = GRITManager(model, GRITConfig(kfac_update_freq=2))
    for _ in range(4):
        backward(model, batch, 1)
        manager.precondition_gradients()
    with pytest.raises(GritInactiveError, match=r"4 steps without GRITManager.update_and_invert_factors"):
        manager.precondition_gradients()


@pytest.mark.parametrize(
    ("rank", "config", "message"),
    [
        (1, {"kfac_min_samples": 1}, "multiple of the identity"),
        (4, {"kfac_min_samples": 1, "kfac_damping": 1e9}, "multiple of the identity"),
    ],
)
def test_a_preconditioner_without_effect_is_an_error(
    make_model: MakeModel, batch: dict[str, Tensor], rank: int, config: dict[str, Any], message: str
) -> None:
    model = make_model(r=rank)
    with pytest.raises(GritInactiveError, match=message):
        train(model, batch, GRITManager(model, GRITConfig(kfac_update_freq=1, cov_update_freq=1, **config)), 9)


def test_tokens_that_are_few_but_grow_are_waited_for(
    make_model: MakeModel, batch: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    manager = GRITManager(model, replace(QUICK, kfac_min_samples=200))
    ready = []
    for _ in range(6):
        backward(model, batch, 1)
        manager.step()
        ready.append(manager.last_diagnostics["in_use"])
        model.zero_grad()
    assert ready == [0, 0, 0, 0, 1, 1]
    assert [record.getMessage() for record in caplog.records if record.name == "grit.witness"] == [
        "GRIT changes nothing yet after 2 steps: 123 tokens seen, kfac_min_samples is 200"
    ]
    assert manager.last_diagnostics["cosine"] < 0.999


def test_tokens_that_do_not_grow_are_an_error(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    manager = GRITManager(model, replace(QUICK, kfac_min_samples=100))
    backward(model, batch, 1)
    manager.step()
    with pytest.raises(GritInactiveError, match="after 2 steps no factor is ready: 41 tokens seen.*every gradient"):
        for _ in range(9):
            backward(model, batch, 1, scale=float("inf"))
            manager.step()


def test_modules_that_do_nothing_while_others_work_are_named_once(
    make_model: MakeModel, batch: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    manager = GRITManager(model, QUICK)
    for module in lora_modules(model)[:5]:
        fuse(module)
    with caplog.at_level(logging.WARNING):
        train(model, batch, manager, 6)
    assert manager.last_diagnostics["in_use"] == pytest.approx(1 / 6)
    assert manager.last_diagnostics["tokens"] == 6 * 41, "those of a module that works"
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "grit.witness"]
    assert "no token of 5 of 6 LoRA modules for 2 update periods" in warning
    assert "layers.0.self_attn.q_proj[default]" in warning and warning.endswith(", ...")


@pytest.mark.parametrize("rank", [2, 16, 64, 256])
def test_rounding_is_no_effect(rank: int) -> None:
    factors = torch.randn(8, rank, 2 * rank, generator=torch.Generator().manual_seed(0))
    factors, ranks = factors @ factors.mT, torch.full((8,), rank)
    for power in (0.5, 1.0):
        with pytest.raises(GritInactiveError, match="multiple of the identity"):
            check_effect(20, [anisotropy(inverse_power(factors, power, 1e9, ranks).matrices, ranks)])
        check_effect(20, [anisotropy(inverse_power(factors, power, 1e3, ranks).matrices, ranks)])


def test_only_what_is_in_use_counts_as_an_effect(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """One module has seen enough, and its rank is 1; the roots of the others are no multiples of the identity."""
    model = make_model(rank_pattern={"layers.0.self_attn.q_proj": 1})
    manager = GRITManager(model, replace(QUICK, kfac_min_samples=60))
    others = next(group for group in manager.factor_groups if len(group.modules) == 5)
    with pytest.raises(GritInactiveError, match="multiple of the identity in every module"):
        for _ in range(4):
            backward(model, batch, 1)
            manager.step()
            others.samples.zero_()
    unused = next(p for p in manager.preconditioners if len(p.factors.modules) == 5)
    assert float(anisotropy(unused.root_a, unused.factors.ranks).min()) > 0.01


@pytest.mark.parametrize("variant", ["kfac", "graft"])
def test_ranks_that_are_cut_to_one_leave_no_effect(
    make_model: MakeModel, batch: dict[str, Tensor], variant: Variant
) -> None:
    cut = {"reprojection_freq": 1, "rank_adaptation_threshold": 1e-6}
    manager = GRITManager(model := make_model(), replace(QUICK, variant=variant, **cut))
    with pytest.raises(GritInactiveError, match="was cut to it"):
        train(model, batch, manager, 6)
    assert set(manager.ranks.values()) == {1}


Loop = Callable[[torch.optim.Optimizer, GRITManager], None]


def too_late(optimizer: torch.optim.Optimizer, manager: GRITManager) -> None:
    optimizer.step()
    manager.step()
    optimizer.zero_grad()


def without_gradients(optimizer: torch.optim.Optimizer, manager: GRITManager) -> None:
    optimizer.zero_grad()
    manager.step()
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("loop", "message"),
    [(too_late, "before optimizer.step\\(\\), not after it"), (without_gradients, "no LoRA weight has a gradient")],
)
def test_a_step_in_the_wrong_place_is_an_error(
    make_model: MakeModel, batch: dict[str, Tensor], loop: Loop, message: str, fused: bool
) -> None:
    model = make_model()
    manager = GRITManager(model, QUICK)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused)
    backward(model, batch, 10)
    with pytest.raises(GritInactiveError, match=message):
        loop(optimizer, manager)


def test_the_right_place_is_none_with_accumulation_and_validation(
    make_model: MakeModel, batch: dict[str, Tensor]
) -> None:
    model = make_model()
    manager = GRITManager(model, QUICK)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        backward(model, batch, 20)
        backward(model, batch, 20)
        manager.step()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(input_ids=batch["input_ids"])
    assert manager.steps == 3


def test_a_module_without_a_gradient_does_not_hide_a_manager_that_is_never_called(
    make_model: MakeModel, batch: dict[str, Tensor]
) -> None:
    model = make_model()
    GRITManager(model, GRITConfig(kfac_update_freq=2))
    lora_modules(model)[0].layer.register_forward_hook(lambda _m, _x, output: output.detach())
    with pytest.raises(GritInactiveError, match=r"has stepped 4 times without GRITManager.step"):
        train(model, batch, None, 9)
