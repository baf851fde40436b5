"""The deployments, as `make serve` sets them up: a local server, a process worker, a run; and `make down`."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.standins.hub import Hub, answers_by_http
from tests.support.serving import Serving


@pytest.fixture
def large_gated_model(workplace: Path) -> Iterator[str]:
    """The address of a Hub whose models all have 8 billion parameters and terms to accept."""
    models = Hub("models", workplace)
    models.gated, models.counted = "manual", 8_030_261_248
    with answers_by_http(models, Hub("datasets", workplace)) as endpoint:
        yield endpoint
    assert not [path for path in models.asked if "/resolve/" in path], "nothing is fetched"


def test_deployments_run_on_two_workers_that_share_a_store_and_stop_with_make_down(
    make_preset: Callable[..., str], workplace: Path, tmp_path: Path, empty_database: Path, large_gated_model: str
) -> None:
    served = Serving(tmp_path, empty_database)
    hub = {"HF_ENDPOINT": large_gated_model, "HF_HUB_OFFLINE": "0", "CUDA_VISIBLE_DEVICES": ""}
    served.environment |= {"HOME": str(tmp_path / "one"), **hub}
    try:
        printed = served.make("serve")
        assert f"PREFECT_API_URL={served.api}" in printed
        assert "prefect deployment run finetune/demo --watch" in printed
        for impossible in ({"training": {"max_steps": 0}}, {"training": {"max_step": 5}}, {"lora": 3}):
            with pytest.raises(httpx.HTTPStatusError, match="409 Conflict|422 Unprocessable"):
                served.start("finetune/grit", preset=make_preset(), overrides=impossible)
        here = json.dumps({"store": "~/store", "store_uri": f"file://{workplace}/shared"})
        command = ["deployment", "run", "finetune/grit", "-p", f"preset={make_preset()}", "-p", f"overrides={here}"]
        served.prefect(*command, "--watch")
        assert len(served.computed()) == 13
        served.move_worker(tmp_path / "another")
        served.prefect(*command, "--watch")
        assert served.computed() == []
        for machine in ("one", "another"):
            assert len(list((tmp_path / machine / "store/gguf").glob("*/model.gguf"))) == 1
        small = json.dumps({"methods": ["grit"], "seeds": 1, "answers": 1})
        compared = [*command[:2], "compare/demo", *command[3:], "-p", f"comparison={small}", "--watch"]
        served.prefect(*compared)
        assert {"train", "write_comparison"} <= set(served.computed("compare"))
        assert len(list((tmp_path / "another/store/comparison").glob("*/report.html"))) == 1
        with pytest.raises(httpx.HTTPStatusError, match="409 Conflict|422 Unprocessable"):
            served.start("compare/demo", preset=make_preset(), comparison={"methods": ["grit", "magic"]})
        runs = served.client.post("flow_runs/filter", json={"flows": {"name": {"any_": ["finetune"]}}}).json()
        assert [run["state"]["type"] for run in runs] == ["COMPLETED", "COMPLETED"], "the impossible ones never began"
        manifest = workplace / "ollama/manifests/registry.ollama.ai/library/tiny-grit/latest"
        assert json.loads(manifest.read_text())["layers"]

        run = served.start("finetune/grit")
        served.wait(lambda: served.run(run)["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED"))
        state = served.run(run)["state"]
        one_line = (
            "meta-llama/Meta-Llama-3-8B: 8.0 billion parameters take days without a GPU, and this machine has none."
        )
        assert state["type"] == "FAILED" and one_line in state["message"], state
        assert served.computed() == [], "it ends before any stage"

        (nightly,) = served.client.get("deployments/name/finetune/grit").json()["schedules"]
        assert not nightly["active"]
        slot = served.client.get("v2/concurrency_limits/training").json()
        assert (slot["limit"], slot["active_slots"]) == (1, 0)

        store = tmp_path / "another/store"
        training = {"max_steps": 1_000_000, "warmup_steps": 1}
        endless = served.start("finetune/grit", preset=make_preset(store=str(store), training=training))
        served.wait(lambda: any(path.stat().st_size for path in store.glob("drafts/history-*/history.jsonl")))
        processes = [served.process(name) for name in ("server", "worker")]
        processes += processes[1].children(recursive=True)
        assert len(processes) >= 4, "server, worker, flow run, training; and `recover`, if it is just its time"
    finally:
        printed = served.make("down")
    assert re.search(r"Stopping \d runs?; a training .*\nStopped the worker\.\nStopped the server\.", printed), printed
    assert not list(tmp_path.glob("*.pid"))
    assert not psutil.wait_procs(processes, timeout=20)[1]
    assert len(list(store.glob("checkpoints/*/checkpoint-*"))) == 1
    with sqlite3.connect(tmp_path / "prefect.db") as database:
        ((state,),) = database.execute("SELECT state_name FROM flow_run WHERE id = ?", (endless,)).fetchall()
    assert state == "Crashed"
