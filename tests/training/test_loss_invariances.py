"""Masking, padding, packing and accumulation change no reported number: neither loss nor its gradient, to 1e-5."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tasks.engine.artifacts import Artifact
from tasks.evaluation.validation_loss import UNSUPERVISED, Row, read_rows, validation_loss
from tasks.settings.finetune import LoraSettings, ModelSettings, TrainingSettings
from tasks.training.network import load_network
from tasks.training.step import supervised_loss

BASE = ModelSettings(name="tiny", dtype="float32", quantization="none")
PAD = 2
CLOSE = 1e-5


@pytest.fixture(scope="module")
def network(tiny_model: Artifact) -> PeftModel:
    """With an adapter that does something, so that both its matrices have a gradient."""
    network = load_network(
        tiny_model, base=BASE, lora=LoraSettings(r=4, alpha=8), training=TrainingSettings(), max_length=64, seed=1
    )
    generator = torch.Generator().manual_seed(2)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return network


@pytest.fixture(scope="module")
def rows(tokenized_rows: Callable[[int, int], Artifact]) -> list[Row]:
    """Six of unlike length; the second half of each is supervised."""
    return read_rows(tokenized_rows(6, 0).path / "train.parquet")


@dataclass
class Step:
    """What one optimizer step reports, and the gradient at each weight."""

    loss: float
    gradients: list[torch.Tensor]

    @property
    def norm(self) -> float:
        return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in self.gradients))


def step(network: PeftModel, batches: Sequence[dict[str, Any]]) -> Step:
    """Accumulate the training loss over batches."""
    network.zero_grad()
    supervised = sum(int((batch["labels"][:, 1:] != UNSUPERVISED).sum()) for batch in batches)
    losses = [supervised_loss(network, batch, supervised) for batch in batches]
    for loss in losses:
        loss.backward()
    return Step(sum(float(loss.detach()) for loss in losses), gradients(network))


def gradients(network: PeftModel) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]


def padded(rows: Sequence[Row], further: int = 0, token: int = PAD) -> dict[str, torch.Tensor]:
    """A batch as TRL pads it, and further on the right."""
    batch = DataCollatorForLanguageModeling(pad_token_id=token)([dict(row) for row in rows])
    fill = {"input_ids": token, "labels": UNSUPERVISED, "attention_mask": 0}
    return {name: torch.nn.functional.pad(batch[name], (0, further), value=fill[name]) for name in fill}


def same(mine: Step, theirs: Step) -> None:
    assert mine.loss == pytest.approx(theirs.loss, rel=CLOSE)
    assert mine.norm == pytest.approx(theirs.norm, rel=CLOSE)
    assert len(mine.gradients) == len(theirs.gradients) == 28
    for gradient, expected in zip(mine.gradients, theirs.gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=CLOSE, atol=CLOSE * float(expected.abs().max()))


def unpadded(network: PeftModel, rows: Sequence[Row]) -> Step:
    """Each row by itself, all of its logits, as a sum over its targets."""
    network.zero_grad()
    total, count = torch.zeros(()), 0
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        log_p = network(input_ids=ids).logits.log_softmax(-1)
        for place in range(1, ids.shape[1]):
            if (target := int(labels[0, place])) != UNSUPERVISED:
                total, count = total - log_p[0, place - 1, target], count + 1
    (total / count).backward()
    return Step(float(total.detach()) / count, gradients(network))


def test_the_label_mask_leaves_the_targets_alone_in_the_loss(network: PeftModel, rows: list[Row]) -> None:
    """A row without targets, and tokens after the last target, change nothing; a target more does."""
    expected = unpadded(network, rows)
    same(step(network, [padded(rows)]), expected)
    silent = {"input_ids": [30, 31, 32, 33], "labels": [UNSUPERVISED] * 4}
    tails = [{"input_ids": [*r["input_ids"], 40, 41], "labels": [*r["labels"], *[UNSUPERVISED] * 2]} for r in rows]
    for more in ([silent, *rows], tails):
        same(step(network, [padded(more)]), expected)
        validation = validation_loss(network, more, 3, PAD)
        assert validation.loss == pytest.approx(expected.loss, rel=CLOSE)
    unmasked = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    assert abs(step(network, [padded(unmasked)]).loss - expected.loss) > 1e-3


def test_padding_a_batch_further_changes_no_number(network: PeftModel, rows: list[Row]) -> None:
    expected = unpadded(network, rows)
    for batch in (padded(rows), padded(rows, 1), padded(rows, 40), padded(rows, 40, token=77)):
        same(step(network, [batch]), expected)
    alone = validation_loss(network, rows, 1, PAD)
    fill = {"input_ids": [PAD] * 40, "labels": [UNSUPERVISED] * 40}
    further = [{name: [*row[name], *fill[name]] for name in fill} for row in rows]
    for padded_validation in (validation_loss(network, rows, 6, PAD), validation_loss(network, further, 6, PAD)):
        assert padded_validation.row_nll == pytest.approx(alone.row_nll, rel=CLOSE)
        assert padded_validation.row_tokens == alone.row_tokens
        assert padded_validation.stderr == pytest.approx(alone.stderr, rel=CLOSE)
    assert alone.loss == pytest.approx(expected.loss, rel=CLOSE)


def test_packing_rows_end_to_end_changes_no_number(network: PeftModel, rows: list[Row]) -> None:
    """As TRL packs them: one row of all tokens, whose positions start anew."""
    expected = unpadded(network, rows)
    collate = DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)
    packed = collate([dict(row) for row in rows])
    assert packed["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in rows))
    same(step(network, [packed]), expected)
    two = [collate([dict(row) for row in part]) for part in (rows[:4], rows[4:])]
    same(step(network, two), expected)
    assert validation_loss(network, rows, 6, PAD).loss == pytest.approx(step(network, [packed]).loss, rel=CLOSE)


def test_splitting_a_batch_changes_no_number(network: PeftModel, rows: list[Row]) -> None:
    """Into parts of one row, of two, and of unlike numbers of targets."""
    expected = unpadded(network, rows)
    for parts in ([rows[n : n + 1] for n in range(6)], [rows[n : n + 2] for n in range(0, 6, 2)], [rows[:1], rows[1:]]):
        same(step(network, [padded(part) for part in parts]), expected)
        validations = [validation_loss(network, part, 2, PAD) for part in parts]
        total = math.fsum(value for part in validations for value in part.row_nll)
        assert total / sum(part.supervised_tokens for part in validations) == pytest.approx(expected.loss, rel=CLOSE)
    whole = [validation_loss(network, rows, size, PAD) for size in (1, 2, 6)]
    for validation in whole:
        assert validation.row_nll == pytest.approx(whole[0].row_nll, rel=CLOSE)
        assert validation.perplexity == pytest.approx(math.exp(expected.loss), rel=CLOSE)
