"""After training on NF4: the two merges, what each is, and which one is kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.export.adapter_weights import Adapter
from tasks.export.merge_candidates import Nf4Merge
from tasks.merge import merge
from tasks.model.nf4 import Nf4Weights
from tasks.settings.finetune import ModelSettings
from tasks.training.network import load_base

NF4 = Nf4Merge(dtype="bfloat16", double_quantization=True, into="best", batch_size=4)
ROWS = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14, 15]]


@pytest.fixture
def dataset(tiny_model: Artifact, store: Store) -> Artifact:
    with store.draft("dataset") as draft:
        shutil.copytree(tiny_model.path, draft.path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
        pq.write_table(pa.table({"input_ids": ROWS, "labels": ROWS}), draft.path / "validation.parquet")
        draft.facts = {"end_of_turn": "<|im_end|>"}
    return draft.done()


@pytest.fixture
def adapter(tiny_model: Artifact, store: Store) -> Artifact:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    with store.draft("adapter") as draft:
        network = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model.path), config)
        network.save_pretrained(str(draft.path))
    return draft.done()


def merged_by(tiny_model: Artifact, dataset: Artifact, adapter: Artifact, store: Store, **changes: Any) -> Artifact:
    return merge.function(tiny_model, dataset, adapter, False, NF4.model_copy(update=changes), store=store)


def weights(model: Artifact) -> dict[str, torch.Tensor]:
    return load_file(model.path / "model.safetensors")


@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dequantised_weights_are_those_that_training_computes_with(
    tiny_model: Artifact, dtype: Any, double_quantization: bool
) -> None:
    held = ModelSettings(name="tiny", dtype=dtype, double_quantization=double_quantization)
    config = AutoConfig.from_pretrained(tiny_model.path)
    dequantized = Nf4Weights(config, False, dtype=dtype, double_quantization=double_quantization)
    original, network = weights(tiny_model), load_base(tiny_model, held)
    trained_on = {
        f"{name}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in network.named_modules()
        if isinstance(module, Linear4bit)
    }
    assert dequantized.names == trained_on.keys() and len(trained_on) == 14
    for name, weight in trained_on.items():
        assert weight.dtype == getattr(torch, dtype) and not torch.equal(weight.float(), original[name].float())
        torch.testing.assert_close(dequantized(name, original[name]), weight.to(original[name].dtype), rtol=0, atol=0)
    with pytest.raises(KeyError, match="embed_tokens"):
        dequantized("model.embed_tokens.weight", original["model.embed_tokens.weight"])


def test_both_merges_are_what_their_names_say(
    tiny_model: Artifact, dataset: Artifact, adapter: Artifact, store: Store
) -> None:
    original, change = weights(tiny_model), Adapter(adapter.path)
    dequantized = Nf4Weights(
        AutoConfig.from_pretrained(tiny_model.path), False, dtype="bfloat16", double_quantization=True
    )
    for into in ("original", "dequantized"):
        merged = merged_by(tiny_model, dataset, adapter, store, into=into)
        assert merged.facts["merge"] == {"into": into}
        for name, weight in weights(merged).items():
            start = (
                dequantized(name, original[name])
                if into == "dequantized" and name in dequantized.names
                else original[name]
            )
            assert torch.equal(weight, change.merged(name, start) if name in change.targets else start), name


def brute_force_loss(directory: Path) -> float:
    """Mean over all tokens but each row's first, row by row, without padding."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    total = count = 0.0
    for row in ROWS:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0, :-1].float()
        total -= float(logits.log_softmax(-1)[range(len(row) - 1), row[1:]].sum())
        count += len(row) - 1
    return total / count


def test_the_better_one_is_kept_and_both_are_told(
    tiny_model: Artifact, dataset: Artifact, adapter: Artifact, store: Store
) -> None:
    single = {into: merged_by(tiny_model, dataset, adapter, store, into=into) for into in ("original", "dequantized")}
    best = merged_by(tiny_model, dataset, adapter, store)
    facts = best.facts["merge"]
    for into, merged in single.items():
        assert facts["validation_loss"][into] == pytest.approx(brute_force_loss(merged.path), abs=2e-3)
    assert facts["into"] == min(facts["validation_loss"], key=facts["validation_loss"].get)
    assert best.files == single[facts["into"]].files
    losses = facts["validation_loss"]
    assert facts["difference"] == pytest.approx(losses["original"] - losses["dequantized"]) and facts["stderr"] > 0


@pytest.mark.parametrize("better", ["original", "dequantized"])
def test_either_can_be_the_better_one(
    tiny_model: Artifact, dataset: Artifact, adapter: Artifact, store: Store, monkeypatch: pytest.MonkeyPatch,
    better: str,
) -> None:  # fmt: skip
    from tasks.evaluation.validation_loss import ValidationLoss

    def measured(directory: Path, *_others: object) -> ValidationLoss:
        return ValidationLoss((1.0, 1.0) if directory.name == better else (2.0, 3.0), (1, 1))

    monkeypatch.setattr("tasks.export.merge_candidates.merged_validation_loss", measured)
    best = merged_by(tiny_model, dataset, adapter, store)
    assert best.facts["merge"]["into"] == better
    assert best.files == merged_by(tiny_model, dataset, adapter, store, into=better).files
    assert {path.name for path in best.path.iterdir()} == {Path(name).name for name in best.files}


def test_without_validation_rows_it_is_the_original(
    tiny_model: Artifact, dataset: Artifact, adapter: Artifact, store: Store
) -> None:
    with store.draft("dataset") as draft:
        shutil.copytree(dataset.path / "tokenizer", draft.path / "tokenizer")
    blind = draft.done()
    assert merged_by(tiny_model, blind, adapter, store).facts["merge"] == {"into": "original"}


def test_a_loss_that_is_no_number_leaves_nothing_behind(
    tiny_model: Artifact, dataset: Artifact, adapter: Artifact, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_arguments: object) -> None:
        raise UserError("the loss is not a number", where="merge", fix="Lower training.learning_rate.")

    monkeypatch.setattr("tasks.export.merge_candidates.merged_validation_loss", diverged)
    with pytest.raises(UserError, match="not a number"):
        merged_by(tiny_model, dataset, adapter, store)
    assert not (store.root / "merged").exists() and not list((store.root / "drafts").iterdir())
