"""Reprojection, dynamic rank, and the export of what is left."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor

from grit import GRITConfig, GRITManager, save_adapter
from grit.modules import lora_modules
from grit.reprojection import balanced_basis, effective_ranks
from tests.support.adapters import MakeModel, backward, train
from tests.support.factors import covariance, whole

REPROJECTING = {"kfac_update_freq": 1, "cov_update_freq": 1, "kfac_min_samples": 1, "reprojection_freq": 3}


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 4), rank=st.integers(1, 8), seed=st.integers(0, 99))
def test_both_factors_are_diagonal_in_the_balanced_basis(count: int, rank: int, seed: int) -> None:
    h, u = covariance(count, rank, seed), covariance(count, rank, seed + 1000)
    q, inverse, energies = balanced_basis(h, u, 1e-6, whole(h))
    torch.testing.assert_close(q @ inverse, torch.eye(rank).expand_as(q), rtol=1e-3, atol=1e-3)
    new_h, new_u = q @ h @ q.mT, inverse.mT @ u @ inverse
    for factor in (new_h, new_u):
        diagonal = torch.diag_embed(factor.diagonal(dim1=1, dim2=2))
        torch.testing.assert_close(factor, diagonal, rtol=0, atol=2e-3 * float(factor.abs().max()))
    product = (new_h * new_u).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(product / product.sum(-1, True), energies, rtol=1e-2, atol=1e-3)
    assert bool((energies.diff(dim=-1) <= 1e-6).all())


def test_energies_do_not_depend_on_the_basis() -> None:
    h, u = covariance(2, 5, 0), covariance(2, 5, 1)
    q = torch.randn(5, 5, generator=torch.Generator().manual_seed(3)) + 2 * torch.eye(5)
    other = torch.linalg.inv(q)
    changed = balanced_basis(q @ h @ q.T, other.T @ u @ other, 1e-9, whole(h))[2]
    torch.testing.assert_close(changed, balanced_basis(h, u, 1e-9, whole(h))[2], rtol=1e-3, atol=1e-4)


def test_an_empty_factor_changes_nothing() -> None:
    q, inverse, _ = balanced_basis(covariance(1, 3, 0), torch.zeros(1, 3, 3), 0.03, torch.tensor([3]))
    assert torch.equal(q[0], torch.eye(3)) and torch.equal(inverse[0], torch.eye(3))


@pytest.mark.parametrize(
    ("threshold", "least", "wanted"),
    [(1.0, 1, [4, 4]), (0.5, 1, [1, 2]), (0.9, 1, [3, 4]), (0.5, 3, [3, 3]), (0.5, 9, [4, 4])],
)
def test_effective_ranks(threshold: float, least: int, wanted: list[int]) -> None:
    energies = torch.tensor([[0.6, 0.2, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]])
    assert effective_ranks(energies, threshold, least).tolist() == wanted


def reprojecting(model: PeftModel, **config: Any) -> GRITManager:
    return GRITManager(model, GRITConfig(**{**REPROJECTING, **config}))


def logits(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_without_a_cut_the_model_stays_as_it_was(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    plain, model = make_model(), make_model()
    manager = reprojecting(model)
    train(plain, batch, reprojecting(plain, reprojection_freq=0), 3)
    train(model, batch, manager, 3)
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(lora_modules(model)[0].lora_a.weight, lora_modules(plain)[0].lora_a.weight, atol=1e-3)
    assert set(manager.ranks.values()) == {4}
    ours, raw = lora_modules(model)[0].lora_a.weight, lora_modules(plain)[0].lora_a.weight
    assert float(ours.detach().norm()) == pytest.approx(float(raw.detach().norm()), rel=1e-4)


def test_factors_and_moments_are_those_of_the_new_basis(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """The next gradient in the new basis is the old one changed as the moments were: Q^-T dA and dB Q^T."""
    plain, model = make_model(), make_model()
    manager = reprojecting(model)
    old = train(plain, batch, reprojecting(plain, reprojection_freq=0), 3)
    new = train(model, batch, manager, 3)
    for before, after in zip(lora_modules(plain), lora_modules(model), strict=True):
        a, b = (module.lora_a.weight.detach() for module in (before, after))
        inverse_t = torch.linalg.lstsq(b.T, a.T).solution  # a.T = b.T X, A = X^T A', Q^-1 = X^T
        q_t = torch.linalg.inv(inverse_t)
        for name, of_a, of_b in (("exp_avg", inverse_t, q_t), ("exp_avg_sq", inverse_t.square(), q_t.square())):
            moment, other = old.state[before.lora_a.weight][name], old.state[before.lora_b.weight][name]
            moved, moved_other = new.state[after.lora_a.weight][name], new.state[after.lora_b.weight][name]
            torch.testing.assert_close(moved, of_a @ moment, rtol=2e-2, atol=2e-3 * float(moment.abs().max()))
            torch.testing.assert_close(moved_other, other @ of_b, rtol=2e-2, atol=2e-3 * float(other.abs().max()))
    model.train()
    fresh = GRITManager(model, GRITConfig(cov_update_freq=1, kfac_update_freq=1, kfac_min_samples=1, kfac_ema=0.0))
    fresh.loss_denominator = 10
    backward(model, batch, 10)
    fresh.step()
    for group, own in zip(manager.factor_groups, fresh.factor_groups, strict=True):
        for name in ("sigma_h", "sigma_u"):
            kept, seen = getattr(group, name), getattr(own, name)
            cosine = (kept * seen).sum((1, 2)) / kept.norm(dim=(1, 2)) / seen.norm(dim=(1, 2))
            assert float(cosine.min()) > 0.7, "an average of the last steps, in the same basis"


def test_cut_directions_stay_zero_and_the_rank_only_falls(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model()
    manager = reprojecting(model, rank_adaptation_threshold=0.8, min_lora_rank=2)
    train(model, batch, manager, 3)
    first = manager.ranks
    manager.close()
    assert min(first.values()) >= 2 and min(first.values()) < 4
    train(model, batch, reprojecting(model, rank_adaptation_threshold=0.8), 4)
    for module in lora_modules(model):
        rank = int(module.lora_a.weight.any(1).sum())
        assert rank <= first[module.name]
        assert int(module.lora_b.weight.any(0).sum()) <= first[module.name]
        assert bool(torch.isfinite(module.lora_a.weight).all())


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_exported_adapter_is_smaller_and_answers_the_same(
    make_model: MakeModel, batch: dict[str, Tensor], tmp_path: Path, use_rslora: bool
) -> None:
    model = make_model(use_rslora=use_rslora, lora_alpha=8)
    train(model, batch, reprojecting(model, rank_adaptation_threshold=0.8), 4)
    before = copy.deepcopy(model.peft_config["default"].to_dict())
    ranks = save_adapter(model, tmp_path)
    assert model.peft_config["default"].to_dict() == before
    assert min(ranks.values()) < 4
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) < sum(
        weight.numel() for module in lora_modules(model) for weight in module.weights
    )
    assert {len(t) for name, t in saved.items() if "lora_A" in name} == set(ranks.values())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    base = make_model().unload()
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_of_the_user_do_not_hide_the_ranks_that_are_left(
    make_model: MakeModel, batch: dict[str, Tensor], tmp_path: Path, use_rslora: bool
) -> None:
    """k_proj is cut from 3 to 2 in the first layer only; PEFT finds `k_proj` before `model.layers...`."""
    patterns: dict[str, Any] = {
        "rank_pattern": {"k_proj": 3, "layers.1.self_attn.v_proj": 2}, "alpha_pattern": {"k_proj": 5, "v_proj": 7},
    }  # fmt: skip
    model = make_model(target_modules=["q_proj", "k_proj", "v_proj"], lora_alpha=8, use_rslora=use_rslora, **patterns)
    for module in lora_modules(model):
        cut = {"layers.0.self_attn.k_proj": 2, "layers.0.self_attn.v_proj": 1}
        for end, rank in cut.items():
            if module.path.endswith(end):
                module.lora_a.weight.data[rank:] = 0
                module.lora_b.weight.data[:, rank:] = 0
    ranks = save_adapter(model, tmp_path)
    short = {path.removeprefix("base_model.model.model.layers."): rank for path, rank in ranks.items()}
    assert short == {
        "0.self_attn.q_proj": 4, "0.self_attn.k_proj": 2, "0.self_attn.v_proj": 1,
        "1.self_attn.q_proj": 4, "1.self_attn.k_proj": 3, "1.self_attn.v_proj": 2,
    }  # fmt: skip
    loaded = PeftModel.from_pretrained(make_model().unload(), str(tmp_path))
    assert {path: layer.r["default"] for path, layer in loaded.named_modules() if hasattr(layer, "lora_A")} == ranks
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=1e-5, atol=1e-6)


def test_an_adapter_of_full_rank_is_saved_as_peft_saves_it(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(str(tmp_path / "peft"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


def test_reprojection_needs_the_optimizer_and_its_settings_fit() -> None:
    with pytest.raises(ValueError, match="rank_adaptation_threshold: needs reprojection_freq"):
        GRITConfig(rank_adaptation_threshold=0.9)
    with pytest.raises(ValueError, match="eigen_adam has a basis of its own"):
        GRITConfig(variant="eigen_adam", reprojection_freq=5)
    with pytest.raises(ValueError, match="reprojection_freq: the variant adamw only measures"):
        GRITConfig(variant="adamw", reprojection_freq=5)


def test_a_module_whose_a_is_zero_is_left_alone(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    """Also where its factor still remembers another A."""
    for zeroed_at in (0, 2):
        model = make_model()
        empty, *others = lora_modules(model)
        starts = [module.lora_a.weight.detach().clone() for module in others]
        manager = reprojecting(model, reprojection_freq=3)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        manager.attach(optimizer)
        for step in range(3):
            if step == zeroed_at:
                empty.lora_a.weight.data.zero_()
            backward(model, batch, 10)
            manager.step()
            optimizer.step()
            optimizer.zero_grad()
        assert not empty.lora_a.weight.any() and bool(torch.isfinite(empty.lora_b.weight).all())
        for module, start in zip(others, starts, strict=True):
            assert bool(torch.isfinite(module.lora_a.weight).all())
            assert not torch.equal(module.lora_a.weight, start)


def test_of_several_active_adapters_the_named_one_is_saved(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "other"])
    for module in lora_modules(model):
        cut = 2 if module.adapter == "other" else 3
        module.lora_a.weight.data[cut:] = 0
        module.lora_b.weight.data[:, cut:] = 0
    with pytest.raises(ValueError, match=r"several adapters are active \(default, other\): name the one"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="the adapter third is not active"):
        save_adapter(model, tmp_path, "third")
    for name, directory, rank, count in (("default", tmp_path, 3, 6), ("other", tmp_path / "other", 2, 2)):
        assert list(save_adapter(model, tmp_path, name).values()) == [rank] * count
        saved = load_file(directory / "adapter_model.safetensors")
        assert {len(t) for key, t in saved.items() if "lora_A" in key} == {rank}
        assert len(saved) == 2 * count
