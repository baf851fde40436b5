from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from grit import GRITConfig, GRITManager
from grit.config import Variant
from tests.grit.conftest import QUICK, MakeModel, backward, train


def factors(manager: GRITManager) -> dict[str, Tensor]:
    """Factors after one captured step."""
    manager.update_and_invert_factors()
    (group,) = manager._groups
    return {"h": group.sigma_h, "u": group.sigma_u, "samples": group.samples}


def captured(model: PeftModel, batches: list[dict[str, Tensor]], scale: float = 1.0) -> dict[str, Tensor]:
    manager = GRITManager(model, QUICK)
    total = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    manager.loss_denominator, manager.loss_scale = total, scale
    for batch in batches:
        backward(model, batch, total, scale)
    found = factors(manager)
    manager.close()
    model.zero_grad()
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-6)


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
    index = next(i for i, m in enumerate(manager._groups[0].modules) if m.name.startswith(name))
    manager.loss_denominator = total
    backward(model, batch, total)
    found = factors(manager)
    torch.testing.assert_close(found["h"][index], sigma_h, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["u"][index], sigma_u, rtol=1e-4, atol=1e-6)
    assert found["samples"][index] == len(tokens) == 41


def test_factors_do_not_depend_on_how_the_batch_is_split(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(4)]
    assert_same(captured(make_model(), [batch]), captured(make_model(), rows))


def test_the_mask_is_read_also_where_it_is_given_by_position(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    found = []
    for named in (True, False):
        model = make_model()
        manager = GRITManager(model, QUICK)
        mask = {"attention_mask": batch["attention_mask"]} if named else {}
        given = () if named else (batch["attention_mask"],)
        model(batch["input_ids"], *given, **mask).logits[:, :-1].square().sum().backward()
        manager.update_and_invert_factors()
        found.append(manager.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert found[0]["0.samples"][0] == batch["attention_mask"].sum()


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
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


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


def test_a_bare_loop_with_its_diagnostics(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    manager = GRITManager(model, QUICK)
    train(model, batch, manager, 4)
    figures = manager.last_diagnostics
    assert figures["ready"] == 1 and 0 < figures["cosine"] < 0.999
    assert figures["grad_norm_preconditioned"] == pytest.approx(figures["grad_norm"], rel=1e-4)
    assert figures["condition_u"] > 1 and figures["tokens"] == 4 * 41
    assert manager.factors_are_ready and manager.memory_bytes() > 0
    plain = make_model()
    train(plain, batch, None, 4)
    assert any(not torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("config", [GRITConfig(variant="adamw"), GRITConfig(ng_warmup_steps=9, kfac_min_samples=1)])
def test_measuring_alone_changes_no_bit(make_model: MakeModel, batch: dict[str, Tensor], config: GRITConfig) -> None:
    measured, plain = make_model(), make_model()
    train(measured, batch, GRITManager(measured, config), 4)
    train(plain, batch, None, 4)
    for one, other in zip(measured.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_close_removes_every_hook(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    manager = GRITManager(model, QUICK)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) > before
    optimizer = torch.optim.AdamW(model.parameters())
    grafting = GRITManager(model, GRITConfig(variant="graft"))
    grafting.attach(optimizer)
    assert optimizer._optimizer_step_pre_hooks and optimizer._optimizer_step_post_hooks
    for one in (manager, grafting):
        one.close()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == before
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_state_goes_on_where_it_was(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    manager = GRITManager(model, GRITConfig(kfac_min_samples=1, kfac_update_freq=2))
    train(model, batch, manager, 3)
    restored = GRITManager(model, manager.config)
    restored.load_state_dict(manager.state_dict())
    results = []
    for one in (manager, restored):
        one.loss_denominator = 10
        for group in one._groups:
            group.clear()
        model.zero_grad()
        backward(model, batch, 10)
        one.step()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-7)


def test_moving_averages_are_corrected_for_their_start(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    manager = GRITManager(model, QUICK)
    (group,) = manager._groups
    backward(model, batch, 1)
    manager.update_and_invert_factors()
    first = group.sigma_h.clone()
    backward(model, batch, 1)
    manager.update_and_invert_factors()
    torch.testing.assert_close(group.sigma_h, first)
    assert float(group.weight[0]) == pytest.approx(1 - 0.95**2)


def test_an_overflow_is_skipped(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    manager = GRITManager(model, QUICK)
    backward(model, batch, 1)
    before = factors(manager)
    backward(model, batch, 1, scale=float("inf"))
    after = factors(manager)
    assert_same(before, after)
    assert torch.isfinite(after["u"]).all()


def test_throttles(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    manager = GRITManager(model, GRITConfig(kfac_min_samples=1, cov_update_freq=2, kfac_update_freq=3))
    seen, roots = [], []
    for _ in range(6):
        backward(model, batch, 1)
        manager.step()
        seen.append(manager.last_diagnostics["tokens"])
        roots.append(manager.preconditioners[0].root_a)
    assert seen == [41, 41, 82, 82, 123, 123]
    assert roots[0] is roots[2] and roots[3] is roots[5] and roots[2] is not roots[3]


def test_throttles_may_be_functions_of_the_step(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """Factorised at each of the first three steps, then never; switched on at the second."""
    config = GRITConfig(
        kfac_min_samples=1, cov_update_freq=lambda step: 1 if step < 2 else 100,
        kfac_update_freq=lambda step: 1 if step < 3 else 100, ng_warmup_steps=lambda step: 1,
    )  # fmt: skip
    model = make_model()
    manager = GRITManager(model, config)
    seen, cosines, roots = [], [], []
    for _ in range(5):
        backward(model, batch, 1)
        manager.step()
        seen.append(manager.last_diagnostics["tokens"])
        cosines.append(manager.last_diagnostics["cosine"])
        roots.append(manager.preconditioners[0].root_a)
    assert seen == [41, 82, 82, 82, 82]
    assert cosines[0] == pytest.approx(1) and cosines[1] < 0.999
    assert roots[0] is not roots[1] and roots[2] is roots[4]


def test_several_adapters_on_their_own_layers(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """Both active, one with rsLoRA; u of each holds its own scale, so its gradient is s B^T g."""
    model = make_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj", "o_proj"], use_rslora=True, lora_alpha=6))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            nn.init.normal_(parameter, std=0.05)
    manager = GRITManager(model, QUICK)
    names = [module.name for module in manager.modules]
    assert (
        sum(name.endswith("[other]") for name in names) == 4 and sum(name.endswith("[default]") for name in names) == 6
    )
    assert {module.scaling for module in manager.modules} == {2.0, 6 / 2**0.5}
    backward(model, batch, 10)
    raw = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    manager.loss_denominator = 10
    manager.step()
    changed = [
        name for name, p in model.named_parameters() if p.grad is not None and not torch.equal(p.grad, raw[name])
    ]
    assert len(changed) == 20
    manager.close()


def test_an_adapter_that_is_not_active_is_left_alone(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj"]))
    assert all(module.adapter == "default" for module in GRITManager(model, QUICK).modules)


def test_other_parameters_and_missing_gradients_are_left_alone(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model(modules_to_save=["lm_head"], rank_pattern={"v_proj": 2})
    manager = GRITManager(model, QUICK)
    assert sorted(group.mean_h.shape[-1] for group in manager._groups) == [2, 4]
    backward(model, batch, 1)
    head = next(p for n, p in model.named_parameters() if "lm_head.modules_to_save" in n)
    skipped = next(p for n, p in model.named_parameters() if "layers.0.self_attn.q_proj.lora_A" in n)
    before, skipped.grad = head.grad.clone(), None
    manager.step()
    assert torch.equal(head.grad, before) and skipped.grad is None


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"use_dora": True}, "does not handle DoRA"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens: GRIT handles LoRA on linear layers only"),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
            "GRIT handles LoRA on linear layers only",
        ),
    ],
)
def test_what_it_cannot_handle_is_refused_by_name(make_model: MakeModel, lora: dict[str, Any], said: str) -> None:
    model = make_model(**lora)
    with pytest.raises(ValueError, match=said):
        GRITManager(model)


def test_half_frozen_adapters_are_refused(make_model: MakeModel) -> None:
    model = make_model()
    for name, parameter in model.named_parameters():
        if "layers.1.self_attn.v_proj.lora_A" in name:
            parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj: GRIT needs A and B both trainable"):
        GRITManager(model)


@pytest.mark.parametrize("name", ["power", "kfac_update_freq", "cov_update_freq", "kfac_damping", "kfac_min_samples"])
def test_impossible_settings_name_the_field(name: str) -> None:
    with pytest.raises(ValueError, match=f"GRITConfig.{name}: 0 is out of bounds"):
        GRITConfig(**{name: 0})


def test_reading_the_configuration_loads_no_heavy_library() -> None:
    code = "import sys, grit.config; sys.exit(any(name in sys.modules for name in ('torch', 'trl', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
