"""A machine dies under a run: worker and flow run are killed, and the flow `recover` has the run repeated.

Later the server dies and comes back, which the run outlives.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.support.serving import Serving


def test_a_run_outlives_its_worker_its_process_and_its_server(
    make_preset: Callable[..., str], workplace: Path, tmp_path: Path, empty_database: Path
) -> None:
    served = Serving(tmp_path, empty_database)
    training = {"max_steps": 8, "warmup_steps": 1, "save_steps": 1}
    try:
        served.make("serve")
        served.prefect("gcl", "update", "training", "--limit", "2")  # a killed run holds its slot for a minute more
        deployment = served.client.get("deployments/name/finetune/grit").json()
        (nightly,) = deployment["schedules"]
        served.prefect("deployment", "schedule", "resume", "finetune/grit", nightly["id"])
        asked = {
            "deployments": {"name": {"any_": ["recover"]}},
            "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        }
        served.wait(lambda: served.client.post("flow_runs/filter", json=asked).json())
        # Prefect makes the schedule's runs; here they would take the only slot of the run that is asked for below.
        (regular,) = served.client.get("deployments/name/recover/recover").json()["schedules"]
        served.prefect("deployment", "schedule", "pause", "recover/recover", regular["id"])
        run = served.start("finetune/grit", preset=make_preset(training=training))
        served.wait(lambda: list(workplace.glob("store/checkpoints/*/checkpoint-*")))
        server, worker = served.process("server"), served.process("worker")
        for process in [worker, *worker.children()]:
            process.kill()
        worker.wait()
        assert served.run(run)["state"]["name"] == "Running", "nobody is left to report it"

        served.make("serve")
        assert served.process("server") == server
        assert served.process("worker") != worker
        (nightly,) = served.client.get("deployments/name/finetune/grit").json()["schedules"]
        assert nightly["active"], "what the user has switched on stays on"
        assert nightly["parameters"] == {"skip_unchanged": True}
        assert served.run(run)["state"]["name"] == "Running", "its last heartbeat is too fresh to call it lost"

        served.prefect("deployment", "run", "recover/recover", "-p", "silent_minutes=0.01", "--watch")
        served.wait(lambda: served.run(run)["state"]["name"] == "Running")
        server.kill()  # the server too goes down under the run, and comes back
        time.sleep(3)
        served.make("serve")
        assert served.process("server") != server
        served.wait(lambda: served.run(run)["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED"))
        states = served.client.get("flow_run_states/", params={"flow_run_id": run}).json()
    finally:
        served.make("down")
    names = [state["name"] for state in states]
    assert names[-1] == "Completed", f"{served.logs()}\n{names}: {states[-1]['message']}"
    assert names.count("Recovered") == 1
    assert "scheduled again, repetition 1 of 3" in served.logs()
