from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tasks.training.peak_memory
from benchmarks import convergence_report, grit_convergence, grit_overhead, step_ratios, timing
from benchmarks.contenders import ABLATIONS, METHODS
from benchmarks.random_llama import SHAPES, RandomWorkload, random_llama
from benchmarks.workload import Workload, adapted, default_dtype
from tasks.engine.errors import TrainingError
from tasks.engine.paths import REPOSITORY


def in_this_process(command: list[str]) -> str:
    """What a benchmark prints when it is called with that command line."""
    printed = StringIO()
    with redirect_stdout(printed):
        grit_overhead.main(command[3:])
    return printed.getvalue()


@pytest.mark.parametrize("variant", ["kfac", "eigen_adam"])
def test_overhead_is_measured_in_turns_and_by_parts(
    variant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grit_overhead, "subprocess", SimpleNamespace(check_output=in_this_process))
    monkeypatch.setattr(timing, "WARM_UP", 1)
    monkeypatch.setattr(grit_overhead, "MORE_STEPS", 2)  # the sixth step is captured
    options = ["--shape", "tiny", "--length", "32", "--pairs", "3", "--quantization", "nf4", "--variant", variant]
    grit_overhead.main(options)
    printed = capsys.readouterr().out
    assert "in NF4" in printed
    assert f"{variant}, 14 LoRA modules" in printed
    assert len(re.findall(r"^(?:AdamW|GRIT) +3 steps: min .* median .* mean", printed, re.MULTILINE)) == 2
    shares = dict(re.findall(r"^(\w.*?) +(\d\.\d{4}) of GRIT's time$", printed, re.MULTILINE))
    around = {"around the optimizer's step"} if variant == "eigen_adam" else set()
    assert shares.keys() == {"capture", "update and factorisation", "preconditioning"} | around
    assert all(0 < float(share) < 1 for share in shares.values())
    assert re.search(r"the pairs' ratios: min .* median .* mean", printed)
    (basis,) = re.findall(r"first basis (\d+\.\d+) s, \d+\.\d+ of AdamW's median steps", printed)
    assert float(basis) > 0
    assert re.search(r"peak memory AdamW \d.* GRIT \d.* ratio \d", printed)


@pytest.mark.parametrize("options", ["--quantization nf4", "--gradient-checkpointing", "--shape tiny --dtype float32"])
def test_overhead_refuses_options_that_would_be_ignored(options: str) -> None:
    with pytest.raises(SystemExit):
        grit_overhead.parse(options.split())


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
        step = grit_overhead.Trainer(workload, "GRIT", "kfac")
        losses.append([step(), step()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_turns_change_their_order_and_the_first_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []

    def step(name: str, seconds: Iterator[float]) -> None:
        order.append(name)
        now[0] += next(seconds)

    monkeypatch.setattr(timing, "clock", lambda: now[0])
    durations = {"A": iter([9.0, 9.0, 9.0, 1.0, 2.0]), "B": iter([8.0, 8.0, 8.0, 3.0, 4.0])}
    seconds = timing.alternate({name: lambda n=name: step(n, durations[n]) for name in "AB"}, pairs=2)
    assert seconds == {"A": [1.0, 2.0], "B": [3.0, 4.0]}
    assert "".join(order) == "BAABBAABBA"


def test_the_clock_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    timing.timed(lambda: None, "part", {"part": 0.0})()
    assert len(waited) == 2


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting the garbage of a whole test run takes longer than what is measured here."""
    for module in (grit_convergence, tasks.training.peak_memory):
        monkeypatch.setattr(module, "gc", SimpleNamespace(collect=lambda: None))


@pytest.fixture
def tiny_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks train a tiny model on random rows, in place of the real one."""
    rows = torch.randint(512, (24, 12), generator=torch.Generator().manual_seed(0)).tolist()

    def read(workload: Workload) -> None:
        tokenized: list[Any] = [{"input_ids": row, "labels": [-100] * 4 + row[4:]} for row in rows]
        workload.train, workload.validation = tokenized[:20], tokenized[20:]

    def base(workload: Workload) -> Any:
        torch.manual_seed(0)
        return random_llama(SHAPES["tiny"], "none", torch.device("cpu")).to(getattr(torch, workload.dtype))

    monkeypatch.setattr(Workload, "__post_init__", read)
    monkeypatch.setattr(Workload, "base", base)
    monkeypatch.setattr(timing, "WARM_UP", 1)


@pytest.mark.usefixtures("tiny_workload")
def test_convergence_trains_what_is_missing_and_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, ratios = tmp_path / "new" / "results.jsonl", tmp_path / "ratios.json"
    options = ["--data", "some/rows.json", "--steps", "2", "--processes", "1", "--rates", "0.01", "--seeds", "1"]
    options += ["--results", str(results), "--methods", "AdamW", "kfac^1/2, gradient basis"]
    grit_convergence.main([*options, "--validations", "2"])
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["method"], line["seed"]) for line in lines] == [
        ("AdamW", 0),
        ("kfac^1/2, gradient basis", 0),
        ("AdamW", 1),
        ("kfac^1/2, gradient basis", 1),
    ]
    assert all(line["data"] == "rows.json" and line["validation"].keys() == {"1", "2"} for line in lines)
    assert all({"processor", "threads", "versions"} <= line["machine"].keys() for line in lines)
    assert lines[0]["dtype"] == default_dtype()

    grit_convergence.main([*options, "--validations", "2"])
    assert len(results.read_text().splitlines()) == len(lines)

    step_ratios.main(["--out", str(ratios), "--pairs", "1", "--methods", "AdamW", "kfac^1/2, gradient basis"])
    assert json.loads(ratios.read_text())["ratios"].keys() == {"AdamW", "kfac^1/2, gradient basis"}

    capsys.readouterr()
    picture = tmp_path / "picture.png"
    convergence_report.main([str(results), "--step-ratios", str(ratios), "--picture", str(picture)])
    printed = capsys.readouterr().out
    assert "data rows.json, steps 2" in printed
    assert "time: start + steps × step ratio, in AdamW's steps" in printed
    assert picture.is_file()


@pytest.mark.usefixtures("tiny_workload")
def test_convergence_in_float32_is_a_setup_of_its_own(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    options = ["--steps", "1", "--processes", "1", "--rates", "0.01", "--seeds", "--methods", "AdamW"]
    for dtype in ("bfloat16", "float32"):
        grit_convergence.main([*options, "--results", str(results), "--dtype", dtype])
    half, full = grit_convergence.read(results)
    assert (half["dtype"], full["dtype"]) == ("bfloat16", "float32")
    assert half["losses"] != full["losses"]
    assert half["losses"] == pytest.approx(full["losses"], rel=0.01)


@pytest.mark.usefixtures("tiny_workload")
def test_a_training_that_diverges_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(*_: Any) -> float:
        raise TrainingError("the loss is not a number", where="validation rows", fix="")

    monkeypatch.setattr(Workload, "validate", diverged)
    results = tmp_path / "results.jsonl"
    options = ["--steps", "2", "--processes", "1", "--rates", "0.01", "--seeds", "--methods", "AdamW"]
    grit_convergence.main([*options, "--results", str(results)])
    assert [grit_convergence.final_loss(line) for line in grit_convergence.read(results)] == [math.inf]


def training(
    method: str, seed: int, losses: dict[int, float], seconds: float = 1.0, start: float = 0.0
) -> dict[str, Any]:
    """A made-up line of the results, as written before lines told dtype, validations and machine."""
    setup = {"data": "rows", "steps": 20, "rows_per_step": 4, "max_length": 160, "validation_rows": 24}
    figures = {"validation": losses, "losses": [], "seconds": [0.0, seconds, seconds], "start_seconds": start}
    return {**setup, **figures, "method": method, "rate": 0.01, "seed": seed}


def rows_of(table: str) -> dict[str, dict[str, str]]:
    """Cells by method and head of a table in Markdown."""
    heads, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return {line[0]: dict(zip(heads, line, strict=True)) for line in lines}


def test_lines_without_dtype_and_validations_are_bfloat16_and_three(tmp_path: Path) -> None:
    old = training("AdamW", 0, {10: 2.0, 20: 1.0})
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (old, {**old, "dtype": "float32", "validations": 5})))
    first, second = convergence_report.by_setup(grit_convergence.read(path)).values()
    assert (first[0]["dtype"], first[0]["validations"]) == ("bfloat16", 3)
    assert (second[0]["dtype"], second[0]["validations"]) == ("float32", 5)


def test_the_report_tells_how_many_seeds_got_there() -> None:
    adamw = [training("AdamW", seed, {10: 2.0, 20: 1.0}) for seed in (1, 2, 3)]
    fast = [training("fast", seed, {10: 1.0, 20: 0.9}) for seed in (1, 2)]
    never = [training("never", seed, {10: 1.9, 20: 1.5}) for seed in (1, 2)]
    diverged = [training("diverged", seed, {10: 1.9}) for seed in (1, 2)]
    slow = training("fast", 3, {10: 3.0, 20: 1.1})
    cells = rows_of(convergence_report.seed_table([*adamw, *fast, slow, *never, *diverged]))
    assert cells["fast"]["steps"] == "0.5000 ± 0.0000 (2 of 3)"
    assert cells["fast"]["time: start + steps, each counted as AdamW's"] == "0.5000 ± 0.0000 (2 of 3)"
    assert cells["never"]["steps"] == "0 of 2"
    assert cells["diverged"]["loss at 20"] == "diverged"
    assert cells["AdamW"]["steps"] == "1.0000 ± 0.0000"


def test_time_is_free_of_the_load_that_a_training_ran_under() -> None:
    adamw = training("AdamW", 1, {10: 2.0, 20: 1.0})
    time = "time: start + steps × step ratio, in AdamW's steps"
    for load in (1.0, 7.0):
        # 10 steps of 1.1 of AdamW's each, after a start as long as 4 of AdamW's: 15 of 20.
        other = training("kfac", 1, {10: 1.0, 20: 0.9}, seconds=1.1 * load, start=4 * load)
        cells = rows_of(convergence_report.seed_table([adamw, other], {"AdamW": 1.0, "kfac": 1.1}))
        assert cells["kfac"][time] == "0.7500"
    cells = rows_of(convergence_report.seed_table([adamw, other], {"AdamW": 1.0}))
    assert cells["kfac"][time] == "not measured"


def test_make_bench_adds_to_a_copy_of_the_tracked_results(tmp_path: Path) -> None:
    make = [str(shutil.which("make")), "--silent", "-C", str(REPOSITORY), f"BENCH={tmp_path}"]
    before, copy = (REPOSITORY / "benchmarks/results/alpaca.jsonl").read_bytes(), tmp_path / "alpaca.jsonl"
    subprocess.run([*make, str(copy)], check=True)
    assert copy.read_bytes() == before
    copy.write_bytes(before + b"{}\n")
    subprocess.run([*make, str(copy)], check=True)
    assert copy.read_bytes() == before + b"{}\n"
    planned = subprocess.check_output([*make, "--dry-run", "bench", "ALPACA=rows.json"], text=True)
    assert "--data 'rows.json'" in planned
    assert "--results benchmarks/" not in planned


def test_an_ablation_is_held_against_the_method_that_it_changes() -> None:
    basis = "kfac^1/2, gradient basis"
    unchanged = [training(basis, seed, {20: 1.0}) for seed in (0, 1, 2)]
    others = [training("kfac^1/2", seed, {20: 5.0}) for seed in (0, 1, 2)]
    changed = [{**training(f"{basis}, reprojection", seed, {20: 0.9 - seed / 10}), "rank": 4.0} for seed in (0, 1, 2)]
    alone = [training("kfac^1/2, only A", 1, {20: 4.0})]
    cells = rows_of(convergence_report.ablation_table([*changed, *alone], [*unchanged, *others]))
    own = cells[f"{basis}, reprojection"]
    assert (own["loss, seed 0"], own["less than without it"]) == ("0.9000", "0.1000")
    assert (own["with other seeds"], own["seeds"]) == ("0.2500 ± 0.0500", "2")
    assert own["mean rank"] == "4.0000 ± 0.0000"
    assert (cells["kfac^1/2, only A"]["loss, seed 0"], cells["kfac^1/2, only A"]["with other seeds"]) == ("", "1.0000")


def test_every_ablation_names_the_method_that_it_changes() -> None:
    assert {method.changes for method in ABLATIONS.values()} <= METHODS.keys()
    assert {method.changes for method in METHODS.values()} == {None}
