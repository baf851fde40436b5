"""Hooks, manager and preconditioner together, against the exact Fisher matrix of one layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from grit import GRITConfig, GRITManager
from grit.modules import lora_modules

RANK, D_IN, D_OUT, ALPHA = 3, 4, 5, 6
SCALE = ALPHA / RANK


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D_IN, D_OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def one_layer() -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(OneLayer(), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"]))
    nn.init.normal_(lora_modules(model)[0].lora_b.weight)
    return model


def tokens() -> tuple[Tensor, Tensor]:
    """Inputs x [T, d_in] and output gradients g [T, d_out]: each x with each g, E[x x^T] = I and s^2 E[g g^T] = I.

    Both Kronecker forms are exact there, and the factors that rank-space K-FAC leaves out are the identity.
    """
    x = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * D_IN)
    g = torch.eye(D_OUT) * D_OUT**0.5 / SCALE
    return x.repeat_interleave(len(g), 0), g.repeat(len(x), 1)


def exact_fisher(model: PeftModel) -> tuple[Tensor, Tensor]:
    """E[v v^T] of the tokens' gradients v of A, and of those of B, by autograd; float64."""
    model = copy.deepcopy(model).double()
    (module,) = lora_modules(model)
    weights = [module.lora_a.weight, module.lora_b.weight]
    rows: list[list[Tensor]] = []
    for x, g in zip(*tokens(), strict=True):
        loss = (model(x.double()[None, None]) * g.double()).sum()
        rows.append([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)])
    of_a, of_b = (torch.stack(side) for side in zip(*rows, strict=True))
    return of_a.T @ of_a / len(rows), of_b.T @ of_b / len(rows)


def preconditioned(model: PeftModel, **config: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Two random gradients, of A and of B, and what the manager makes of them after a backward pass of all tokens."""
    settings = {"kfac_update_freq": 1, "cov_update_freq": 1, "kfac_min_samples": 1, "power": 1.0, "norm_match": False}
    manager = GRITManager(model, GRITConfig(kfac_damping=1e-9, **{**settings, **config}))
    x, g = tokens()
    manager.loss_denominator = len(x)
    ((model(x[None]) * g).sum() / len(x)).backward()
    (module,) = lora_modules(model)
    weights = [module.lora_a.weight, module.lora_b.weight]
    raw = [torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)) for weight in weights]
    for weight, gradient in zip(weights, raw, strict=True):
        weight.grad = gradient.clone()
    manager.step()
    manager.close()
    return raw, [weight.grad for weight in weights if weight.grad is not None]


@pytest.mark.parametrize("side", [0, 1], ids=["A", "B"])
def test_kfac_is_the_natural_gradient_of_the_exact_fisher_matrix(side: int) -> None:
    fisher = exact_fisher(one_layer())[side]
    raw, ours = preconditioned(one_layer())
    natural = torch.linalg.solve(fisher, raw[side].double().flatten()).reshape(raw[side].shape)
    torch.testing.assert_close(ours[side].double(), natural, rtol=1e-5, atol=1e-5 * float(natural.abs().max()))
    swapped = preconditioned(one_layer(), variant="published")[1][side]
    cosine = torch.nn.functional.cosine_similarity(swapped.double().flatten(), natural.flatten(), dim=0)
    assert float(cosine) < 0.95, "the published pairing is another direction"
