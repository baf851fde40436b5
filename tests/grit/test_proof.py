"""A GRIT that does nothing is an error, whatever the reason."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from torch import Tensor, nn

from grit import GRITConfig, GritInactiveError, GRITManager
from tests.grit.conftest import QUICK, MakeModel, backward, train


def test_bypassed_hooks_are_an_error(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """As with fused kernels, which multiply with the weights and never call the modules."""
    model = make_model()
    manager = GRITManager(model, QUICK)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda x, m=module: nn.functional.linear(x, m.weight, m.bias)  # type: ignore[method-assign]
            module._forward_hooks.clear()
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
    assert manager.last_diagnostics["ready"] == 0
    model.zero_grad()
    backward(model, batch, 1)
    manager.step()
    assert manager.last_diagnostics["ready"] == 1


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
    ("rank", "config", "said"),
    [
        (4, {"kfac_min_samples": 10_000}, "no factor is ready: 123 tokens seen, kfac_min_samples is 10000"),
        (1, {"kfac_min_samples": 1}, "multiple of the identity"),
        (4, {"kfac_min_samples": 1, "kfac_damping": 1e9}, "multiple of the identity"),
    ],
)
def test_a_preconditioner_without_effect_is_an_error(
    make_model: MakeModel, batch: dict[str, Tensor], rank: int, config: dict[str, Any], said: str
) -> None:
    model = make_model(r=rank)
    with pytest.raises(GritInactiveError, match=said):
        train(model, batch, GRITManager(model, GRITConfig(kfac_update_freq=1, cov_update_freq=1, **config)), 9)
