"""GritCallback in Transformers' own trainer: streams, models of one's own, bypassed modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainingArguments

from grit import GritCallback, GRITConfig, GritInactiveError, GRITManager, set_gradient_basis
from grit.modules import lora_modules
from tests.support.adapters import network
from tests.support.hooks import fuse


def one_step(model: PeftModel, data: Any, tokenizer: PreTrainedTokenizerFast, directory: Path) -> GRITManager:
    """A step at rate 0, after which A is the first basis."""
    manager = GRITManager(model, GRITConfig(kfac_min_samples=1, basis_steps=2))
    arguments = TrainingArguments(
        str(directory), use_cpu=True, report_to="none", save_strategy="no", max_steps=1, learning_rate=0.0,
        per_device_train_batch_size=2, remove_unused_columns=False, seed=3,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    Trainer(model, arguments, collator, data, callbacks=[GritCallback(manager)]).train()
    assert manager.steps == 1 and manager.basis_seconds > 0
    return manager


def test_the_basis_is_that_of_drawn_rows_and_of_a_streams_first(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    bases = []
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))[:4].tolist()
    for data in (rows, rows.select(drawn).to_iterable_dataset()):
        model = network(len(word_tokenizer))
        one_step(model, data, word_tokenizer, tmp_path)
        bases.append([module.lora_a.weight.detach() for module in lora_modules(model)])
    assert all(torch.equal(of_rows, of_stream) for of_rows, of_stream in zip(*bases, strict=True))


class Own(nn.Module):
    """Takes no `num_items_in_batch` and returns a plain dict; its loss is a mean over the batch's labels."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding, self.q_proj = nn.Embedding(vocabulary, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, vocabulary)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.q_proj(self.embedding(input_ids))))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_a_model_that_takes_no_count_of_items_has_its_batches_weighted_by_labels(
    word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The first batch has 2 labels, the second 10: with equal weights the basis would be another one."""
    lengths = (2, 2, 6, 6)
    ids = [[10 + 7 * i + j for j in range(length)] for i, length in enumerate(lengths)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})

    def fresh() -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(Own(len(word_tokenizer)), LoraConfig(r=2, target_modules=["q_proj"]))

    model, weighted, unweighted = fresh(), fresh(), fresh()
    one_step(model, rows.to_iterable_dataset(), word_tokenizer, tmp_path)
    collator = DataCollatorForSeq2Seq(word_tokenizer, padding=True)
    batches = [collator([rows[i], rows[i + 1]]) for i in (0, 2)]

    def summed(batch: Any) -> Tensor:
        return weighted(**batch)["loss"] * (batch["labels"] != -100).sum()

    set_gradient_basis(weighted, batches, summed, seed=3)
    set_gradient_basis(unweighted, batches, lambda batch: unweighted(**batch)["loss"], seed=3)
    ours, wanted, other = (lora_modules(adapted)[0].lora_a.weight.detach() for adapted in (model, weighted, unweighted))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours, other, rtol=1e-2, atol=1e-3)


def test_fused_forwards_that_bypass_the_hooks_end_the_training(
    word_tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    """The study's hybrid run: Unsloth's kernels multiply with the weights, the callback is there, nothing happens."""
    model = network(len(word_tokenizer))
    for module in lora_modules(model):
        fuse(module)
    with pytest.raises(GritInactiveError, match="hooks saw no token.*fused kernels such as Unsloth's"):
        one_step(model, rows, word_tokenizer, tmp_path)
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters()), "it would have trained"
