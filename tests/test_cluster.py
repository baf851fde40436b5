"""Trainings on the workers of a real Dask and a real Ray cluster, which the flow then finds cached."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flows.compare import compare
from tasks.comparison_settings import CompareSettings

Preset = Callable[..., str]
SHARED: dict[str, Any] = {"training": {"max_steps": 2, "warmup_steps": 1, "learning_rate": 1e-2, "eval_steps": 1}}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def dask_cluster() -> Iterator[str]:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster:
        yield cluster.scheduler_address


def test_workers_train_and_the_flow_finds_it_cached(
    dask_cluster: str,
    make_preset: Preset,
    prefect_server: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def not_here(*_: Any) -> None:
        raise AssertionError("a training in the flow's own process")

    monkeypatch.setattr("tasks.training.train_in_child", not_here)
    wanted = CompareSettings(
        methods=("baseline", "grit"), seeds=2, answers=2, learning_rates=(1e-2, 1e20), cluster=dask_cluster
    )
    report = compare(make_preset(), wanted, SHARED)
    data = json.loads((report.path / "report.json").read_text())
    assert data["methods"] == ["baseline", "grit"]
