"""A state is taken over only by the manager of the same modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grit import GRITConfig, GRITManager
from tests.support.adapters import QUICK, MakeModel

BOTH = {"target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("saved", "loading", "message"),
    [
        (BOTH, {"target_modules": ["k_proj"]}, r"module 1 is .*q_proj.* of rank 4 there, .*k_proj.* of rank 4 here"),
        (BOTH | {"layers_to_transform": [0]}, BOTH, r"module 2 is none there, .*layers.1.*q_proj.* of rank 4 here"),
        (BOTH, BOTH | {"layers_to_transform": [0]}, r"module 2 is .*layers.1.*q_proj.* there, none here"),
        (BOTH, BOTH | {"r": 8}, r"of rank 4 there, .* of rank 8 here"),
    ],
)
def test_the_state_of_other_modules_is_refused(
    make_model: MakeModel, saved: dict[str, Any], loading: dict[str, Any], message: str
) -> None:
    state = GRITManager(make_model(**saved)).state_dict()
    manager = GRITManager(make_model(**loading))
    before = manager.state_dict()
    with pytest.raises(ValueError, match=message):
        manager.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in manager.state_dict().items())


def test_the_state_of_another_variant_is_refused_and_so_is_what_is_none(make_model: MakeModel) -> None:
    state = GRITManager(make_model(), GRITConfig(variant="graft")).state_dict()
    manager = GRITManager(make_model())
    with pytest.raises(ValueError, match="the state is of the variant 'graft', the manager's is 'kfac'"):
        manager.load_state_dict(state)
    with pytest.raises(ValueError, match="this is no state of a GRITManager"):
        manager.load_state_dict({"steps": torch.tensor(3)})


def test_what_an_interrupted_step_has_captured_does_not_survive(
    make_model: MakeModel, batch: dict[str, Tensor]
) -> None:
    """As after Ctrl-C in a notebook, where the same manager goes on from a checkpoint."""
    managers = []
    for interrupted in (False, True):
        manager = GRITManager(model := make_model(), QUICK)
        state = manager.state_dict()
        if interrupted:
            model(**batch).loss.backward()
            model.zero_grad()
            manager.load_state_dict(state)
        model(**batch).loss.backward()
        manager.take_loss_denominator()
        manager.step()
        managers.append(manager)
    untouched, resumed = managers
    assert int(resumed.loss_denominator) == int(untouched.loss_denominator) == (batch["labels"][:, 1:] != -100).sum()
    wanted = untouched.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.state_dict().items())
