from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl.trainer.sft_trainer import add_fused_lm_head

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.settings.finetune import GritSettings, LoraSettings, ModelSettings, TrainingSettings
from tasks.train import Training, train
from tasks.training.machine import machine, processor
from tasks.training.network import load_network
from tasks.training.step import supervised_loss

BASE = ModelSettings(name="tiny", dtype="float32", quantization="none")
LORA = LoraSettings(r=4, alpha=8)
QUICK = TrainingSettings(
    max_steps=3, warmup_steps=1, learning_rate=1e-2, gradient_checkpointing=False, per_device_batch_size=4,
    gradient_accumulation_steps=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tokenized_rows: Callable[[int, int], Artifact]) -> Artifact:
    return tokenized_rows(16, 4)


pytestmark = pytest.mark.usefixtures("in_this_process")


def run(model: Artifact, dataset: Artifact, store: Store, **changes: Any) -> Training:
    arguments = {"base": BASE, "lora": LORA, "training": QUICK, "grit": None} | changes
    return train.function(model, dataset, seed=7, store=store, **arguments)


def weights(training: Training) -> dict[str, torch.Tensor]:
    return load_file(training.adapter.path / "adapter_model.safetensors")


def history(training: Training) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (training.history.path / "history.jsonl").read_text().splitlines()]


def test_a_run_leaves_adapter_history_and_events(tiny_model: Artifact, dataset: Artifact, store: Store) -> None:
    training = run(tiny_model, dataset, store)
    assert set(training.adapter.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((training.adapter.path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    assert len(weights(training)) == 2 * 2 * 7
    assert any(name.startswith("tensorboard/events") for name in training.history.files)
    steps = history(training)
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(0 < step["supervised_tokens"] < step["tokens"] <= 4 * 24 for step in steps)
    summary = json.loads((training.history.path / "summary.json").read_text())
    assert summary == training.history.facts
    assert summary["final_loss"] == pytest.approx(steps[-1]["loss"])  # a quarter of three steps is the last
    assert summary["peak_memory_bytes"] > 10 * 2**20
    assert summary["machine"] == machine("CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name())
    assert (summary["per_device_batch_size"], summary["gradient_accumulation_steps"]) == (4, 1)
    assert [step for step, _ in summary["validation"]] == [0, 3]
    assert summary["validation"][1][1] != summary["validation"][0][1]


def test_the_machine_is_told_without_its_name(tmp_path: Path) -> None:
    description = machine("CPU")
    assert description["cores"] >= 1 and description["memory_bytes"] > 2**28 and description["processor"]
    assert (description["device"], description["system"]) == ("CPU", platform.platform())
    assert description.keys() == {"processor", "cores", "memory_bytes", "device", "system"}
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel\t\t: 85\nmodel name\t: Fast CPU @ 2.00GHz \nflags\t: a\n")
    assert processor(tmp_path / "cpuinfo") == "Fast CPU @ 2.00GHz"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert processor(tmp_path / "cpuinfo") == processor(tmp_path / "nowhere") != ""


def test_the_same_run_gives_the_same_bytes(tiny_model: Artifact, dataset: Artifact, store: Store) -> None:
    assert run(tiny_model, dataset, store).adapter.digest == run(tiny_model, dataset, store).adapter.digest


@pytest.mark.parametrize("grit", [None, GritSettings(kfac_update_freq=1, kfac_min_samples=1)])
def test_accumulation_changes_nothing(
    tiny_model: Artifact, dataset: Artifact, store: Store, grit: GritSettings | None
) -> None:
    split = QUICK.model_copy(update={"per_device_batch_size": 1, "gradient_accumulation_steps": 4})
    whole, parts = (
        run(tiny_model, dataset, store, grit=grit),
        run(tiny_model, dataset, store, grit=grit, training=split),
    )
    steps, steps_in_parts = history(whole), history(parts)
    for step, in_parts in zip(steps, steps_in_parts, strict=True):
        assert step["supervised_tokens"] == in_parts["supervised_tokens"]
        for name in ("loss", "grad_norm", "grad_norm_preconditioned"):
            assert step[name] == pytest.approx(in_parts[name], rel=1e-5), name


def test_both_methods_see_the_same_rows_and_start(tiny_model: Artifact, dataset: Artifact, store: Store) -> None:
    baseline = run(tiny_model, dataset, store)
    grit = run(tiny_model, dataset, store, grit=GritSettings(kfac_min_samples=1, basis="initial"))
    steps, grit_steps = history(baseline), history(grit)
    assert [step["tokens"] for step in steps] == [step["tokens"] for step in grit_steps]
    for step in (*steps, *grit_steps):
        assert step["seconds"] > 0 and step["supervised_tokens"] < step["tokens"]
    assert [step["learning_rate"] for step in steps] == pytest.approx([0.0, 0.01, 0.005])
    assert all(step["grad_norm"] == step["grad_norm_preconditioned"] for step in steps)
    assert steps[0]["loss"] == grit_steps[0]["loss"]
    assert steps[0]["grad_norm"] == pytest.approx(grit_steps[0]["grad_norm"], rel=1e-5)
    assert weights(baseline).keys() == weights(grit).keys()
    assert baseline.adapter.digest != grit.adapter.digest, "the preconditioner is on"
    assert all(step["grit"]["in_use"] == 1 and step["grit"]["cosine"] < 0.9999 for step in grit_steps)
    measuring = run(tiny_model, dataset, store, grit=GritSettings(variant="adamw"))
    assert measuring.adapter.digest == baseline.adapter.digest, "measuring changes no bit"
    guided = history(run(tiny_model, dataset, store, grit=GritSettings(variant="adamw", basis="gradient")))
    assert [step["tokens"] for step in steps] == [step["tokens"] for step in guided]
    assert steps[0]["loss"] == guided[0]["loss"], "the first basis leaves the model as it was"
    assert steps[-1]["loss"] != guided[-1]["loss"]


@pytest.mark.parametrize("base", [BASE, ModelSettings(name="tiny", dtype="bfloat16", quantization="nf4")])
def test_checkpointing_changes_nothing(
    tiny_model: Artifact, dataset: Artifact, store: Store, base: ModelSettings
) -> None:
    grit = GritSettings(kfac_min_samples=1)
    checkpointed = QUICK.model_copy(update={"gradient_checkpointing": True})
    plain = run(tiny_model, dataset, store, grit=grit, base=base)
    recomputed = run(tiny_model, dataset, store, grit=grit, base=base, training=checkpointed)
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weight, weights(recomputed)[name])


def test_the_end_of_turn_is_learned_also_where_it_is_the_padding_token(
    tiny_model: Artifact, dataset: Artifact, store: Store
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dataset.path / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    with store.draft("dataset") as draft:
        shutil.copytree(dataset.path, draft.path, dirs_exist_ok=True)
        tokenizer.save_pretrained(draft.path / "tokenizer")
        rows = pq.read_table(draft.path / "train.parquet")["input_ids"].to_pylist()
        ids = [[*row[:-1], tokenizer.eos_token_id] for row in rows]
        labels = [[-100] * (len(row) - 1) + row[-1:] for row in ids]
        pq.write_table(pa.table({"input_ids": ids, "labels": labels}), draft.path / "train.parquet")
        draft.facts = dataset.facts
    whole = QUICK.model_copy(update={"per_device_batch_size": 16, "max_steps": 2})
    first = history(run(tiny_model, draft.done(), store, training=whole))[0]
    assert first["supervised_tokens"] == len(ids) == 16, "one in each row, and no padding"


@pytest.mark.parametrize("grit", [None, GritSettings(kfac_update_freq=1, kfac_min_samples=1)])
def test_packed_rows_do_not_see_each_other(
    tiny_model: Artifact, dataset: Artifact, store: Store, grit: GritSettings | None
) -> None:
    """All sixteen rows in one step: packed or padded, the loss is the same mean over the same tokens."""
    padded = QUICK.model_copy(update={"per_device_batch_size": 16, "max_steps": 2})
    packed = padded.model_copy(update={"batching": "packed"})
    padded_step, packed_step = (
        history(run(tiny_model, dataset, store, training=settings, grit=grit))[0] for settings in (padded, packed)
    )
    assert padded_step["tokens"] == packed_step["tokens"]
    assert padded_step["supervised_tokens"] == packed_step["supervised_tokens"]
    for name in ("loss", "grad_norm", "grad_norm_preconditioned"):
        assert padded_step[name] == pytest.approx(packed_step[name], rel=1e-5), name
    if grit:
        for name in ("cosine", "condition_a", "condition_b"):
            assert padded_step["grit"][name] == pytest.approx(packed_step["grit"][name], rel=1e-5), name


def test_the_loss_is_that_of_trl(tiny_model: Artifact) -> None:
    """And of its gradient, at every LoRA weight."""
    network = load_network(tiny_model, base=BASE, lora=LORA, training=QUICK, max_length=64, seed=1)
    ids = torch.randint(20, 2000, (3, 24), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, :10] = labels[1, :15] = labels[2, 12:] = -100
    mask = torch.ones_like(ids)
    mask[2, 12:] = 0
    supervised = int((labels[:, 1:] != -100).sum())
    loss = supervised_loss(network, {"input_ids": ids, "attention_mask": mask, "labels": labels}, supervised)
    loss.backward()
    ours = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    add_fused_lm_head(network.get_base_model(), outputs=("log_probs",))
    outputs = network(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    fused = -outputs.log_probs.sum() / supervised
    fused.backward()
    theirs = [p.grad for p in network.parameters() if p.grad is not None]
    torch.testing.assert_close(loss, fused)
    assert len(ours) == len(theirs) > 0
    for gradient, fused_gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, fused_gradient, rtol=1e-4, atol=1e-6)


def test_nf4_trains_on_this_machine(tiny_model: Artifact, dataset: Artifact, store: Store) -> None:
    nf4 = ModelSettings(name="tiny", dtype="bfloat16", quantization="nf4")
    training = run(tiny_model, dataset, store, base=nf4, grit=GritSettings(kfac_min_samples=1))
    assert history(training)[-1]["grit"]["in_use"] == 1
    assert all(weight.dtype == torch.float32 for weight in weights(training).values())
    assert any(weight.abs().sum() > 0 for name, weight in weights(training).items() if "lora_B" in name)


def test_validation_leaves_the_gradient_of_nf4_alone(tiny_model: Artifact) -> None:
    nf4 = ModelSettings(name="tiny", dtype="bfloat16", quantization="nf4")
    network = load_network(tiny_model, base=nf4, lora=LORA, training=QUICK, max_length=64, seed=1)
    ids = torch.arange(20, 60).reshape(2, 20)

    def gradients() -> list[torch.Tensor]:
        network.train()
        network(input_ids=ids, labels=ids).loss.backward()
        copies = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        network.zero_grad()
        return copies

    before = gradients()
    network.eval()
    with torch.no_grad():
        network(input_ids=ids)
    for former, now in zip(before, gradients(), strict=True):
        torch.testing.assert_close(former, now)


def test_eight_bit_adamw(tiny_model: Artifact, dataset: Artifact, store: Store) -> None:
    training = run(tiny_model, dataset, store, training=QUICK.model_copy(update={"optimizer": "adamw_8bit"}))
    assert training.adapter.digest != run(tiny_model, dataset, store).adapter.digest


def test_grit_finds_a_basis_and_saves_the_ranks_that_it_leaves(
    tiny_model: Artifact, dataset: Artifact, store: Store
) -> None:
    grit = GritSettings(
        basis="gradient", basis_steps=1, reprojection_freq=5, rank_adaptation_threshold=0.5, cov_update_freq=1,
        kfac_min_samples=1,
    )  # fmt: skip
    training = run(tiny_model, dataset, store, grit=grit, training=QUICK.model_copy(update={"max_steps": 6}))
    assert training.history.facts["basis_seconds"] > 0
    config = json.loads((training.adapter.path / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    mean = history(training)[-1]["grit"]["rank"]
    assert mean < LORA.r
    ranks = [len(tensor) for name, tensor in weights(training).items() if "lora_A" in name]
    assert sum(ranks) / len(ranks) <= LORA.r


UNSLOTH = QUICK.model_copy(update={"backend": "unsloth"})
EIGHT_BITS = QUICK.model_copy(update={"optimizer": "adamw_8bit"})


@pytest.mark.parametrize(
    ("cuda", "changes", "message"),
    [
        (None, {"lora": LoraSettings(target_modules=["q_proj", "c_attn"])}, "no linear layer of tiny is called c_attn"),
        (None, {"training": QUICK.model_copy(update={"learning_rate": 1e30})}, "training diverged at step"),
        (None, {"training": EIGHT_BITS, "grit": GritSettings(variant="graft")}, "GRIT's graft acts on Adam's moments"),
        (
            None,
            {"grit": GritSettings(kfac_min_samples=1, kfac_update_freq=1, kfac_damping=1e9)},
            "grit: after 2 steps the preconditioner is a multiple of the identity",
        ),
        (None, {"training": UNSLOTH, "grit": GritSettings()}, "training.backend: Unsloth's fused kernels bypass the"),
        (False, {"training": UNSLOTH}, "training.backend: Unsloth needs a CUDA GPU"),
        (True, {"training": UNSLOTH}, "training.backend: Unsloth is not installed. Use the environment"),
        (False, {"base": BASE.model_copy(update={"dtype": "float16"})}, "model.dtype: float16 training needs a CUDA"),
    ],
)
def test_what_cannot_work_is_one_clear_line(
    tiny_model: Artifact,
    dataset: Artifact,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    cuda: bool | None,
    changes: dict[str, Any],
    message: str,
) -> None:
    """With `cuda` given, whatever machine this is: the check comes before CUDA would be used."""
    if cuda is not None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr("tasks.training.limits.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        run(tiny_model, dataset, store, **changes)
    assert message in str(caught.value)
    assert not (store.root / "adapter").exists()
    assert not list((store.root / "drafts").glob("*")) if (store.root / "drafts").exists() else True
