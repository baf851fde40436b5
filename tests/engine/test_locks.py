"""One at a time on a GPU: by a lock of the store, and for deployed runs by a slot of Prefect's server."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.engine import gpus, locks
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import UserError
from tasks.engine.locks import SLOT, device, device_name
from tasks.engine.stage import stage
from tests.standins.nvml import Gpu, NvmlStandIn

held: list[tuple[float, float]] = []
met: list[int] = []


@stage(alone=True)
def hold(number: int, *, store: Store) -> Artifact:
    """Use the device for a moment."""
    started = time.monotonic()
    time.sleep(0.5)
    with store.draft("number") as draft:
        (draft.path / "number.txt").write_text(str(number))
    held.append((started, time.monotonic()))
    return draft.done()


@flow(validate_parameters=False)
def holding(store: Store, number: int) -> None:
    hold(number, store=store)


def overlap() -> bool:
    first, second = sorted(held)
    return second[0] < first[1]


def test_one_store_one_device(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with device(store):
        other = threading.Thread(target=lambda: device(store).__enter__())
        other.start()
        other.join(0.5)
        assert other.is_alive()
    other.join(20)
    assert not other.is_alive()
    assert "Waiting for another run, which trains or scores on this machine" in caplog.text


@stage(alone=True)
def meet(number: int, seconds: float, *, store: Store) -> Artifact:
    """Wait for another at a barrier for so long at most."""
    with suppress(threading.BrokenBarrierError):
        met.append(barrier.wait(seconds))
    with store.draft("number") as draft:
        (draft.path / "number.txt").write_text(str(number))
    return draft.done()


barrier = threading.Barrier(2)


@flow(validate_parameters=False)
def meeting(store: Store, number: int, seconds: float) -> None:
    meet(number, seconds, store=store)


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("hosts", "seconds", "expected"), [(("one", "two"), 60, [0, 1]), (("one", "one"), 0.5, [])], ids=["two", "one"]
)
def test_only_workers_of_another_host_train_at_the_same_time(
    store: Store, monkeypatch: pytest.MonkeyPatch, hosts: tuple[str, str], seconds: float, expected: list[int]
) -> None:
    """Both with the same slot's name and the same store."""
    host = {f"worker {number}": name for number, name in enumerate(hosts)}
    named = SimpleNamespace(gethostname=lambda: host[threading.current_thread().name])
    monkeypatch.setattr(locks, "socket", named)
    monkeypatch.setenv("LLAMA3_GRIT_SLOT", "gpu0")
    barrier.reset()
    met.clear()
    both = [
        threading.Thread(target=meeting, args=(store, number, seconds), name=name) for number, name in enumerate(host)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(100)
    assert sorted(met) == expected
    assert len(list((store.root / "number").iterdir())) == 2


A, B = (f"GPU-{letter * 8}-4f89-11d3-9a0c-0305e82c3301" for letter in "ab")


@pytest.mark.parametrize(
    ("slot", "visible", "gpus_there", "expected"),
    [
        (None, None, [], "box-cpu"),
        (None, "1", [], "box-cpu"),
        ("half", None, [], "box-half"),
        ("gpu0", "1", [A, B], "box-gpu0"),
        (None, None, [A, B], A),
        (None, "0", [A, B], A),
        (None, "1", [A, B], B),
        (None, B[:9], [A, B], B),
        (None, "1, 0", [A, B], B),
        (None, "", [A, B], "box-cpu"),
        (None, "-1", [A, B], "box-cpu"),
        (None, "MIG-GPU-a/1/0", [A, B], "MIG-GPU-a-1-0"),
    ],
)
def test_what_a_training_has_to_itself(
    monkeypatch: pytest.MonkeyPatch, slot: str | None, visible: str | None, gpus_there: list[str], expected: str
) -> None:
    """Asked anew each time, since Ray sets CUDA_VISIBLE_DEVICES in a worker that runs already."""
    monkeypatch.setattr(gpus, "pynvml", NvmlStandIn([Gpu(uuid) for uuid in gpus_there], driver=bool(gpus_there)))
    monkeypatch.setattr(locks, "socket", SimpleNamespace(gethostname=lambda: "box"))
    for name, value in (("LLAMA3_GRIT_SLOT", slot), ("CUDA_VISIBLE_DEVICES", visible)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert device_name() == expected


@pytest.mark.usefixtures("prefect_server")
def test_deployed_runs_take_a_slot_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "a deployment")
    with pytest.raises(UserError, match=f"concurrency limit {SLOT}: no slot can be taken: .*prefect gcl create"):
        holding(Store(tmp_path / "one"), 1)
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=SLOT, limit=1))
    held.clear()
    both = [threading.Thread(target=holding, args=(Store(tmp_path / name), 1)) for name in ("one", "two")]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(100)
    assert len(held) == 2
    assert not overlap()


@pytest.mark.usefixtures("prefect_server")
def test_what_is_cached_waits_for_nobody(store: Store) -> None:
    holding(store, 1)
    with device(store):
        before = len(held)
        holding(store, 1)
    assert len(held) == before


@pytest.mark.usefixtures("prefect_server")
def test_a_server_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "a deployment")
    waits: list[float] = []
    failures = iter([httpx.ConnectError("nobody is there"), httpx.ReadTimeout("too slow")])
    real = locks.concurrency

    @contextmanager
    def unreliable(*arguments: Any, **options: Any) -> Iterator[None]:
        if failure := next(failures, None):
            raise ConcurrencySlotAcquisitionError("no slot") from failure
        with real(*arguments, **options):
            yield

    monkeypatch.setattr(locks, "concurrency", unreliable)
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=lambda seconds: waits.append(seconds)))
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(SLOT, 1)
    with device(Store(tmp_path)):
        assert next(failures, None) is None
    assert len(waits) == 2


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("failure", [None, UserError("the training failed", where="here", fix="Mend it.")])
def test_a_server_that_is_gone_at_the_end_costs_no_result(
    failure: UserError | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "a deployment")
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(SLOT, 9)
        before = client.read_global_concurrency_limit_by_name(SLOT).active_slots
        with socket.socket() as nobody, pytest.raises(UserError) if failure else nullcontext():
            nobody.bind(("127.0.0.1", 0))
            gone = {PREFECT_API_URL: f"http://127.0.0.1:{nobody.getsockname()[1]}/api"}
            with ExitStack() as later, device(Store(tmp_path)):
                later.enter_context(temporary_settings(gone))
                if failure:
                    raise failure
        assert "cannot be given back" in caplog.text
        assert client.read_global_concurrency_limit_by_name(SLOT).active_slots == before + 1, "until its lease ends"
