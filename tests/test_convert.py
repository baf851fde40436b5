"""Merging and conversion with real libraries: PEFT, llama.cpp's converter, llama.cpp."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tasks.chat.applying import apply_chat_format
from tasks.check_vocabulary import check_vocabulary
from tasks.convert import Description, convert
from tasks.engine.artifacts import Artifact, Store, reference
from tasks.engine.errors import UserError
from tasks.export.converter import Converter, find_converter, run_converter
from tasks.fetch_data import fetch_data
from tasks.llamacpp.load import load_gguf
from tasks.merge import merge
from tasks.prepare_dataset import prepare_dataset
from tasks.register import register
from tasks.settings.export import ExportSettings, OllamaSettings
from tasks.settings.finetune import ChatSettings, DataSettings

DESCRIPTION = Description(base_model="me/tiny", data="rows.jsonl", training="LoRA by GRIT, rank 4")
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def module_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def dataset(smollm2_tokenizer: PreTrainedTokenizerFast, module_store: Store) -> Artifact:
    with module_store.draft("dataset") as draft:
        apply_chat_format(smollm2_tokenizer, "chatml").save_pretrained(draft.path / "tokenizer")
        messages = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi"}]
        (draft.path / "test.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        draft.facts = {"end_of_turn": "<|im_end|>"}
    return draft.done()


@pytest.fixture(scope="module")
def adapter(tiny_model: Artifact, module_store: Store) -> Artifact:
    """A LoRA adapter whose B is not zero."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tiny_model.path)
    network = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False))
    with module_store.draft("adapter") as draft:
        network.save_pretrained(str(draft.path))
    return draft.done()


@pytest.fixture(scope="module")
def merged(tiny_model: Artifact, dataset: Artifact, adapter: Artifact, module_store: Store) -> Artifact:
    return merge.function(tiny_model, dataset, adapter, False, None, store=module_store)


def changed_adapter(adapter: Artifact, store: Store, change: object) -> Artifact:
    with store.draft("adapter") as draft:
        shutil.copytree(adapter.path, draft.path, dirs_exist_ok=True)
        tensors = load_file(draft.path / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, draft.path / "adapter_model.safetensors", {"format": "pt"})
    return draft.done()


def test_merged_equals_base_with_adapter(tiny_model: Artifact, adapter: Artifact, merged: Artifact) -> None:
    ids = torch.arange(50, 90).reshape(2, 20)
    base = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(adapter.path))(ids).logits
    logits = AutoModelForCausalLM.from_pretrained(merged.path, dtype=torch.float32)(ids).logits
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max(), "up to the rounding of bfloat16 weights"
    assert merged.facts["changed_tensors"] == 2 * len(TARGETS)


def test_merged_is_complete(merged: Artifact) -> None:
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(merged.files)
    config = json.loads((merged.path / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert "lm_head.weight" not in load_file(merged.path / "model.safetensors")
    assert json.loads((merged.path / "generation_config.json").read_text())["eos_token_id"][0] == 2
    assert "chat_template.jinja" in merged.files


def test_an_untrained_adapter_is_refused(
    tiny_model: Artifact, dataset: Artifact, adapter: Artifact, store: Store
) -> None:
    def untrain(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "layers.1.self_attn.q_proj.lora_B" in name:
                tensors[name].zero_()

    with pytest.raises(RuntimeError, match=r"B is zero.*layers\.1\.self_attn\.q_proj"):
        merge.function(tiny_model, dataset, changed_adapter(adapter, store, untrain), False, None, store=store)


def test_a_diverged_adapter_is_refused(
    tiny_model: Artifact, dataset: Artifact, adapter: Artifact, store: Store
) -> None:
    def diverge(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values())).fill_(float("nan"))

    with pytest.raises(UserError, match="lower training.learning_rate"):
        merge.function(tiny_model, dataset, changed_adapter(adapter, store, diverge), False, None, store=store)
    assert not (store.root / "merged").exists()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.update({"base_model.model.model.norm.magic": torch.ones(2)}), "is no LoRA weight"),
        (lambda t: t.pop(next(name for name in t if "lora_B" in name)), "has only A or only B"),
    ],
)
def test_no_part_of_an_adapter_is_lost(
    tiny_model: Artifact, dataset: Artifact, adapter: Artifact, store: Store, change: object, error: str
) -> None:
    with pytest.raises(RuntimeError, match=error):
        merge.function(tiny_model, dataset, changed_adapter(adapter, store, change), False, None, store=store)


def test_gguf_by_llama_cpps_converter(
    merged: Artifact, dataset: Artifact, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.export.converter.subprocess", subprocess)  # no fork, as users have it
    gguf = convert.function(merged, dataset, ExportSettings(), None, DESCRIPTION, store=store)
    reader = GGUFReader(gguf.path / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.attn_norm.weight"] == "F32"
    template = reader.get_field("tokenizer.chat_template")
    assert template is not None and "<|im_start|>" in template.contents()
    eos = reader.get_field("tokenizer.ggml.eos_token_id")
    assert eos is not None and eos.contents() == 2
    assert gguf.facts["answer"]["prompt"] == "Hello there"
    assert gguf.facts["answer"]["tokens_per_second"] > 0
    monkeypatch.undo()
    assert convert.function(merged, dataset, ExportSettings(), None, DESCRIPTION, store=store).digest == gguf.digest


def test_one_choice_of_chat_format_rules_tokenizer_gguf_and_modelfile(
    tiny_model: Artifact, adapter: Artifact, store: Store, rows_file: Path, tmp_path: Path
) -> None:
    """A base that speaks ChatML is trained on another format, with an end of turn that is not its own."""
    base = Path(shutil.copytree(tiny_model.path, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert "<|im_start|>" in tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    model = reference("model", base, [path.name for path in base.iterdir()], dict(tiny_model.facts))
    data = DataSettings(source=str(rows_file), max_length=64, test_fraction=0.1)
    source = fetch_data.function(data, 1, store=store)
    dataset = prepare_dataset.function(source, model, data, ChatSettings(format="alpaca"), 1, store=store)
    merged = merge.function(model, dataset, adapter, False, None, store=store)
    gguf = convert.function(merged, dataset, ExportSettings(), None, DESCRIPTION, store=store)
    reader = GGUFReader(gguf.path / "model.gguf")
    template, eos = (reader.get_field(f"tokenizer.{name}") for name in ("chat_template", "ggml.eos_token_id"))
    assert template is not None and template.contents() == AutoTokenizer.from_pretrained(merged.path).chat_template
    assert "### Instruction:" in template.contents() and "<|im_start|>" not in template.contents()
    assert eos is not None and eos.contents() == tokenizer.convert_tokens_to_ids("<|endoftext|>") != 2
    registered = register.function(
        gguf,
        dataset=dataset,
        settings=OllamaSettings(target="none"),
        name="tiny",
        license_name="apache-2.0",
        store=store,
    )
    modelfile = (registered.path / "Modelfile").read_text()
    assert 'PARAMETER stop "<|endoftext|>"' in modelfile and 'PARAMETER stop "### Instruction:"' in modelfile
    assert 'PARAMETER stop "<|im_end|>"' in modelfile, "at which the base model's generation ended"
    assert "### Response:" in modelfile and "<|im_" not in modelfile.replace("<|im_end|>", "")


def test_llama_cpp_goes_on_like_transformers(
    merged: Artifact, dataset: Artifact, smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Greedy continuation of the same tokens; the random model's logits are far enough apart for 16 bits."""
    file = tmp_path / "model.gguf"
    run_converter(find_converter(ExportSettings()), merged.path, file, gguf_type="bf16")
    prompt = smollm2_tokenizer("The quick brown fox\n\n  jumps: 12345 😀").input_ids
    model = AutoModelForCausalLM.from_pretrained(merged.path, dtype=torch.float32)
    llama = load_gguf(file, n_ctx=128, logits_all=True)
    assert llama.tokenize("The quick brown fox\n\n  jumps: 12345 😀".encode(), add_bos=False) == prompt
    llama.eval(prompt)
    theirs = torch.tensor(llama.scores[: len(prompt)])
    with torch.no_grad():
        ours = model(torch.tensor([prompt])).logits[0]
    llama.close()
    assert (theirs.argmax(-1) == ours.argmax(-1)).float().mean() > 0.8
    assert torch.nn.functional.cosine_similarity(theirs, ours, dim=-1).min() > 0.99


def test_a_missing_converter_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no convert_hf_to_gguf.py here. Point export.llama_cpp"):
        find_converter(ExportSettings(llama_cpp=tmp_path))
    monkeypatch.setattr("tasks.export.converter.INSTALLED", tmp_path)
    with pytest.raises(UserError, match="Run `make setup`"):
        find_converter(ExportSettings())


def test_a_refusing_converter_is_one_clear_line(merged: Artifact, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(merged.path, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(UserError, match=r"refuses the model: .*NoSuchModel") as caught:
        run_converter(find_converter(ExportSettings()), broken, tmp_path / "x.gguf", gguf_type="q8_0")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.gguf").exists()


def test_the_converters_code_is_part_of_the_cache_key(
    merged: Artifact, dataset: Artifact, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = convert.key(merged, dataset, ExportSettings(), None, DESCRIPTION, store=store)
    other = Converter(Path("x"), Path("y"), "another version")
    monkeypatch.setattr("tasks.export.converter.find_converter", lambda settings: other)
    assert convert.key(merged, dataset, ExportSettings(), None, DESCRIPTION, store=store) != before


def test_the_vocabulary_is_tried_before_anything_is_trained(
    tiny_model: Artifact, dataset: Artifact, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    vocabulary = check_vocabulary.function(tiny_model, dataset, ExportSettings(), store=store)
    assert vocabulary.facts["wrong_texts"] == []
    assert vocabulary.facts["template"]["proven"] and vocabulary.facts["template"]["conversations"] > 10
    assert set(vocabulary.files) == {"vocabulary.gguf"}
    with store.draft("dataset") as draft:
        shutil.copytree(dataset.path, draft.path, dirs_exist_ok=True)
        file = draft.path / "tokenizer" / "tokenizer.json"
        held = json.loads(file.read_text())
        held["pre_tokenizer"] = {"type": "Whitespace"}
        file.write_text(json.dumps(held))
    with pytest.raises(UserError, match="llama.cpp's converter refuses the model: NotImplementedError: BPE pre-token"):
        check_vocabulary.function(tiny_model, draft.done(), ExportSettings(), store=store)
    assert not list((store.root / "drafts").iterdir())


def test_missing_merges_are_found_before_anything_is_trained(
    tiny_model: Artifact, dataset: Artifact, store: Store
) -> None:
    with store.draft("dataset") as draft:
        shutil.copytree(dataset.path, draft.path, dirs_exist_ok=True)
        file = draft.path / "tokenizer" / "tokenizer.json"
        held = json.loads(file.read_text())
        held["model"]["merges"] = []
        file.write_text(json.dumps(held))
    with pytest.raises(UserError, match="llama.cpp's converter refuses the model"):
        check_vocabulary.function(tiny_model, draft.done(), ExportSettings(), store=store)
    assert not list((store.root / "drafts").iterdir())
