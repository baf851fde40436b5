"""A variant of GRIT that is only a row of the table trains, and what its row says is what happens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from grit.products import LoraMatrix, Roots, multiply
from grit.variants import VARIANTS, Curvature, GritVariant
from tasks.engine.artifacts import Artifact, Store
from tasks.settings.finetune import GritSettings
from tasks.train import train
from tasks.training.network import load_network
from tests.support.trainings import BASE, LORA, QUICK

NAME = "made_up"
SETTINGS = GritSettings(basis="initial", kfac_min_samples=1, norm_match=False).model_copy(update={"variant": NAME})

pytestmark = [
    pytest.mark.usefixtures("in_this_process"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings"),  # the name is none of the setting's Literal
]


@pytest.fixture(scope="module")
def dataset(tokenized_rows: Callable[[int, int], Artifact]) -> Artifact:
    return tokenized_rows(16, 4)


def stack(matrix: Tensor, curvature: Curvature) -> Tensor:
    """One matrix for all modules."""
    return matrix.expand_as(curvature.sigma_h)


def ones(curvature: Curvature) -> Tensor:
    """Condition numbers of matrices that have none of interest."""
    return torch.ones(len(curvature.modules))


class Trained:
    """What the stage leaves after a few steps."""

    def __init__(self, model: Artifact, dataset: Artifact, store: Store, steps: int, grit: GritSettings | None) -> None:
        training = QUICK.model_copy(update={"max_steps": steps, "warmup_steps": 0, "eval_steps": None})
        result = train.function(model, dataset, base=BASE, lora=LORA, training=training, grit=grit, seed=7, store=store)
        self.weights = load_file(result.adapter.path / "adapter_model.safetensors")
        lines = (result.history.path / "history.jsonl").read_text().splitlines()
        self.steps: list[dict[str, Any]] = [json.loads(line) for line in lines]
        decays = [1 - step["learning_rate"] * training.weight_decay for step in self.steps]
        start = load_network(model, base=BASE, lora=LORA, training=training, max_length=64, seed=7).state_dict()
        self.decayed = {
            name: math.prod(decays) * start[name.replace(".weight", ".default.weight")] for name in self.weights
        }
        """The weights as weight decay alone would leave them."""


def test_a_row_that_changes_gradients_trains_what_its_multipliers_leave(
    tiny_model: Artifact, dataset: Artifact, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are zero in the second half of rank space, where then only weight decay acts."""

    def first_half(curvature: Curvature) -> tuple[Roots, Roots]:
        half = Roots(stack(torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])), curvature), ones(curvature))
        return half, half

    monkeypatch.setitem(VARIANTS, NAME, GritVariant(first_half))
    half = Trained(tiny_model, dataset, store, 3, SETTINGS)
    assert all(step["grit"]["in_use"] == 1 and 0 < step["grit"]["cosine"] < 1 for step in half.steps)
    for name, weight in half.weights.items():
        rows, decayed = (matrix if "lora_A" in name else matrix.T for matrix in (weight, half.decayed[name]))
        torch.testing.assert_close(rows[2:], decayed[2:], rtol=1e-6, atol=0)
        assert not torch.allclose(rows[:2], decayed[:2], rtol=1e-3)


def test_a_row_that_makes_updates_anew_gets_what_its_multipliers_are(
    tiny_model: Artifact, dataset: Artifact, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The diagonal of K-FAC's factor of B, applied to what Adam makes: B begins at zero, so its first update is B."""
    factors: dict[str, Tensor] = {}

    def diagonal(curvature: Any) -> tuple[Roots, Roots]:
        factors.update({module.path: curvature.sigma_h[index] for index, module in enumerate(curvature.modules)})
        diagonals = torch.diag_embed(curvature.sigma_h.diagonal(dim1=1, dim2=2))
        return Roots(stack(torch.eye(4), curvature), ones(curvature)), curvature.inverse_power(diagonals)

    def multiplied(roots: Tensor, *, updates: list[Tensor], momenta: list[Tensor], matrix: LoraMatrix) -> Tensor:
        return multiply(roots, torch.stack(updates).float(), matrix=matrix)

    monkeypatch.setitem(VARIANTS, NAME, GritVariant(diagonal, changes_gradient=False, new_updates=multiplied))
    plain, scaled = (Trained(tiny_model, dataset, store, 1, grit) for grit in (None, SETTINGS))
    assert len(factors) == 14
    for path, sigma in factors.items():
        squares = [float(sigma[direction, direction]) for direction in range(4)]
        name = f"{path}.lora_B.weight"
        for direction, square in enumerate(squares):
            factor = (square + SETTINGS.kfac_damping * sum(squares) / 4) ** -SETTINGS.power
            wanted = factor * plain.weights[name][:, direction]
            torch.testing.assert_close(scaled.weights[name][:, direction], wanted, rtol=1e-4, atol=1e-8)


def test_a_row_whose_multipliers_are_a_basis_has_adams_moments_in_it(
    tiny_model: Artifact, dataset: Artifact, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In coordinates of another order, a second one at each factorisation, Adam does what it does in the first."""
    orders: list[list[int]] = []

    def permuted(curvature: Curvature) -> tuple[Roots, Roots]:
        orders.append([[1, 2, 3, 0], [3, 2, 0, 1]][len(orders) % 2])
        permutation = stack(torch.eye(4)[orders[-1]], curvature)
        return Roots(permutation, ones(curvature)), Roots(permutation.mT, ones(curvature))

    def put_back(roots: Tensor, *, updates: list[Tensor], momenta: list[Tensor], matrix: LoraMatrix) -> Tensor:
        return multiply(roots.mT, torch.stack(updates).float(), matrix=matrix)

    monkeypatch.setitem(VARIANTS, NAME, GritVariant(permuted, new_updates=put_back, is_basis=True))
    often = SETTINGS.model_copy(update={"kfac_update_freq": 1})
    plain, turned = (Trained(tiny_model, dataset, store, 3, grit) for grit in (None, often))
    assert len(orders) == 3
    assert all(step["grit"]["in_use"] == 1 and "cosine" not in step["grit"] for step in turned.steps)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(turned.weights[name], weight, rtol=1e-4, atol=1e-6)
