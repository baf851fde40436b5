"""The streaming merge against PEFT's own, for the kinds of adapters that PEFT writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tasks.engine.artifacts import Artifact, Store, reference
from tasks.engine.errors import UserError
from tasks.export.adapter_weights import Adapter
from tasks.export.weight_files import merge_files, weight_files
from tasks.merge import merge

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(directory: Path, dtype: torch.dtype, tied: bool = True, shards: bool = False, bias: bool = False) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=bias,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(directory, max_shard_size="10KB" if shards else "5GB")
    return directory


def make_adapter(base: Path, directory: Path, **options: Any) -> Path:
    """An adapter with random weights, as PEFT saves it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    network = get_peft_model(model, LoraConfig(**{"target_modules": LINEAR, "r": 4, "lora_alpha": 6, **options}))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.rand_like(parameter), alpha=1.0 if "lora_" in name else 0.1)
    network.save_pretrained(str(directory))
    return directory


def by_peft(base: Path, adapter: Path, directory: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    merged.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def by_us(base: Path, adapter: Path, directory: Path) -> dict[str, torch.Tensor]:
    directory.mkdir()
    merge_files(base, Adapter(adapter), directory)
    return {name: tensor for file in weight_files(directory) for name, tensor in load_file(file).items()}


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "rank and alpha patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"v_proj": 3, "q_proj": 5},
    },
    "biases": {"bias": "all", "target_modules": ["q_proj", "o_proj"]},
    "biases of the targets": {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
    "output layer": {"target_modules": ["q_proj", "lm_head"]},
    "whole modules": {"modules_to_save": ["lm_head", "norm"], "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS.keys())
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_in_float32_it_is_pefts_merge_bit_for_bit(options: dict[str, Any], shards: bool, tmp_path: Path) -> None:
    tied = "lm_head" not in str(options)
    base = make_base(tmp_path / "base", torch.float32, tied=tied, shards=shards, bias=True)
    assert (len(weight_files(base)) > 3) is shards
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    expected, ours = by_peft(base, adapter, tmp_path / "peft"), by_us(base, adapter, tmp_path / "ours")
    assert ours.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []
    original = {name: tensor for file in weight_files(base) for name, tensor in load_file(file).items()}
    changed = {name for name in ours if not torch.equal(ours[name], original[name])}
    assert changed == Adapter(adapter).targets


def test_transposed_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    for name in ("LoRA", "DoRA"):
        options = ADAPTERS[name] | {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
        adapter = make_adapter(tmp_path / "base", tmp_path / f"adapter {name}", **options)
        expected = by_peft(tmp_path / "base", adapter, tmp_path / f"peft {name}")
        ours = by_us(tmp_path / "base", adapter, tmp_path / f"ours {name}")
        assert all(torch.equal(ours[key], expected[key]) for key in expected)


def kept(merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Share of the change that is in the merged weights: slope of the change made on the change wanted."""
    wanted = {name: exact[name].double() - base[name].double() for name in exact}
    kept_change = sum((wanted[name] * (merged[name].double() - base[name].double())).sum() for name in wanted)
    return float(kept_change / sum(change.square().sum() for change in wanted.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_a_small_change_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(base, tmp_path / "adapter")
    changed(adapter, lora_alpha=torch.finfo(dtype).eps / 2)  # a fifth of a step of the weights, or thereabouts
    wide = tmp_path / "wide"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(wide)
    exact, original = by_peft(wide, adapter, tmp_path / "exact"), load_file(base / "model.safetensors")
    ours, theirs = by_us(base, adapter, tmp_path / "ours"), by_peft(base, adapter, tmp_path / "peft")
    assert kept(ours, original, exact) == pytest.approx(1, abs=0.1)
    assert kept(theirs, original, exact) < 0.5, "to the nearest, as PEFT rounds, it would be lost"
    again = by_us(base, adapter, tmp_path / "again")
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    names = [name for name in ours if "q_proj" in name]
    ups = [ours[name].float() > exact[name] for name in names]
    assert not torch.equal(*ups), "each tensor has chances of its own"


@pytest.mark.parametrize("kind", ["biases", "whole modules"])
def test_in_16_bits_what_was_trained_as_a_whole_is_taken_over(kind: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16, tied=False, bias=True)
    adapter = make_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    trained, ours = load_file(adapter / "adapter_model.safetensors"), by_us(base, adapter, tmp_path / "ours")
    replaced = Adapter(adapter).replaced
    assert len(replaced) > 2
    for name, key in replaced.items():
        assert torch.equal(ours[name], trained[key].bfloat16()), name


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 9), outputs=st.integers(1, 17), inputs=st.integers(1, 17), alpha=st.integers(1, 64))
def test_one_matrix_of_any_shape(
    tmp_path_factory: pytest.TempPathFactory, rank: int, outputs: int, inputs: int, alpha: int
) -> None:
    directory = tmp_path_factory.mktemp("adapter")
    LoraConfig(r=rank, lora_alpha=alpha, target_modules=["x"]).save_pretrained(str(directory))
    a, b, weight = torch.rand(rank, inputs), torch.rand(outputs, rank) + 0.1, torch.rand(outputs, inputs)
    tensors = {"base_model.model.x.lora_A.weight": a, "base_model.model.x.lora_B.weight": b}
    save_file(tensors, directory / "adapter_model.safetensors")
    expected = weight.double() + alpha / rank * b.double() @ a.double()
    torch.testing.assert_close(Adapter(directory).merged("x.weight", weight).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa cannot be merged"),
        ({"lora_bias": True}, "lora_bias cannot be merged"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices cannot be merged"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(options: dict[str, Any], error: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    with pytest.raises(UserError, match=error):
        Adapter(make_adapter(base, tmp_path / "adapter", **options))


def changed(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_rank_that_the_configuration_does_not_tell(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    adapter = make_adapter(base, tmp_path / "adapter", rank_pattern={"q_proj": 2})
    changed(adapter, rank_pattern={})
    with pytest.raises(RuntimeError, match="q_proj has the rank 2"):
        by_us(base, adapter, tmp_path / "ours")


@pytest.fixture
def dataset(tiny_model: Artifact, store: Store) -> Artifact:
    with store.draft("dataset") as draft:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (draft.path / "tokenizer").mkdir(exist_ok=True)
            shutil.copyfile(tiny_model.path / name, draft.path / "tokenizer" / name)
    return draft.done()


def artifact(kind: str, directory: Path) -> Artifact:
    return reference(kind, directory, [path.name for path in directory.iterdir()], {})


def test_shards_and_their_index_are_the_bases(dataset: Artifact, store: Store, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16, shards=True)
    (base / "consolidated.safetensors").write_bytes(b"another copy, which is no file of the model")
    adapter = artifact("adapter", make_adapter(base, tmp_path / "adapter"))
    merged = merge.function(artifact("model", base), dataset, adapter, False, None, store=store)
    names = {path.name for path in base.glob("model*")}
    assert len(names) > 3 and names == {path.name for path in merged.path.glob("*.safetensors*")}
    assert (base / "model.safetensors.index.json").read_bytes() == (
        merged.path / "model.safetensors.index.json"
    ).read_bytes()
    assert merged.facts["changed_tensors"] == 14
    AutoModelForCausalLM.from_pretrained(merged.path)


def test_a_weight_that_rounding_leaves_as_it_was_is_no_success(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 1e-9 for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    (tmp_path / "merged").mkdir()
    with pytest.raises(RuntimeError, match="was not changed by the merge"):
        merge_files(base, Adapter(adapter), tmp_path / "merged")


def test_a_value_beyond_float16_is_refused(dataset: Artifact, store: Store, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.float16)
    adapter = make_adapter(base, tmp_path / "adapter")
    changed(adapter, lora_alpha=10**7)
    with pytest.raises(UserError, match=r"_proj.weight would not be finite as torch.float16.*float16 is too narrow"):
        merge.function(artifact("model", base), dataset, artifact("adapter", adapter), False, None, store=store)
    assert not (store.root / "merged").exists() and not list((store.root / "drafts").iterdir())


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_what_is_tied_is_left_alone(options: dict[str, Any], dataset: Artifact, store: Store, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    adapter = artifact("adapter", make_adapter(base, tmp_path / "adapter", **options))
    with pytest.raises(UserError, match="output layer and embedding are tied"):
        merge.function(artifact("model", base), dataset, adapter, False, None, store=store)
