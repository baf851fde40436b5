from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch

from benchmarks import grit_overhead, timing
from benchmarks.random_llama import SHAPES, RandomWorkload, random_llama
from benchmarks.workload import adapted


def in_this_process(command: list[str]) -> str:
    """What a benchmark prints when it is called with that command line."""
    printed = StringIO()
    with redirect_stdout(printed):
        grit_overhead.main(command[3:])
    return printed.getvalue()


def test_overhead_is_measured_in_turns_and_by_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "check_output", in_this_process)
    monkeypatch.setattr(timing, "WARM_UP", 1)
    monkeypatch.setattr(grit_overhead, "MORE_STEPS", 2)  # the sixth step is captured
    grit_overhead.main(["--shape", "tiny", "--length", "32", "--pairs", "3", "--quantization", "nf4"])
    printed = capsys.readouterr().out
    assert "in NF4" in printed
    assert "14 LoRA modules" in printed
    assert len(re.findall(r"^(?:AdamW|GRIT) +3 steps: min .* median .* mean", printed, re.MULTILINE)) == 2
    shares = dict(re.findall(r"^(\w.*?) +(\d\.\d{4}) of GRIT's time$", printed, re.MULTILINE))
    assert shares.keys() == {"capture", "update and factorisation", "preconditioning"}
    assert all(0 < float(share) < 1 for share in shares.values())
    assert re.search(r"the pairs' ratios: min .* median .* mean", printed)
    assert re.search(r"peak memory AdamW \d.* GRIT \d.* ratio \d", printed)


def test_overhead_refuses_a_quantization_of_the_packaged_model() -> None:
    with pytest.raises(SystemExit):
        grit_overhead.parse(["--quantization", "nf4"])


def test_the_large_shape_is_llama_3_8b() -> None:
    base = random_llama(SHAPES["llama3-8b"], "none", torch.device("meta"))
    assert sum(weight.numel() for weight in base.parameters()) == 8_030_261_248
    network = adapted(base, 0)
    lora = [weight.numel() for weight in network.parameters() if weight.requires_grad]
    assert (len(lora), sum(lora)) == (2 * 224, 41_943_040)


def test_a_random_model_in_nf4_holds_each_linear_layer_quantised_but_the_output() -> None:
    base = random_llama(SHAPES["tiny"], "nf4", torch.device("cpu"))
    packed = [weight for weight in base.parameters() if weight.dtype == torch.uint8]
    assert len(packed) == 14
    q_proj = base.model.layers[0].self_attn.q_proj
    assert q_proj.weight.quant_state.quant_type == "nf4"
    assert q_proj.weight.quant_state.nested
    assert base.lm_head.weight.dtype == torch.bfloat16


def test_both_copies_begin_alike_and_see_the_same_rows() -> None:
    workload = RandomWorkload("tiny", length=16)
    first, second = (workload.network(seed=0).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = [next(workload.steps(seed=0))[0]["input_ids"] for _ in range(2)]
    assert torch.equal(*rows)


def test_a_step_of_several_passes_with_checkpointing_is_the_same_step() -> None:
    losses = []
    for workload in (
        RandomWorkload("tiny", length=16),
        RandomWorkload("tiny", length=16, micro_batches=2, gradient_checkpointing=True),
    ):
        step = grit_overhead.Trainer(workload, "GRIT")
        losses.append([step(), step()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_turns_change_their_order_and_the_first_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []

    def step(name: str, seconds: Iterator[float]) -> None:
        order.append(name)
        now[0] += next(seconds)

    monkeypatch.setattr(timing, "clock", lambda: now[0])
    durations = {"A": iter([9.0, 9.0, 9.0, 1.0, 2.0]), "B": iter([8.0, 8.0, 8.0, 3.0, 4.0])}
    found = timing.alternate({name: lambda n=name: step(n, durations[n]) for name in "AB"}, pairs=2)
    assert found == {"A": [1.0, 2.0], "B": [3.0, 4.0]}
    assert "".join(order) == "BAABBAABBA"


def test_the_clock_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    timing.timed(lambda: None, "part", {"part": 0.0})()
    assert len(waited) == 2
