"""What GRIT asks of an optimizer whose steps it rewrites."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grit import GRITConfig, GritInactiveError, GRITManager
from tests.support.adapters import MakeModel, backward

OPTIONS = {"kfac_update_freq": 1, "cov_update_freq": 1, "kfac_min_samples": 1}


@pytest.mark.parametrize("variant", ["graft", "eigen_adam"])
def test_options_that_the_optimizer_loads_are_followed(
    make_model: MakeModel, batch: dict[str, Tensor], variant: Any
) -> None:
    """`load_state_dict` replaces the groups; without a rate and with weight decay nothing may move."""
    model = make_model()
    manager = GRITManager(model, GRITConfig(variant=variant, **OPTIONS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    manager.attach(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, batch, 10)
    manager.step()
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "config", [GRITConfig(variant="graft"), GRITConfig(variant="eigen_adam"), GRITConfig(reprojection_freq=5)]
)
def test_options_that_it_cannot_follow_are_refused(make_model: MakeModel, config: GRITConfig) -> None:
    model = make_model()
    weights = [p for p in model.parameters() if p.requires_grad]
    manager = GRITManager(model, config)
    with pytest.raises(ValueError, match="does not handle amsgrad"):
        manager.attach(torch.optim.AdamW(weights, amsgrad=True))
    with pytest.raises(ValueError, match="needs decoupled weight decay: use torch's AdamW"):
        manager.attach(torch.optim.Adam(weights, weight_decay=0.1))
    for optimizer in (torch.optim.Adam(weights), torch.optim.AdamW(weights, weight_decay=0.1)):
        manager.attach(optimizer)


@pytest.mark.parametrize(
    "config", [GRITConfig("graft"), GRITConfig("eigen_adam"), GRITConfig(reprojection_freq=5)], ids=str
)
def test_another_optimizer_than_the_attached_one_is_an_error(
    make_model: MakeModel, batch: dict[str, Tensor], config: GRITConfig
) -> None:
    model = make_model()
    weights = [p for p in model.parameters() if p.requires_grad]
    manager = GRITManager(model, config)
    with pytest.raises(ValueError, match="a LoRA weight is not among the optimizer's parameters"):
        manager.attach(torch.optim.AdamW(weights[1:]))
    attached, other = torch.optim.AdamW(weights), torch.optim.AdamW(weights)
    other.register_step_pre_hook(lambda *_: manager.step())
    manager.attach(attached)
    backward(model, batch, 10)
    other.step()
    backward(model, batch, 10)
    with pytest.raises(GritInactiveError, match="another optimizer than the attached one has stepped LoRA's weights"):
        other.step()
    manager.attach(other)
    other.step()
