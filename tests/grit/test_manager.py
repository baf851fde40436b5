"""The manager beside an optimizer: diagnostics, state, throttles, several adapters, refusals."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from peft import KasaConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from transformers import T5Config, T5ForConditionalGeneration

from grit import GRITConfig, GRITManager
from tests.support.adapters import QUICK, MakeModel, backward, train
from tests.support.factors import assert_same, factors
from tests.support.hooks import hook_count


def test_a_bare_loop_with_its_diagnostics(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    manager = GRITManager(model, QUICK)
    train(model, batch, manager, 4)
    figures = manager.last_diagnostics
    assert figures["in_use"] == 1 and 0 < figures["cosine"] < 0.999
    assert figures["grad_norm_preconditioned"] == pytest.approx(figures["grad_norm"], rel=1e-4)
    assert figures["condition_a"] > 1 and figures["tokens"] == 4 * 41
    assert manager.factors_are_ready and manager.memory_bytes() > 0
    plain = make_model()
    train(plain, batch, None, 4)
    assert any(not torch.equal(ours, raw) for ours, raw in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("config", [GRITConfig(variant="adamw"), GRITConfig(ng_warmup_steps=9, kfac_min_samples=1)])
def test_measuring_alone_changes_no_bit(make_model: MakeModel, batch: dict[str, Tensor], config: GRITConfig) -> None:
    measured, plain = make_model(), make_model()
    manager = GRITManager(measured, config)
    train(measured, batch, manager, 4)
    assert manager.last_diagnostics["in_use"] == 0
    train(plain, batch, None, 4)
    for ours, raw in zip(measured.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, raw)


def test_close_removes_every_hook(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    before = hook_count(model)
    gc.collect()
    of_all = len(_global_optimizer_post_hooks)
    manager = GRITManager(model, QUICK)
    assert hook_count(model) > before
    optimizer = torch.optim.AdamW(model.parameters())
    of_optimizer = hook_count(optimizer)
    grafting = GRITManager(model, GRITConfig(variant="graft"))
    grafting.attach(optimizer)
    assert hook_count(optimizer) == of_optimizer + 2
    manager.close()
    grafting.close()
    assert hook_count(model) == before and hook_count(optimizer) == of_optimizer
    assert len(_global_optimizer_post_hooks) == of_all


def test_a_manager_that_is_dropped_leaves_no_hook_and_keeps_no_model(make_model: MakeModel) -> None:
    gc.collect()
    of_all = len(_global_optimizer_post_hooks)
    model = make_model()
    GRITManager(model, QUICK)
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None and len(_global_optimizer_post_hooks) == of_all


def test_state_goes_on_where_it_was(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    manager = GRITManager(model, GRITConfig(kfac_min_samples=1, kfac_update_freq=2))
    train(model, batch, manager, 3)
    restored = GRITManager(model, manager.config)
    restored.load_state_dict(manager.state_dict())
    results = []
    for stepping in (manager, restored):
        stepping.loss_denominator = 10
        for group in stepping.factor_groups:
            group.clear()
        model.zero_grad()
        backward(model, batch, 10)
        stepping.step()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for expected, gradient in zip(*results, strict=True):
        torch.testing.assert_close(expected, gradient, rtol=1e-4, atol=1e-7)


def test_moving_averages_are_corrected_for_their_start(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    manager = GRITManager(model, QUICK)
    (group,) = manager.factor_groups
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


def test_the_two_calls_of_a_step_are_the_step(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    config = GRITConfig(kfac_min_samples=1, cov_update_freq=2, kfac_update_freq=3, ng_warmup_steps=2)
    results = []
    for together in (True, False):
        model = make_model()
        manager = GRITManager(model, config)
        manager.loss_denominator = 10
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(6):
            backward(model, batch, 10)
            if together:
                manager.step()
            else:
                manager.update_and_invert_factors()
                manager.precondition_gradients()
            optimizer.step()
            optimizer.zero_grad()
        assert manager.steps == 6
        weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        results.append(manager.state_dict() | weights)
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value)


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


@pytest.mark.parametrize("name", ["kfac_update_freq", "cov_update_freq", "ng_warmup_steps"])
def test_a_throttle_that_gives_too_little_names_the_field(
    make_model: MakeModel, batch: dict[str, Tensor], name: str
) -> None:
    model = make_model()
    least = 0 if name == "ng_warmup_steps" else 1
    settings: dict[str, Any] = {"kfac_min_samples": 1, name: lambda step: least if step < 2 else least - 1}
    manager = GRITManager(model, GRITConfig(**settings))
    with pytest.raises(ValueError, match=f"GRITConfig.{name}: the function gave {least - 1} at step 2"):
        for _ in range(3):
            backward(model, batch, 1)
            manager.step()
    assert manager.steps == 2


def test_a_pause_within_a_pause_does_not_end_it(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    manager = GRITManager(model, QUICK)
    with manager.paused():
        with manager.paused():
            pass
        model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
    with pytest.raises(ValueError, match="cannot tell what the loss is divided by"):
        manager.take_loss_denominator()
    backward(model, batch, 1)
    manager.update_and_invert_factors()
    assert manager.factor_groups[0].captured.tolist() == [41] * 6, "those of the one pass outside of the pause"


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
    assert sorted(group.mean_h.shape[-1] for group in manager.factor_groups) == [2, 4]
    backward(model, batch, 1)
    head = next(p for n, p in model.named_parameters() if "lm_head.modules_to_save" in n)
    skipped = next(p for n, p in model.named_parameters() if "layers.0.self_attn.q_proj.lora_A" in n)
    before, skipped.grad = head.grad.clone(), None
    manager.step()
    assert torch.equal(head.grad, before) and skipped.grad is None


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"use_dora": True}, "does not handle DoRA"),
        ({"kasa_config": KasaConfig()}, r"layers\.0.*: GRIT handles B A x only, and PEFT's KasaLinearVariant computes"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens: GRIT handles LoRA on linear layers only"),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
            "GRIT handles LoRA on linear layers only",
        ),
    ],
)
def test_what_it_cannot_handle_is_refused_by_name(make_model: MakeModel, lora: dict[str, Any], message: str) -> None:
    model = make_model(**lora)
    with pytest.raises(ValueError, match=message):
        GRITManager(model)


def test_layers_that_do_not_see_every_token_are_refused_by_name(
    make_model: MakeModel, batch: dict[str, Tensor]
) -> None:
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    encoder_decoder = get_peft_model(T5ForConditionalGeneration(config), LoraConfig(target_modules=["q"]))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration: GRIT does not handle encoder-decoders"):
        GRITManager(encoder_decoder)
    model = make_model(target_modules=["q_proj", "lm_head"])
    GRITManager(model, QUICK)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with pytest.raises(ValueError, match="lm_head.*mask of 48 tokens, layer input of 12.*pass no logits_to_keep"):
        model(**inputs, logits_to_keep=3).logits.sum().backward()


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


def test_the_first_basis_is_left_alone_by_the_measuring_variant_unless_it_is_asked_for() -> None:
    assert GRITConfig().first_basis == "gradient"
    assert GRITConfig(variant="adamw").first_basis == "initial"
    assert GRITConfig(variant="adamw", basis="whitened_gradient").first_basis == "whitened_gradient"
