"""Branches of a flow on the workers of a real Dask and a real Ray cluster, which the flow then finds cached."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from flows.compare import compare
from flows.support.cluster import Branch, run_on_cluster
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.engine.paths import REPOSITORY
from tasks.settings.comparison import CompareSettings
from tests.support.cluster_branches import met, numbered, take_slot

SHARED: dict[str, Any] = {"training": {"max_steps": 2, "warmup_steps": 1, "learning_rate": 1e-2, "eval_steps": 1}}


@pytest.fixture(scope="module")
def dask_cluster() -> Iterator[str]:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster:
        yield cluster.scheduler_address


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(2)]
        for reserved in sockets:
            reserved.bind(("127.0.0.1", 0))
        port, client_port = (reserved.getsockname()[1] for reserved in sockets)
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--ray-client-server-port={client_port}"]
    command += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=100000000"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "300"}
    # Without it Ray's client server dies now and then as it is forked: https://github.com/ray-project/ray/issues/63202
    environment["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    with subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL) as head:
        for _ in range(120):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", client_port)) == 0:
                    break
            time.sleep(0.5)
        yield f"ray://127.0.0.1:{client_port}"
        head.terminate()


@pytest.fixture(params=["dask", "ray"])
def address(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_cluster"))


@flow(validate_parameters=False)
def running(address: str, numbers: list[int], store: Store, inputs: list[Artifact]) -> tuple[Any, list[Artifact]]:
    branches = {number: Branch(f"number {number}", numbered, (number, store)) for number in numbers}
    failures = run_on_cluster(address, branches, inputs, store)
    return failures, [branches[n].run() for n in numbers if n != 13]


@pytest.mark.usefixtures("prefect_server")
def test_workers_run_what_is_not_cached_and_the_flow_finds_it(
    address: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    failures, artifacts = running(address, [1, 2, 13, 99], store, [])
    assert {number: str(error) for number, error in failures.items()} == {13: "13: it diverged. Take another."}
    assert [artifact.facts["number"] for artifact in artifacts] == [1, 2, 99]
    assert os.getpid() not in [artifact.facts["process"] for artifact in artifacts]
    assert "number 99 failed on the cluster and runs here: RuntimeError('out of luck')" in caplog.text
    caplog.clear()
    assert running(address, [1, 2], store, []) == ({}, artifacts[:2])
    assert "go to the cluster" not in caplog.text


@flow(validate_parameters=False)
def meeting(address: str, seconds: float, store: Store) -> list[Artifact]:
    branches = {number: Branch(f"number {number}", met, (number, seconds, store)) for number in (1, 2)}
    assert not run_on_cluster(address, branches, [], store)
    return [branch.run() for branch in branches.values()]


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(("slots", "seconds"), [(("gpu0", "gpu1"), 60), (("gpu0", "gpu0"), 1)])
def test_workers_with_a_slot_each_train_at_the_same_time(
    dask_cluster: str, store: Store, slots: tuple[str, str], seconds: float
) -> None:
    from distributed import Client

    with Client(dask_cluster) as client:
        for worker, slot in zip(client.scheduler_info()["workers"], slots, strict=True):
            client.run(take_slot, slot, workers=[worker])
    artifacts = meeting(dask_cluster, seconds, store)
    assert len({os.getpid(), *(artifact.facts["process"] for artifact in artifacts)}) == 3
    assert all(artifact.facts["met"] for artifact in artifacts) == (slots[0] != slots[1])


@pytest.mark.usefixtures("prefect_server")
def test_a_worker_without_the_inputs_leaves_the_branch_to_the_flow(
    dask_cluster: str, store: Store, tiny_model: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    away = tiny_model.model_copy(update={"path": store.root / "nowhere"})
    failures, artifacts = running(dask_cluster, [1], store, [away])
    assert "is not on this worker: without a shared disk, set store_uri" in caplog.text
    assert not failures and artifacts[0].facts["process"] == os.getpid()


@pytest.mark.usefixtures("prefect_server")
def test_no_cluster_or_no_task_runner_for_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setitem(__import__("dask").config.config["distributed"]["comm"]["timeouts"], "connect", "1s")
    with pytest.raises(UserError, match=f"cluster: no cluster answers at {nobody}: .*Start a scheduler there"):
        running(nobody, [1], store, [])
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(UserError, match=r"cluster: Prefect's task runner prefect-ray is not installed\. Install it"):
        running("ray://127.0.0.1:1", [1], store, [])


def test_a_comparison_trains_on_the_workers(
    dask_cluster: str, make_preset: Callable[..., str], prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_here(*_: Any) -> None:
        raise AssertionError("a training in the flow's own process")

    monkeypatch.setattr("tasks.train.train_in_child", not_here)
    wanted = CompareSettings(methods=("grit",), seeds=2, answers=1, learning_rates=(1e-2, 1e20), cluster=dask_cluster)
    report = compare(make_preset(), wanted, SHARED)
    data = json.loads((report.path / "report.json").read_text())
    assert [run["method"] for run in data["runs"]] == ["grit", "grit"]
    assert [trial["failure"] is None for trial in data["trials"]] == [True, False]
