"""Each variant against what its definition says, computed apart from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from grit import GRITConfig, GritInactiveError, GRITManager
from grit.config import Variant
from grit.modules import LoraModule
from grit.preconditioner import DampedFactors, Preconditioner
from grit.products import LoraMatrix, multiply
from grit.variants import VARIANTS
from tests.support.adapters import MakeModel, backward, train

LR, DECAY = 1e-2, 0.1
MATRICES: tuple[LoraMatrix, ...] = ("A", "B")


def config(variant: str, **more: Any) -> GRITConfig:
    return GRITConfig(variant=variant, **{"kfac_update_freq": 1, "cov_update_freq": 1, "kfac_min_samples": 1, **more})


def raw_gradients(model: PeftModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    backward(model, batch, 10)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def gradients_and_manager(model: PeftModel, batch: dict[str, Tensor], chosen: GRITConfig) -> GRITManager:
    manager = GRITManager(model, chosen)
    manager.loss_denominator = 10
    backward(model, batch, 10)
    manager.step()
    return manager


def damped_power(factor: Tensor, power: float, damping: float = 0.03) -> Tensor:
    values, vectors = torch.linalg.eigh(factor.double())
    values = values.clamp_min(0) + damping * values.mean()
    return (vectors @ torch.diag(values.pow(-power)) @ vectors.T).float()


def name_of(module: LoraModule, matrix: LoraMatrix) -> str:
    return f"{module.path}.lora_{matrix}.default.weight"


@pytest.mark.parametrize("variant", ["kfac", "published", "riemannian"])
def test_gradients_are_multiplied_by_the_right_factor(
    make_model: MakeModel, batch: dict[str, Tensor], variant: str
) -> None:
    model = make_model()
    raw = raw_gradients(model, batch)
    manager = gradients_and_manager(model, batch, config(variant, power=0.5, norm_match=False))
    (group,) = manager.factor_groups
    for index, module in enumerate(group.modules):
        a, b = module.lora_a.weight, module.lora_b.weight
        for_a, for_b = {
            "kfac": (group.sigma_u[index], group.sigma_h[index]),
            "published": (group.sigma_h[index], group.sigma_u[index]),
            "riemannian": (b.T @ b, a @ a.T),
        }[variant]
        wanted_a = damped_power(for_a.detach(), 0.5) @ raw[name_of(module, "A")]
        wanted_b = raw[name_of(module, "B")] @ damped_power(for_b.detach(), 0.5)
        torch.testing.assert_close(a.grad, wanted_a, rtol=2e-3, atol=1e-4 * float(wanted_a.abs().max()))
        torch.testing.assert_close(b.grad, wanted_b, rtol=2e-3, atol=1e-4 * float(wanted_b.abs().max()))


@given(
    rank=st.integers(2, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    variant=st.sampled_from(["kfac", "riemannian", "published", "eigen_adam", "graft"]),
    targets=st.sampled_from([["q_proj"], ["v_proj", "down_proj"], ["k_proj", "o_proj", "up_proj"]]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_rank_and_dtype(
    make_model: MakeModel, batch: dict[str, Tensor], rank: int, dtype: torch.dtype, variant: str, targets: list[str]
) -> None:
    """Each gradient is what the variant's definition says, in its own dtype; `graft` keeps Adam's length."""
    starts: list[dict[str, Tensor]] = []
    updates: list[dict[str, Tensor]] = []
    for ours in (False, True):
        model = make_model(r=rank, target_modules=targets)
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for weight in weights.values():
            weight.data = weight.data.to(dtype)
        starts.append({name: weight.detach().clone() for name, weight in weights.items()})
        # eps: Adam's own would be 0 in float16
        optimizer = torch.optim.AdamW(list(weights.values()), lr=LR, weight_decay=0.0, eps=1e-4)
        if ours:
            manager = GRITManager(model, config(variant))
            manager.loss_denominator = 10
            manager.attach(optimizer)
            optimizer.register_step_pre_hook(lambda *_, manager=manager: manager.step())
        backward(model, batch, 10)
        raw = {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}
        optimizer.step()
        updates.append({name: weight.detach().float() - starts[-1][name].float() for name, weight in weights.items()})
    for name, gradient in raw.items():
        new = weights[name].grad
        assert new is not None and new.dtype == weights[name].dtype == dtype and new.shape == gradient.shape
        torch.testing.assert_close(new.float().norm(), gradient.float().norm(), rtol=2e-2, atol=1e-6)
        assert bool(torch.isfinite(updates[1][name]).all()) and bool(updates[1][name].any())
        if variant == "graft":
            assert torch.equal(new, gradient)
            torch.testing.assert_close(updates[1][name].norm(), updates[0][name].norm(), rtol=5e-2, atol=0)
    assert manager.last_diagnostics["in_use"] == 1
    (preconditioner,) = manager.preconditioners
    for index, module in enumerate(preconditioner.factors.modules):
        for matrix in MATRICES:
            name = name_of(module, matrix)
            wanted = by_definition(variant, preconditioner, index, starts[1], raw[name].float(), matrix)
            ours, error = weights[name].grad.float(), torch.finfo(dtype).eps
            if variant == "graft":  # Adam's first momentum is a multiple of the gradient; the weight rounds its step
                ours, length = -updates[1][name], updates[0][name].norm()
                error *= float(starts[1][name].abs().max() / length * length.new_tensor(ours.numel()).sqrt())
                wanted = wanted / wanted.norm() * length
            assert float((ours - wanted).norm() / wanted.norm()) < 2e-3 + 2 * error, name


def by_definition(
    variant: str,
    preconditioner: Preconditioner,
    index: int,
    start: dict[str, Tensor],
    raw: Tensor,
    matrix: LoraMatrix,
) -> Tensor:
    """What a gradient should become, with the length that it had: the factors are the manager's, the rest is not."""
    factors, used_a, used_b = preconditioner.factors, preconditioner.used_a[index], preconditioner.used_b[index]
    module, sigma_h, sigma_u = factors.modules[index], factors.sigma_h[index], factors.sigma_u[index]
    if variant == "eigen_adam":
        basis, sigma = (used_a.T, sigma_u) if matrix == "A" else (used_b, sigma_h)
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), rtol=0, atol=1e-4)
        turned = basis.T @ sigma @ basis
        turned = turned / turned.abs().max()
        torch.testing.assert_close(turned, torch.diag(turned.diagonal()), rtol=0, atol=1e-4)
        return basis.T @ raw if matrix == "A" else raw @ basis
    a, b = (start[name_of(module, own)].float() for own in MATRICES)
    for_a, for_b = {
        "published": (sigma_h, sigma_u),
        "riemannian": (b.T @ b, a @ a.T),
    }.get(variant, (sigma_u, sigma_h))
    product = damped_power(for_a, 0.5) @ raw if matrix == "A" else raw @ damped_power(for_b, 0.5)
    return product * (raw.norm() / product.norm())


def test_eigen_adam_is_adam_on_the_rotated_gradient(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """Two steps by hand in a basis that stays: factorised once, so that Adam's moments need not follow."""
    model, reference = make_model(), make_model()
    manager = GRITManager(model, config("eigen_adam", kfac_update_freq=100))
    train(model, batch, manager, 2, DECAY)
    (preconditioner,) = manager.preconditioners
    turns = {"A": preconditioner.used_a, "B": preconditioner.used_b}
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    for step in (1, 2):
        raw = raw_gradients(reference, batch)
        for index, module in enumerate(preconditioner.factors.modules):
            for matrix in MATRICES:
                name, turn = name_of(module, matrix), turns[matrix][index]
                weight = reference.get_parameter(name)
                gradient = turn @ raw[name] if matrix == "A" else raw[name] @ turn
                m, v = moments.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
                m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
                moments[name] = m, v
                update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                update = turn.T @ update if matrix == "A" else update @ turn.T
                weight.data.copy_(weight * (1 - LR * DECAY) - LR * update)
    for name, weight in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-4, atol=2e-5)


def test_no_cosine_between_gradients_in_different_bases(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    for variant in ("kfac", "eigen_adam", "graft"):
        model = make_model()
        manager = GRITManager(model, config(variant))
        train(model, batch, manager, 2)
        assert ("cosine" in manager.last_diagnostics) == (variant != "eigen_adam")
        assert manager.last_diagnostics["norm_ratio"] == pytest.approx(1, rel=1e-4)


def test_eigen_adams_moments_follow_the_basis(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """The first moment, turned back, is Adam's of the raw gradients: a linear average does not know the basis."""
    model = make_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    manager = GRITManager(model, config("eigen_adam"))
    manager.loss_denominator = 10
    manager.attach(optimizer)
    wanted: dict[str, Tensor] = {}
    for _ in range(4):
        for name, gradient in raw_gradients(model, batch).items():
            wanted[name] = 0.9 * wanted.get(name, torch.zeros_like(gradient)) + 0.1 * gradient
        backward(model, batch, 10)
        manager.step()
        optimizer.step()
        optimizer.zero_grad()
    (preconditioner,) = manager.preconditioners
    for index, module in enumerate(preconditioner.factors.modules):
        moment = preconditioner.used_a[index].T @ optimizer.state[module.lora_a.weight]["exp_avg"]
        torch.testing.assert_close(moment, wanted[name_of(module, "A")], rtol=1e-3, atol=1e-6)
        moment = optimizer.state[module.lora_b.weight]["exp_avg"] @ preconditioner.used_b[index].T
        torch.testing.assert_close(moment, wanted[name_of(module, "B")], rtol=1e-3, atol=1e-6)


def test_graft_has_adams_length_and_kfacs_direction(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    before, plain, model = (make_model() for _ in range(3))
    manager = GRITManager(model, config("graft", power=1.0))
    train(plain, batch, None, 1, DECAY)
    train(model, batch, manager, 1, DECAY)
    raw = raw_gradients(before, batch)
    (preconditioner,) = manager.preconditioners
    roots = {"A": preconditioner.root_a, "B": preconditioner.root_b}
    for index, module in enumerate(preconditioner.factors.modules):
        for matrix in MATRICES:
            name, root = name_of(module, matrix), roots[matrix][index]
            start = before.get_parameter(name) * (1 - LR * DECAY)
            adam, update = (m.get_parameter(name) - start for m in (plain, model))
            assert float(update.detach().norm()) == pytest.approx(float(adam.detach().norm()), rel=1e-3)
            wanted = -(root @ raw[name] if matrix == "A" else raw[name] @ root)
            cosine = torch.nn.functional.cosine_similarity(update.flatten(), wanted.flatten(), dim=0)
            assert float(cosine) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("variant", ["eigen_adam", "graft"])
def test_what_acts_on_the_optimizer_must_be_attached(
    make_model: MakeModel, batch: dict[str, Tensor], variant: str
) -> None:
    with pytest.raises(GritInactiveError, match=r"call GRITManager.attach\(optimizer\)"):
        gradients_and_manager(make_model(), batch, config(variant))


@pytest.mark.parametrize("variant", ["eigen_adam", "graft"])
def test_an_optimizer_without_moments_is_refused_by_name(
    make_model: MakeModel, batch: dict[str, Tensor], variant: str
) -> None:
    model = make_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    manager = GRITManager(model, config(variant))
    manager.attach(optimizer)
    backward(model, batch, 10)
    manager.step()
    with pytest.raises(ValueError, match="needs an optimizer with exp_avg.*SGD has none"):
        optimizer.step()


def test_an_optimizer_of_other_weights_is_refused(make_model: MakeModel) -> None:
    manager = GRITManager(make_model(), config("graft"))
    with pytest.raises(ValueError, match="not among the optimizer's parameters"):
        manager.attach(torch.optim.AdamW(make_model().parameters()))


def one_step_decrease(variant: Variant, seed: int) -> float:
    """Decrease of a quadratic loss along the preconditioned gradient, at the best step length, in a small network.

    The loss is |y - W* x|^2 / 2 over ill-conditioned inputs, y = B A x; everything is exact.
    """
    generator = torch.Generator().manual_seed(seed)
    rank, d_in, d_out, count = 4, 8, 6, 400
    x = torch.randn(count, d_in, generator=generator) * torch.logspace(0, -1.5, d_in)
    a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
    target = x @ torch.randn(d_in, d_out, generator=generator)
    h = x @ a.T
    error = h @ b.T - target
    u = error @ b
    grads = u.T @ x / count, error.T @ h / count
    sigmas = {"sigma_h": (h.T @ h / count)[None], "sigma_u": (u.T @ u / count)[None]}
    group: Any = SimpleNamespace(**sigmas, ranks=torch.tensor([rank]))
    for_a, for_b = VARIANTS[variant].multipliers(
        DampedFactors(group, GRITConfig(variant, power=1.0, kfac_damping=1e-3))
    )
    step_a = multiply(for_a.matrices, grads[0].unsqueeze(0), matrix="A")[0]
    step_b = multiply(for_b.matrices, grads[1].unsqueeze(0), matrix="B")[0]
    change = x @ (step_b @ a + b @ step_a).T  # of y, to first order
    return float((error * change).sum() ** 2 / change.square().sum() / error.square().sum())


def test_the_published_pairing_is_worse_than_kfacs() -> None:
    variants: list[Variant] = ["kfac", "published"]
    kfac, published = ([one_step_decrease(variant, seed) for seed in range(12)] for variant in variants)
    assert sum(kfac) > 1.5 * sum(published)
    assert sum(ours > swapped for ours, swapped in zip(kfac, published, strict=True)) >= 10
