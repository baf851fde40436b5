from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.engine.errors import UserError
from tasks.evaluation import validation_loss as module
from tasks.evaluation.validation_loss import UNSUPERVISED, Row, evaluating, read_rows, validation_loss
from tasks.stats.standard_errors import ratio_stderr

VOCABULARY, PAD = 97, 0


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).float()


MODEL = llama()


def brute_force(rows: list[Row]) -> tuple[list[float], list[int]]:
    """Each row alone, unpadded, all logits, token by token."""
    nll, tokens = [], []
    for row in rows:
        with torch.no_grad():
            log_p = MODEL(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(dim=-1)
        targets = [(t, label) for t, label in enumerate(row["labels"]) if t > 0 and label != UNSUPERVISED]
        nll.append(-math.fsum(log_p[t - 1, label].item() for t, label in targets))
        tokens.append(len(targets))
    return nll, tokens


@st.composite
def some_rows(draw: st.DrawFn) -> list[Row]:
    row = st.lists(st.tuples(st.integers(0, VOCABULARY - 1), st.booleans()), min_size=1, max_size=12)
    rows = draw(st.lists(row, min_size=1, max_size=7))
    rows[0] = [(3, False), (PAD, True), *rows[0]]  # at least one target, which is the pad token
    return [
        {"input_ids": [token for token, _ in row], "labels": [token if on else UNSUPERVISED for token, on in row]}
        for row in rows
    ]


@settings(max_examples=25, deadline=None)
@given(rows=some_rows(), logits_at_once=st.sampled_from([1, 2000, 2**28]), upcast_at_once=st.sampled_from([1, 2**26]))
def test_equals_the_brute_force_sum_for_every_batch_size(
    rows: list[Row], logits_at_once: int, upcast_at_once: int
) -> None:
    nll, tokens = brute_force(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOGITS_AT_ONCE", logits_at_once)
        patch.setattr(module, "UPCAST_AT_ONCE", upcast_at_once)
        for batch_size in (1, 3, 8):
            measured = validation_loss(MODEL, rows, batch_size, PAD)
            assert measured.row_nll == pytest.approx(nll, abs=1e-5, rel=1e-5), "up to float32's rounding"
            assert list(measured.row_tokens) == tokens
            assert measured.loss == pytest.approx(sum(nll) / sum(tokens), abs=1e-5, rel=1e-5)
            assert measured.perplexity == pytest.approx(math.exp(sum(nll) / sum(tokens)), rel=1e-4)


def test_logits_of_one_forward_pass_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    handle = MODEL.lm_head.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 40 * VOCABULARY)
    rows: list[Row] = [{"input_ids": [1] * length, "labels": [1] * length} for length in (50, 20, 19, 10, 3)]
    validation_loss(MODEL, rows, 8, PAD)
    handle.remove()
    assert [shape[0] for shape in shapes] == [1, 2, 2]
    assert all(shape.numel() <= 40 * VOCABULARY for shape in shapes[1:])


def test_no_logits_before_the_first_target() -> None:
    shapes: list[torch.Size] = []
    handle = MODEL.lm_head.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    validation_loss(MODEL, [{"input_ids": [1] * 30, "labels": [UNSUPERVISED] * 25 + [1] * 5}], 1, PAD)
    handle.remove()
    assert shapes == [torch.Size([1, 6, VOCABULARY])]


def test_a_peft_model_is_scored_with_its_adapter() -> None:
    rows: list[Row] = [{"input_ids": [1, 2, 3, 4], "labels": [UNSUPERVISED, 2, 3, 4]}]
    without = validation_loss(MODEL, rows, 1, PAD).loss
    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert abs(validation_loss(adapted, rows, 1, PAD).loss - without) > 1e-3


def test_each_module_keeps_its_mode_also_after_an_error() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    with pytest.raises(UserError, match="no token is supervised"):
        validation_loss(model, [{"input_ids": [1, 2], "labels": [UNSUPERVISED] * 2}], 1, PAD)
    assert [m.training for m in model.modules()] == before
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise RuntimeError("stop")
    assert [m.training for m in model.modules()] == before


def test_dropout_is_off() -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False)).train()
    rows: list[Row] = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}]
    assert validation_loss(model, rows, 1, PAD) == validation_loss(model, rows, 1, PAD)


def test_a_diverged_model_is_a_clear_error() -> None:
    model = llama()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(UserError, match="rows: the loss is not a number"):
        validation_loss(model, [{"input_ids": [1, 2], "labels": [1, 2]}], 1, PAD)


def test_rows_come_from_parquet(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [UNSUPERVISED, 2, 3]}, {"input_ids": [4], "labels": [UNSUPERVISED]}]
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("more", pa.int8())])
    pq.write_table(pa.Table.from_pylist([row | {"more": 1} for row in rows], schema=schema), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet") == rows


def test_standard_error_of_a_ratio_covers_the_spread_of_repeated_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 40, (2000, 60), generator=generator).double()
    sums = 1.5 * counts + torch.randn(counts.shape, generator=generator, dtype=torch.float64) * counts.sqrt()
    spread = float((sums.sum(dim=1) / counts.sum(dim=1)).std())
    stated = [ratio_stderr(s.tolist(), c.tolist()) for s, c in zip(sums[:200], counts[:200], strict=True)]
    assert sum(map(float, filter(None, stated))) / len(stated) == pytest.approx(spread, rel=0.05)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_with_counts_of_one_it_is_the_standard_error_of_the_mean(values: list[float]) -> None:
    expected = torch.tensor(values, dtype=torch.float64).std() / math.sqrt(len(values))
    assert ratio_stderr(values, [1] * len(values)) == pytest.approx(float(expected), abs=1e-9)


def test_a_single_row_has_no_standard_error() -> None:
    assert ratio_stderr([1.0], [3]) is None


def test_longest_rows_come_first() -> None:
    lengths: list[int] = []
    handle = MODEL.model.embed_tokens.register_forward_hook(lambda _m, inputs, _o: lengths.append(inputs[0].shape[1]))
    validation_loss(MODEL, [{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 9, 5, 7)], 1, PAD)
    handle.remove()
    assert all(earlier >= later for earlier, later in pairwise(lengths))
    assert len(lengths) == 4


def test_padding_splitting_packing_and_masking_change_no_number() -> None:
    """Each row alone; all in one batch; padded further; in halves, added up; packed end to end."""
    generator = torch.Generator().manual_seed(4)
    lengths = (5, 9, 12, 7)
    rows: list[Row] = []
    for length in lengths:
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [UNSUPERVISED] * 2 + ids[2:]})
    alone = validation_loss(MODEL, rows, 1, PAD)
    together = validation_loss(MODEL, rows, len(rows), PAD)
    further = validation_loss(
        MODEL,
        [{name: [*row[name], *[fill] * 30] for name, fill in (("input_ids", PAD), ("labels", -100))} for row in rows],
        2,
        PAD,
    )
    halves = [validation_loss(MODEL, part, 2, PAD) for part in (rows[:2], rows[2:])]
    packed_ids = torch.tensor([[token for row in rows for token in row["input_ids"]]])
    positions = torch.tensor([[place for length in lengths for place in range(length)]])
    starts = {sum(lengths[:index]) for index in range(len(lengths))}
    with torch.no_grad():
        logits = MODEL(input_ids=packed_ids, position_ids=positions, use_cache=False).logits[0].log_softmax(-1)
    labels = [label for row in rows for label in row["labels"]]
    targets = [(t, label) for t, label in enumerate(labels) if label != UNSUPERVISED and t not in starts]
    packed = -math.fsum(float(logits[t - 1, label]) for t, label in targets) / len(targets)
    for measured in (together, further):
        assert measured.row_nll == pytest.approx(alone.row_nll, abs=1e-5)
        assert measured.row_tokens == alone.row_tokens
        assert measured.loss == pytest.approx(alone.loss, abs=1e-5)
        assert measured.stderr == pytest.approx(alone.stderr, abs=1e-5)
    accumulated = sum(half.loss * half.supervised_tokens for half in halves) / alone.supervised_tokens
    assert accumulated == pytest.approx(alone.loss, abs=1e-5)
    assert packed == pytest.approx(alone.loss, abs=1e-5)
    unmasked = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    assert validation_loss(MODEL, unmasked, 2, PAD).supervised_tokens == sum(length - 1 for length in lengths)
    assert abs(validation_loss(MODEL, unmasked, 2, PAD).loss - alone.loss) > 1e-3, "the prompt is another matter"
