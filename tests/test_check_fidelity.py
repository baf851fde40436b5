"""The fidelity gate: a whole export passes, and each classic fault, planted into one, is caught by the check named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tasks.chat.applying import apply_chat_format
from tasks.check_fidelity import check_fidelity
from tasks.convert import Description, convert
from tasks.engine.artifacts import Artifact, Store, reference
from tasks.engine.errors import UserError
from tasks.engine.planning import Plan
from tasks.export.checks import Check
from tasks.export.gguf_types import GGUF_TYPES, FidelityLimits, GgufTypeFacts, ollama_file_type
from tasks.llamacpp.header import gguf_config
from tasks.merge import merge
from tasks.runs.disk import disk_needs
from tasks.settings.export import ExportSettings, FidelitySettings, GgufType
from tasks.settings.finetune import ModelSettings
from tasks.settings.presets import load_settings

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
        ids = [torch.randint(20, 40000, (48,), generator=generator).tolist() for _ in range(10)]
        labels = [[-100] * 8 + row[8:] for row in ids]
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
            settings = ExportSettings().model_copy(update={"gguf_type": gguf_type})
            return convert.function(model, dataset, settings, "apache-2.0", DESCRIPTION, store=module_store)

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

    def check(gguf: Artifact, gguf_type: GgufType = "q8_0", settings: FidelitySettings = LOOSE) -> dict[str, Check]:
        fidelity = check_fidelity.function(
            gguf,
            merged=merged,
            model=tiny_model,
            dataset=dataset,
            settings=settings,
            gguf_type=gguf_type,
            base=HELD,
            store=store,
        )
        checks = {check["key"]: Check(**check) for check in fidelity.facts["checks"]}
        assert fidelity.facts["passed"] == all(check.reading != "failed" for check in checks.values())
        assert json.loads((fidelity.path / "fidelity.json").read_text()) == fidelity.facts
        return checks

    return check


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.reading == "failed"}


@pytest.mark.parametrize("gguf_type", ["q8_0", "bf16", "q6_k"])
def test_a_whole_export_passes(export: Any, checks: Any, gguf_type: GgufType) -> None:
    by_key = checks(export(gguf_type=gguf_type), gguf_type)
    assert not failed(by_key), by_key
    assert set(by_key) == {
        *("quantization", "end_of_turn", "token_ids", "kl", "top1"),
        *("perplexity_ratio", "difference_kept"),
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
    assert "kl" in failed(checks(export(fault)))


def test_an_adapter_that_was_not_merged_is_caught(
    tiny_model: Artifact, merged: Artifact, export: Any, checks: Any
) -> None:
    def base_instead(directory: Path) -> None:
        shutil.copyfile(tiny_model.path / "model.safetensors", directory / "model.safetensors")

    by_key = checks(export(base_instead))
    assert {"difference_kept", "kl"} <= failed(by_key)
    assert abs(float(by_key["difference_kept"].value.split(" ")[0])) < 0.2


def test_half_an_adapter_is_caught_where_other_limits_are_wide(tiny_model: Artifact, export: Any, checks: Any) -> None:
    def half(directory: Path) -> None:
        base = load_file(tiny_model.path / "model.safetensors")
        tensors(directory, lambda held: held.update({name: (held[name] + base[name]) / 2 for name in base}))

    wide = FidelitySettings(rows=8, max_kl=100, min_top1=0.001, max_perplexity_ratio=1e6, warn_perplexity_ratio=1e5)
    assert failed(checks(export(half), settings=wide)) == {"difference_kept"}


def test_a_wrong_tokenizer_is_caught(export: Any, checks: Any) -> None:
    def two_tokens_swapped(directory: Path) -> None:
        held = json.loads((directory / "tokenizer.json").read_text())
        vocabulary = held["model"]["vocab"]
        first, second = "Ġthe", "Ġwe"
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        (directory / "tokenizer.json").write_text(json.dumps(held))

    assert "token_ids" in failed(checks(export(two_tokens_swapped)))


def test_a_doubled_beginning_of_text_is_caught(export: Any, checks: Any, store: Store) -> None:
    """The server adds a token which the prompt already begins with."""
    with store.draft("gguf") as draft:
        shutil.copyfile(export().path / "model.gguf", draft.path / "model.gguf")
        reader = GGUFReader(draft.path / "model.gguf", "r+")
        flag = reader.fields["tokenizer.ggml.add_bos_token"]
        assert not flag.contents()
        flag.parts[flag.data[0]][0] = True
        reader.data.flush()
    assert failed(checks(draft.done())) == {"token_ids"}


def test_another_end_of_turn_is_caught(export: Any, checks: Any) -> None:
    def stops_elsewhere(directory: Path) -> None:
        configured(directory, "tokenizer_config.json", eos_token="<|endoftext|>")  # noqa: S106, no password
        configured(directory, "config.json", eos_token_id=0)
        configured(directory, "generation_config.json", eos_token_id=0)

    assert "end_of_turn" in failed(checks(export(stops_elsewhere)))


def test_another_quantization_than_asked_for_is_caught(export: Any, checks: Any) -> None:
    assert failed(checks(export(gguf_type="bf16"), "q8_0")) == {"quantization"}


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
    general = {key: field.contents() for key, field in reader.fields.items() if key.startswith("general.")}
    assert general["general.name"] == "tiny fine-tuned"
    assert general["general.finetune"] == "LoRA by GRIT"
    assert general["general.base_model.0.name"] == "tiny"
    assert general["general.dataset.0.name"] == "rows.jsonl"
    assert general["general.dataset.0.version"] == dataset.digest[:16]
    assert general["general.license.name"] == "apache-2.0"


def test_a_type_of_which_only_the_table_knows_is_made_checked_and_named(
    export: Any, checks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = FidelityLimits(7.5, 8.5, 0.75, 0.125)
    row = GgufTypeFacts(16, "Q5_K_S", bytes_per_weight=0.7, by_converter=False, limits=bounds)
    monkeypatch.setitem(GGUF_TYPES, "made_up", row)
    gguf = export(gguf_type="made_up")
    assert gguf.facts["type"] == "made_up" and gguf.facts["answer"]["text"]
    assert gguf_config(gguf.path / "model.gguf", ollama_file_type)["file_type"] == "Q5_K_S"
    by_key = checks(gguf, "made_up", FidelitySettings(rows=8))
    assert not failed(by_key), by_key
    assert by_key["quantization"] == Check("quantization", "file type 16", "16 (made_up)", "passed", key="quantization")
    assert by_key["kl"].limit == "≤ 0.75" and "8.5" in by_key["perplexity_ratio"].limit
    assert failed(checks(gguf, "q6_k", FidelitySettings(rows=8))) >= {"quantization"}
    asked = load_settings("demo", {"method": "baseline", "ollama.target": "none"})
    asked = asked.model_copy(update={"export": asked.export.model_copy(update={"gguf_type": "made_up"})})
    model = reference("model", tmp_path, [], {"parameters": 1_000_000_000})
    plan = Plan([("fetch_model", "cached"), ("convert", "to run")], [("fetch_model", model)])
    room = {need.what: need.bytes for need in disk_needs(asked, plan) or ()}
    assert room["GGUF"] == 700_000_000 and room["GGUF in bfloat16, for a while"] == 2_000_000_000
