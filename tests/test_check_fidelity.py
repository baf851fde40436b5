"""The fidelity gate: a whole export passes, and each classic fault, planted into one, is caught by the check named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tasks.chat.formats import apply_chat_format
from tasks.check_fidelity import check_fidelity
from tasks.convert import Description, convert
from tasks.engine.artifacts import Artifact, Store, reference
from tasks.engine.errors import UserError
from tasks.export.checks import Check
from tasks.export.fidelity_limits import DEFAULTS, judged, limits
from tasks.export.fidelity_measures import compare_row, rows_to_compare, summary
from tasks.merge import merge
from tasks.settings.export import ExportSettings, FidelitySettings, GgufType
from tasks.settings.finetune import ModelSettings

DESCRIPTION = Description(base_model="me/tiny", data="rows.jsonl", training="LoRA by GRIT, rank 4")
HELD = ModelSettings(dtype="float32")
LOOSE = FidelitySettings(rows=8, max_kl=0.05, min_top1=0.8, max_perplexity_ratio=1.05, warn_perplexity_ratio=1.04)
"""A random model of width 64 holds no likeliest token firmly, so Q8_0 does it more harm than a trained one."""


@pytest.fixture(scope="module")
def module_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("fidelity"))


@pytest.fixture(scope="module")
def dataset(smollm2_tokenizer: PreTrainedTokenizerFast, module_store: Store) -> Artifact:
    generator = torch.Generator().manual_seed(1)
    with module_store.draft("dataset") as draft:
        apply_chat_format(smollm2_tokenizer, "chatml").save_pretrained(draft.path / "tokenizer")
        ids = [torch.randint(20, 40000, (120,), generator=generator).tolist() for _ in range(10)]
        labels = [[-100] * 20 + row[20:] for row in ids]
        pq.write_table(pa.table({"input_ids": ids, "labels": labels}), draft.path / "validation.parquet")
        messages = [{"role": "user", "content": "Hello  there\n\n1234"}, {"role": "assistant", "content": "Hi"}]
        (draft.path / "test.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        draft.facts = {"end_of_turn": "<|im_end|>", "max_length": 128}
    return draft.done()


@pytest.fixture(scope="module")
def merged(tiny_model: Artifact, dataset: Artifact, module_store: Store) -> Artifact:
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tiny_model.path)
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    network = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, target_modules=targets, init_lora_weights=False))
    with module_store.draft("adapter") as draft:
        network.save_pretrained(str(draft.path))
    return merge.function(tiny_model, dataset, draft.done(), False, None, store=module_store)


@pytest.fixture(scope="module")
def export(merged: Artifact, dataset: Artifact, module_store: Store) -> Callable[..., Artifact]:
    """Export a model, one that is whole once; `change` spoils a copy of its directory before."""
    whole: dict[str, Artifact] = {}

    def make(change: Callable[[Path], None] | None = None, gguf_type: GgufType = "q8_0") -> Artifact:
        def converted(model: Artifact) -> Artifact:
            asked = ExportSettings(gguf_type=gguf_type)
            return convert.function(model, dataset, asked, "apache-2.0", DESCRIPTION, store=module_store)

        if change is None:
            if gguf_type not in whole:
                whole[gguf_type] = converted(merged)
            return whole[gguf_type]
        with module_store.draft("merged") as draft:
            shutil.copytree(merged.path, draft.path, dirs_exist_ok=True)
            change(draft.path)
        return converted(draft.done())

    return make


@pytest.fixture
def checks(merged: Artifact, tiny_model: Artifact, dataset: Artifact, store: Store) -> Callable[..., dict[str, Check]]:
    """The checks of a GGUF, by name."""

    def check(gguf: Artifact, gguf_type: GgufType = "q8_0") -> dict[str, Check]:
        made = check_fidelity.function(gguf, merged, tiny_model, dataset, LOOSE, gguf_type, HELD, store=store)
        found = {check["name"]: Check(**check) for check in made.facts["checks"]}
        assert made.facts["passed"] == all(check.reading != "failed" for check in found.values())
        assert json.loads((made.path / "fidelity.json").read_text()) == made.facts
        return found

    return check


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.reading == "failed"}


@pytest.mark.parametrize("gguf_type", ["q8_0", "bf16", "q6_k"])
def test_a_whole_export_passes(export: Any, checks: Any, gguf_type: GgufType) -> None:
    found = checks(export(gguf_type=gguf_type), gguf_type)
    assert not failed(found), found
    assert set(found) == {
        *("quantization", "end of turn", "token ids", "mean KL divergence", "likeliest token kept"),
        *("perplexity ratio", "difference to the base kept"),
    }


def tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    held = load_file(file)
    change(held)
    save_file({name: value.contiguous() for name, value in held.items()}, file, {"format": "pt"})


def configured(directory: Path, file: str, **values: Any) -> None:
    held = json.loads((directory / file).read_text())
    held.update(values)
    (directory / file).write_text(json.dumps(held))


def swapped_gate_and_up(directory: Path) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        for name in [name for name in held if "gate_proj" in name]:
            other = name.replace("gate_proj", "up_proj")
            held[name], held[other] = held[other], held[name]

    tensors(directory, change)


def untied_head(directory: Path) -> None:
    """The output layer comes apart from the embedding, as where a converter writes a stale copy of it."""

    def change(held: dict[str, torch.Tensor]) -> None:
        embedding = held["model.embed_tokens.weight"]
        held["lm_head.weight"] = embedding + 0.5 * torch.randn_like(embedding) * embedding.std()

    torch.manual_seed(0)
    tensors(directory, change)
    configured(directory, "config.json", tie_word_embeddings=False)


def wrong_rope_base(directory: Path) -> None:
    held = json.loads((directory / "config.json").read_text())
    rope = held.get("rope_parameters") or {}
    configured(directory, "config.json", rope_theta=50.0, rope_parameters={**rope, "rope_theta": 50.0})


@pytest.mark.parametrize("fault", [swapped_gate_and_up, untied_head, wrong_rope_base])
def test_a_wrong_network_is_caught_by_its_predictions(export: Any, checks: Any, fault: Any) -> None:
    assert "mean KL divergence" in failed(checks(export(fault)))


def test_an_adapter_that_was_not_merged_is_caught(
    tiny_model: Artifact, merged: Artifact, export: Any, checks: Any
) -> None:
    def base_instead(directory: Path) -> None:
        shutil.copyfile(tiny_model.path / "model.safetensors", directory / "model.safetensors")

    found = checks(export(base_instead))
    assert {"difference to the base kept", "mean KL divergence"} <= failed(found)
    assert abs(float(found["difference to the base kept"].value.split(" ")[0])) < 0.2


def test_half_an_adapter_is_caught_where_other_limits_are_wide(
    tiny_model: Artifact, merged: Artifact, dataset: Artifact, export: Any, store: Store
) -> None:
    def half(directory: Path) -> None:
        base = load_file(tiny_model.path / "model.safetensors")
        tensors(directory, lambda held: held.update({name: (held[name] + base[name]) / 2 for name in base}))

    wide = FidelitySettings(rows=8, max_kl=100, min_top1=0.001, max_perplexity_ratio=1e6, warn_perplexity_ratio=1e5)
    made = check_fidelity.function(export(half), merged, tiny_model, dataset, wide, "q8_0", HELD, store=store)
    assert [check["name"] for check in made.facts["checks"] if check["reading"] == "failed"] == [
        "difference to the base kept"
    ]


def test_a_wrong_tokenizer_is_caught(export: Any, checks: Any) -> None:
    def two_tokens_swapped(directory: Path) -> None:
        held = json.loads((directory / "tokenizer.json").read_text())
        vocabulary = held["model"]["vocab"]
        one, other = "Ġthe", "Ġwe"
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        (directory / "tokenizer.json").write_text(json.dumps(held))

    assert "token ids" in failed(checks(export(two_tokens_swapped)))


def test_a_doubled_beginning_of_text_is_caught(export: Any, checks: Any, store: Store) -> None:
    """The server adds a token which the prompt already begins with."""
    with store.draft("gguf") as draft:
        shutil.copyfile(export().path / "model.gguf", draft.path / "model.gguf")
        reader = GGUFReader(draft.path / "model.gguf", "r+")
        flag = reader.fields["tokenizer.ggml.add_bos_token"]
        assert not flag.contents()
        flag.parts[flag.data[0]][0] = True
        reader.data.flush()
    assert failed(checks(draft.done())) == {"token ids"}


def test_another_end_of_turn_is_caught(export: Any, checks: Any) -> None:
    def stops_elsewhere(directory: Path) -> None:
        configured(directory, "tokenizer_config.json", eos_token="<|endoftext|>")  # noqa: S106
        configured(directory, "config.json", eos_token_id=0)
        configured(directory, "generation_config.json", eos_token_id=0)

    assert "end of turn" in failed(checks(export(stops_elsewhere)))


def test_another_quantization_than_asked_for_is_caught(export: Any, checks: Any) -> None:
    assert failed(checks(export(gguf_type="bf16"), "q8_0")) == {"quantization"}


def test_of_a_long_prompt_the_end_is_read(store: Store) -> None:
    """Rows whose answers begin after the longest that is read would else leave nothing to compare."""
    with store.draft("dataset") as draft:
        rows = [
            ([-100] * prompt + list(range(1, 1 + answer))) for prompt, answer in ((5, 3), (15, 9), (16, 4), (90, 2))
        ]
        table = pa.table({"input_ids": [list(range(len(row))) for row in rows], "labels": rows})
        pq.write_table(table, draft.path / "validation.parquet")
    found = rows_to_compare(draft.done(), FidelitySettings(rows=4, max_tokens=16))
    assert [(row.ids[0], len(row.ids), row.targets.tolist()) for row in found] == [
        (0, 8, [1, 2, 3]), (0, 16, [1]), (8, 12, [1, 2, 3, 4]), (82, 10, [1, 2]),
    ]  # fmt: skip
    assert all(
        row.ids[before] + 1 == prompt
        for row, (before, *_), prompt in zip(found, (row.before for row in found), (5, 15, 16, 90), strict=True)
    )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9])
def test_a_truncated_file_is_one_clear_error(export: Any, checks: Any, store: Store, share: float) -> None:
    whole = export()
    with store.draft("gguf") as draft:
        content = (whole.path / "model.gguf").read_bytes()
        (draft.path / "model.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="llama.cpp cannot load the GGUF"):
        checks(draft.done())


def test_overflow_in_float16_is_refused_before_a_gguf_is_made(
    smollm2_tokenizer: PreTrainedTokenizerFast, tiny_model: Artifact, dataset: Artifact, store: Store, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float16)
    base.save_pretrained(tmp_path / "base")
    smollm2_tokenizer.save_pretrained(tmp_path / "base")
    names = [path.name for path in (tmp_path / "base").iterdir()]
    network = get_peft_model(base, LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.fill_(300.0)
    with store.draft("adapter") as draft:
        network.save_pretrained(str(draft.path))
    with pytest.raises(UserError, match="would not be finite as torch.float16"):
        merge.function(
            reference("model", tmp_path / "base", names, {}), dataset, draft.done(), False, None, store=store
        )


def test_the_gguf_says_where_it_comes_from(export: Any, dataset: Artifact) -> None:
    reader = GGUFReader(export().path / "model.gguf")
    said = {key: field.contents() for key, field in reader.fields.items() if key.startswith("general.")}
    assert said["general.name"] == "tiny fine-tuned"
    assert said["general.finetune"] == "LoRA by GRIT"
    assert said["general.base_model.0.name"] == "tiny"
    assert said["general.dataset.0.name"] == "rows.jsonl"
    assert said["general.dataset.0.version"] == dataset.digest[:16]
    assert said["general.license.name"] == "apache-2.0"


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 2**31))
def test_a_rows_measures_are_those_of_torch(length: int, vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    merged, gguf = torch.randn(2, length, vocabulary, generator=generator) * 3
    targets = torch.randint(vocabulary, (length,), generator=generator)
    base = torch.rand(length, generator=generator)
    found = compare_row(merged.numpy(), gguf.numpy(), targets.numpy(), base.double().numpy())
    p, q = (functional.log_softmax(x.double(), -1) for x in (merged, gguf))
    assert math.isclose(found.kl, float(functional.kl_div(q, p, log_target=True, reduction="sum")), abs_tol=1e-6)
    nll = [functional.nll_loss(x, targets, reduction="none") for x in (p, q)]
    assert math.isclose(found.nll_merged, float(nll[0].sum()), abs_tol=1e-6)
    assert math.isclose(found.nll_gguf, float(nll[1].sum()), abs_tol=1e-6)
    likelihood = p.exp().gather(1, gguf.argmax(-1, keepdim=True))[:, 0]
    assert found.kept_top == int((likelihood >= p.exp().max(-1).values / 2).sum())
    assert math.isclose(found.shown, float(((base - nll[0]) * (base - nll[1])).sum()), abs_tol=1e-5)
    assert found.kl >= -1e-9


def test_limits_are_settings_and_a_warning_is_no_failure() -> None:
    own = limits(FidelitySettings(max_kl=0.5), "q8_0")
    assert own == DEFAULTS["q8_0"]._replace(max_kl=0.5)
    logits = np.random.default_rng(0).normal(size=(5, 7))
    row = compare_row(logits, logits, np.arange(5), np.ones(5))
    measured = summary([row, row], [], "7")
    assert measured.kl == 0
    assert measured.difference_kept == pytest.approx(1)
    readings = {check.name: check.reading for check in judged(measured._replace(perplexity_ratio=1.005), own, "q8_0")}
    assert readings.pop("perplexity ratio") == "warned"
    assert set(readings.values()) == {"passed"}


@pytest.mark.parametrize(
    ("tokens", "top1", "ratio", "stderr", "failed"),
    [
        (35, 0.9143, 0.988, 0.020, set()),  # three of 35 tokens: that happens at 97 % too
        (3500, 0.9143, 0.988, 0.002, {"likeliest token kept"}),
        (35, 0.80, 1.0, 0.020, {"likeliest token kept"}),
        (35, 1.0, 1.03, 0.020, set()),
        (3500, 1.0, 1.03, 0.002, {"perplexity ratio"}),
        (35, 1.0, 1.03, None, {"perplexity ratio"}),
    ],
)
def test_few_tokens_fail_only_by_more_than_chance(
    tokens: int, top1: float, ratio: float, stderr: float | None, failed: set[str]
) -> None:
    logits = np.random.default_rng(0).normal(size=(5, 7))
    measured = summary([compare_row(logits, logits, np.arange(5), np.ones(5))] * 2, [], "7")
    measured = measured._replace(tokens=tokens, top1=top1, perplexity_ratio=ratio, perplexity_ratio_stderr=stderr)
    checks = judged(measured, DEFAULTS["q8_0"], "q8_0")
    assert {check.name for check in checks if check.reading == "failed"} == failed
