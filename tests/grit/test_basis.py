"""The first basis, against the singular vectors of the full gradient."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from grit import GRITConfig, GRITManager, GritTrainer, set_gradient_basis
from grit.modules import lora_modules
from tests.support.adapters import MakeModel, arguments, network
from tests.support.hooks import hook_count


def summed_loss(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def fresh(make_model: MakeModel, **lora: object) -> PeftModel:
    model = make_model(**lora)
    for module in lora_modules(model):
        torch.nn.init.zeros_(module.lora_b.weight)
    return model


def three_tokens() -> dict[str, Tensor]:
    """A batch whose gradients have rank three at most."""
    ids = torch.tensor([[5, 60, 31]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def full_gradients(model: PeftModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """dL/dW of each layer, by autograd."""
    weights = {module.path: module.layer.base_layer.weight for module in lora_modules(model)}
    for weight in weights.values():
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(summed_loss(model, batch), list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return dict(zip(weights, gradients, strict=True))


def captured_share(rows: Tensor, gradient: Tensor) -> float:
    """Squared norm of the gradient within the row space."""
    q = torch.linalg.qr(rows.T).Q
    return float((gradient @ q).square().sum())


def test_rows_are_the_top_singular_vectors_of_the_gradient(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model, before = fresh(make_model), fresh(make_model)
    gradients = full_gradients(model, batch)
    set_gradient_basis(model, [batch], lambda rows: summed_loss(model, rows))
    for module, old in zip(lora_modules(model), lora_modules(before), strict=True):
        a, start = module.lora_a.weight.detach(), old.lora_a.weight.detach()
        values = torch.linalg.svdvals(gradients[module.path])
        share = captured_share(a, gradients[module.path]) / float(values[:4].square().sum())
        assert share > 0.8, "even where the spectrum is flat, as that of a random model is"
        assert share > 2 * captured_share(start, gradients[module.path]) / float(values[:4].square().sum())
        norms = a.norm(dim=1)
        torch.testing.assert_close(norms, (start.norm() / 2).expand(4), rtol=1e-4, atol=0)
        gram = a @ a.T / norms[0] ** 2
        torch.testing.assert_close(gram, torch.eye(4), rtol=0, atol=1e-4)
        assert not module.lora_b.weight.any()


def test_the_rows_are_exact_and_in_order_where_the_rank_suffices(make_model: MakeModel) -> None:
    model = fresh(make_model)
    batch = three_tokens()
    gradients = full_gradients(model, batch)
    set_gradient_basis(model, [batch], lambda rows: summed_loss(model, rows))
    for module in lora_modules(model):
        values, vectors = torch.linalg.svd(gradients[module.path])[1:]
        a = module.lora_a.weight.detach()
        cosines = (a * vectors[:4]).sum(1).abs() / a.norm(dim=1)
        distinct = int((values > 1e-3 * values[0]).sum())
        assert distinct >= 1
        torch.testing.assert_close(cosines[:distinct], torch.ones(distinct), rtol=0, atol=1e-3)


def test_the_model_stays_as_it_was_and_no_gradient_is_left(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = fresh(make_model)
    before, hooks = summed_loss(model, batch), hook_count(model)
    set_gradient_basis(model, [batch], lambda rows: summed_loss(model, rows), whitened=True)
    assert torch.equal(summed_loss(model, batch), before)
    assert all(p.grad is None for p in model.parameters())
    assert hook_count(model) == hooks


def test_more_batches_are_their_mean(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    whole, split = fresh(make_model), fresh(make_model)
    set_gradient_basis(whole, [batch], lambda part: summed_loss(whole, part))
    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    set_gradient_basis(split, halves, lambda part: summed_loss(split, part))
    for of_whole, of_split in zip(lora_modules(whole), lora_modules(split), strict=True):
        torch.testing.assert_close(of_whole.lora_a.weight, of_split.lora_a.weight, rtol=1e-2, atol=1e-4)


def test_whitening_scales_inputs_and_output_gradients(make_model: MakeModel) -> None:
    """By hand: diag(S_g)^-1/2 G diag(S_x)^-1/2, its top vectors taken back to the coordinates of x."""
    batch = three_tokens()
    model = fresh(make_model)
    gradients = full_gradients(model, batch)
    seen: dict[str, list[Tensor]] = {}
    modules = lora_modules(model)
    handles = []
    for module in modules:

        def keep(_layer: object, inputs: tuple[Tensor, ...], output: Tensor, path: str = module.path) -> None:
            seen[path] = [inputs[0].detach().flatten(0, 1).square().sum(0)]
            output.register_hook(lambda g: seen[path].append(g.flatten(0, 1).square().sum(0)))

        handles.append(module.layer.register_forward_hook(keep))
    summed_loss(model, batch).backward()
    for handle in handles:
        handle.remove()
    set_gradient_basis(model, [batch], lambda rows: summed_loss(model, rows), whitened=True)
    for module in modules:
        x, g = ((square / square.mean() + 0.01).rsqrt() for square in seen[module.path])
        white = g[:, None] * gradients[module.path] * x
        best = float(torch.linalg.svdvals(white)[:4].square().sum())
        assert captured_share(module.lora_a.weight.detach() / x, white) / best > 0.999


def test_padding_does_not_enter_the_whitened_basis(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    spans = []
    for pads in (0, 60):
        model = fresh(make_model)
        fill = {"input_ids": 7, "attention_mask": 0, "labels": -100}
        padded = {name: torch.nn.functional.pad(value, (0, pads), value=fill[name]) for name, value in batch.items()}
        set_gradient_basis(model, [padded], lambda rows, model=model: summed_loss(model, rows), whitened=True)
        rows = (module.lora_a.weight.detach() for module in lora_modules(model))
        spans.append([torch.linalg.qr(a.T).Q for a in rows])
    for span, padded_span in zip(*spans, strict=True):
        torch.testing.assert_close(span @ span.T, padded_span @ padded_span.T, rtol=0, atol=1e-4)


def test_no_layers_input_is_held_until_the_backward_pass(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """Beyond what autograd keeps for itself, and the same under gradient checkpointing."""
    bases = []
    for checkpointed in (False, True):
        model = fresh(make_model, target_modules=["q_proj"])
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        held: list[int] = []
        inputs: list[weakref.ref[Tensor]] = []

        def loss(rows: dict[str, Tensor], model: PeftModel = model, inputs: list = inputs, held: list = held) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
                result = summed_loss(model, rows)
            held.append(sum(reference() is not None for reference in inputs))
            inputs.clear()
            return result

        for module in lora_modules(model):
            module.layer.register_forward_pre_hook(
                lambda _layer, args, inputs=inputs: inputs.append(weakref.ref(args[0].untyped_storage()))
            )
        set_gradient_basis(model, [batch], loss, whitened=True)
        assert held == [0, 0, 0]
        bases.append([module.lora_a.weight.detach() for module in lora_modules(model)])
    for plain, checkpointed_rows in zip(*bases, strict=True):
        torch.testing.assert_close(plain, checkpointed_rows, rtol=1e-3, atol=1e-4)


def test_a_quantised_base_serves_as_well(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = fresh(make_model, r=2)
    for module in lora_modules(model):
        old = module.layer.base_layer
        new = Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        new.load_state_dict(old.state_dict())
        new.support_avx512bf16_for_cpu = False
        module.layer.base_layer = new.to("cpu")
    set_gradient_basis(model, [batch], lambda rows: summed_loss(model, rows))
    assert all(bool(torch.isfinite(module.lora_a.weight).all()) for module in lora_modules(model))
    exact = full_gradients(fresh(make_model, r=2), batch)
    shares = [
        captured_share(module.lora_a.weight.detach(), exact[module.path])
        / float(torch.linalg.svdvals(exact[module.path])[:2].square().sum())
        for module in lora_modules(model)
    ]
    assert min(shares) > 0.6, "of a gradient at slightly other weights"


@pytest.mark.parametrize("whitened", [False, True])
def test_modules_without_a_gradient_are_left_as_they_are(
    make_model: MakeModel, batch: dict[str, Tensor], whitened: bool
) -> None:
    """The first layer's modules run outside of the graph; its v_proj does not run at all."""
    model, before = fresh(make_model), lora_modules(fresh(make_model))
    layer = model.get_base_model().model.layers[0]
    layer.mlp.down_proj.register_forward_hook(lambda _m, _x, output: output.detach())
    layer.self_attn.v_proj.forward = lambda x: x[..., :16].detach()
    layer.self_attn.q_proj.register_forward_hook(lambda _m, _x, output: output.detach())
    set_gradient_basis(model, [batch], lambda rows: summed_loss(model, rows), whitened=whitened)
    for module, old in zip(lora_modules(model), before, strict=True):
        left_alone = torch.equal(module.lora_a.weight, old.lora_a.weight)
        assert left_alone == (".layers.0." in module.path)
        assert not module.lora_b.weight.any()
    with pytest.raises(ValueError, match="no gradient reached any LoRA module"):
        set_gradient_basis(model, [batch], lambda rows: 0 * summed_loss(model, rows), whitened=whitened)


def test_a_failure_leaves_no_trace(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    for failing in (1, 2, 3):
        model, before = fresh(make_model), fresh(make_model)
        hooks = hook_count(model)
        passes = 0

        def loss(rows: dict[str, Tensor], model: PeftModel = model, failing: int = failing) -> Tensor:
            nonlocal passes
            passes += 1
            result = summed_loss(model, rows)
            if passes == failing:
                raise RuntimeError("out of memory")
            return result

        with pytest.raises(RuntimeError, match="out of memory"):
            set_gradient_basis(model, [batch], loss, whitened=True)
        assert passes == failing
        assert hook_count(model) == hooks
        for weight, old in zip(model.parameters(), before.parameters(), strict=True):
            assert torch.equal(weight, old) and weight.grad is None


def test_a_rank_above_a_width_is_filled_up(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = fresh(make_model, r=20, target_modules=["v_proj"])  # 16 x 32
    set_gradient_basis(model, [batch], lambda rows: summed_loss(model, rows))
    for module in lora_modules(model):
        assert torch.linalg.matrix_rank(module.lora_a.weight) == 20


def test_a_trained_adapter_is_refused(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="only before training"):
        set_gradient_basis(model, [batch], lambda rows: summed_loss(model, rows))
    with pytest.raises(ValueError, match="at least one batch"):
        set_gradient_basis(fresh(make_model), [], lambda rows: summed_loss(model, rows))
    model = fresh(make_model)
    model.peft_config["default"].init_lora_weights = "eva"  # PEFT's start that leaves B zero
    with pytest.raises(ValueError, match="would replace what EVA found"):
        set_gradient_basis(model, [batch], lambda rows: summed_loss(model, rows))


def test_an_adapter_that_has_been_trained_goes_on_with_the_initial_basis(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    settings = arguments(tmp_path, per_device_train_batch_size=8, learning_rate=5e-3)

    def trainer(config: GRITConfig) -> tuple[PeftModel, GritTrainer]:
        model = network(len(word_tokenizer), init_lora_weights="pissa")
        assert all(bool(module.lora_b.weight.any()) for module in lora_modules(model))
        return model, GritTrainer(
            model=model, grit_manager=GRITManager(model, config), train_dataset=rows,
            processing_class=word_tokenizer, args=settings,
        )  # fmt: skip

    with pytest.raises(ValueError, match=r'use GRITConfig\(basis="initial"\)'):
        trainer(GRITConfig(kfac_min_samples=1))[1].train()
    model, ours = trainer(GRITConfig(kfac_min_samples=1, basis="initial"))
    before = [module.lora_b.weight.detach().clone() for module in lora_modules(model)]
    losses = [float(line["loss"]) for line in (ours.train(), ours.state.log_history)[1] if "loss" in line]
    assert losses[-1] < losses[0] and ours.step_statistics["in_use"] == 1
    for module, old in zip(lora_modules(model), before, strict=True):
        change = float((module.lora_b.weight.detach() - old).norm() / old.norm())
        assert 0 < change < 0.5, "it went on from what was there"


@pytest.mark.parametrize("basis", ["gradient", "whitened_gradient"])
def test_the_trainer_finds_the_basis_and_draws_the_same_rows(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path, basis: str
) -> None:
    orders, starts = [], []
    for chosen in ("initial", basis):
        model = network(len(word_tokenizer))
        manager = GRITManager(model, GRITConfig(variant="adamw", basis=chosen, basis_steps=1))
        trainer = GritTrainer(
            model=model, grit_manager=manager, args=arguments(tmp_path, max_steps=3, learning_rate=1e-9),
            train_dataset=rows, processing_class=word_tokenizer,
        )  # fmt: skip
        seen: list[list[int]] = []
        model.register_forward_pre_hook(
            lambda _m, _a, kwargs, seen=seen: seen.append(kwargs["input_ids"][:, 0].tolist()), with_kwargs=True
        )
        trainer.train()
        orders.append(seen[-3:])
        starts.append(lora_modules(model)[0].lora_a.weight.detach().clone())
        assert (manager.basis_seconds > 0) == (chosen == basis)
        assert manager.last_diagnostics["tokens"] == 2 * 4, "one captured step of training, none of the basis"
    assert orders[0] == orders[1]
    assert not torch.allclose(starts[0], starts[1], atol=1e-3)
