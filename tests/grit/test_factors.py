"""What the factors are made of: the real tokens, whatever the batch, its padding, its scale and checkpointing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from grit import GRITManager
from grit.config import Variant
from tests.support.adapters import QUICK, MakeModel, backward, train
from tests.support.factors import assert_same, factors


def captured(model: PeftModel, batches: list[dict[str, Tensor]], scale: float = 1.0) -> dict[str, Tensor]:
    manager = GRITManager(model, QUICK)
    total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    manager.loss_denominator, manager.loss_scale = total, scale
    for batch in batches:
        backward(model, batch, total, scale)
    matrices = factors(manager)
    manager.close()
    model.zero_grad()
    return matrices


def test_factors_are_those_of_the_real_tokens(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """By hand: own hooks, a loop over tokens."""
    model = make_model()
    name, layer = next((n, m) for n, m in model.named_modules() if n.endswith("layers.1.mlp.down_proj"))
    seen: dict[str, Tensor] = {}

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen["h"] = output.detach()
        output.register_hook(lambda gradient: seen.update(u=gradient))

    handle = layer.lora_A["default"].register_forward_hook(keep)
    total = int((batch["labels"][:, 1:] != -100).sum())
    backward(model, batch, 1.0)
    handle.remove()
    model.zero_grad()
    tokens = [(row, column) for row, column in batch["attention_mask"].nonzero().tolist()]
    sigma_h = sum(torch.outer(seen["h"][t], seen["h"][t]) for t in tokens) / len(tokens)
    sigma_u = sum(torch.outer(seen["u"][t], seen["u"][t]) for t in tokens) / len(tokens)
    manager = GRITManager(model, QUICK)
    index = next(i for i, m in enumerate(manager.factor_groups[0].modules) if m.name.startswith(name))
    manager.loss_denominator = total
    backward(model, batch, total)
    ours = factors(manager)
    for name, wanted in (("h", sigma_h), ("u", sigma_u)):
        torch.testing.assert_close(ours[name][index], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert ours["samples"][index] == len(tokens) == 41


def test_factors_do_not_depend_on_how_the_batch_is_split(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(4)]
    assert_same(captured(make_model(), [batch]), captured(make_model(), rows))


def test_padding_is_no_token_where_the_base_model_is_called(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """Whoever has a handle on it may call it, without PEFT's wrapper."""
    model = make_model()
    manager = GRITManager(model, QUICK)
    manager.loss_denominator = total = int((batch["labels"][:, 1:] != -100).sum())
    backward(model.get_base_model(), batch, total)
    ours = factors(manager)
    assert ours["samples"].tolist() == [41.0] * 6
    assert_same(ours, captured(make_model(), [batch]))


def test_the_mask_is_read_also_where_it_is_given_by_position(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    states = []
    for named in (True, False):
        model = make_model()
        manager = GRITManager(model, QUICK)
        mask = {"attention_mask": batch["attention_mask"]} if named else {}
        given = () if named else (batch["attention_mask"],)
        model(batch["input_ids"], *given, **mask).logits[:, :-1].square().sum().backward()
        manager.update_and_invert_factors()
        states.append(manager.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0]["0.samples"][0] == batch["attention_mask"].sum()


def test_what_stands_at_padding_does_not_matter(make_model: MakeModel) -> None:
    """Not even where it is no number, as after attention to nothing."""
    manager = GRITManager(make_model(), QUICK)
    (group,) = manager.factor_groups
    mask = torch.tensor([[True, True, False], [True, False, False]])
    h, u = torch.randn(2, 3, 4), torch.randn(2, 3, 4) * mask[..., None]
    group.accumulate(0, h.masked_fill(~mask[..., None], float("nan")), u, mask)
    group.update(1.0)
    torch.testing.assert_close(group.sigma_h[0], h[mask].T @ h[mask] / 3)
    torch.testing.assert_close(group.sigma_u[0], u[mask].T @ u[mask] / 3)


def test_mask_and_denominator_may_be_on_another_device(make_model: MakeModel) -> None:
    """As with a model that is spread over several, whose inputs are on the first."""
    manager = GRITManager(make_model().to("meta"), QUICK)
    (group,) = manager.factor_groups
    h = torch.randn(2, 3, 4, device="meta")
    group.accumulate(0, h, h, torch.ones(2, 3, dtype=torch.bool))
    group.update(torch.tensor(0.1))
    assert group.sigma_u.device.type == "meta"


def test_a_model_that_is_spread_over_devices_later_is_refused(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    GRITManager(model, QUICK)
    model.get_base_model().model.layers[1].to("meta")
    with pytest.raises(ValueError, match="spread over cpu, meta after GRITManager was made"):
        model(input_ids=batch["input_ids"])


def test_the_factors_follow_a_model_that_is_moved(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """As trainers do, which put the model on the GPU after the manager was made."""
    model = make_model()
    manager = GRITManager(model, QUICK)
    model.to("meta")
    model(input_ids=batch["input_ids"].to("meta")).logits.sum().backward()
    assert {tensor.device.type for name, tensor in manager.state_dict().items() if "." in name} == {"meta"}


@pytest.mark.parametrize("variant", ["kfac", "eigen_adam", "graft"])
def test_adapters_in_bfloat16(make_model: MakeModel, batch: dict[str, Tensor], variant: Variant) -> None:
    model = make_model()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    train(model, batch, GRITManager(model, replace(QUICK, variant=variant)), 3)
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in after)
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_factors_do_not_depend_on_the_loss_scale(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    assert_same(captured(make_model(), [batch]), captured(make_model(), [batch], scale=1024.0))


@pytest.mark.parametrize("side", ["left", "right"])
def test_factors_do_not_depend_on_padding(make_model: MakeModel, batch: dict[str, Tensor], side: str) -> None:
    width = (5, 0) if side == "left" else (0, 5)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded = {name: nn.functional.pad(value, width, value=fill[name]) for name, value in batch.items()}
    positions = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    model = make_model()
    model.register_forward_pre_hook(
        lambda _m, args, kwargs: (args, kwargs | {"position_ids": positions}), with_kwargs=True
    )
    assert_same(captured(make_model(), [batch]), captured(model, [padded]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_factors_do_not_depend_on_checkpointing(
    make_model: MakeModel, batch: dict[str, Tensor], reentrant: bool
) -> None:
    model = make_model()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(captured(make_model(), [batch]), captured(model, [batch]))


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_another_form_is_refused(make_model: MakeModel, batch: dict[str, Tensor], additive: bool) -> None:
    """It need not say what is padding; without the refusal padding would enter the factors."""
    seen = batch["attention_mask"].bool()[:, None, None, :] & torch.ones(12, 12, dtype=torch.bool).tril()
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min) if additive else seen
    model = make_model()
    manager = GRITManager(model, QUICK)
    with pytest.raises(ValueError, match=r"of \[batch, length\], .* one of \[4, 1, 12, 12\]"):
        model(input_ids=batch["input_ids"], attention_mask=mask)
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=mask)
    with manager.paused():
        model(input_ids=batch["input_ids"], attention_mask=mask)
