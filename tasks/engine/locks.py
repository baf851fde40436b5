"""Waiting for other runs: one computes what two need, and one at a time uses a GPU."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import httpx
from filelock import FileLock, Timeout
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.runtime import deployment
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_random_exponential

from tasks.engine.artifacts import Store
from tasks.engine.display import announce
from tasks.engine.errors import TemporaryError, UserError, is_temporary
from tasks.engine.gpus import first_gpu
from tasks.engine.logs import run_logger

NAME = "LLAMA3_GRIT_SLOT"
"""Environment variable: what a worker's share of its machine is called, where several train on one at a time."""
SLOT = os.environ.get(NAME, "training")
"""Prefect's global concurrency limit, which holds deployed runs apart, whatever machine and store they have."""

LEASE_SECONDS = 60.0
"""The slot of a run that was killed is free after this time; Prefect allows no less."""

SERVER_MAY_BE_GONE = 600.0
"""Seconds for which a run that needs a slot waits for a server that does not answer."""


@contextmanager
def locked(store: Store, name: str, why: str) -> Iterator[None]:
    """Hold a lock of the store. The system frees it when its holder dies.

    Args:
        store: whose processes keep out of each other's way.
        why: logged where it has to be waited for, after "Waiting for another run, which ".
    """
    lock = FileLock(store.locks / f"{name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        announce(f"Waiting for another run, which {why}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def device(store: Store) -> Iterator[None]:
    """Hold the GPU that this process uses, or its machine: by a lock of the store, for a deployed run by a slot too.

    Raises:
        UserError: the server has no such limit.
        TemporaryError: the server does not answer for ten minutes.
    """
    slot = _slot() if deployment.id else nullcontext()
    with locked(store, f"device-{device_name()}", "trains or scores on this machine"), slot:
        yield


def device_name() -> str:
    """What a training here has to itself: the GPU, by its own name; without one the machine.

    Machines may share a store, and a cluster's workers one environment, so what `LLAMA3_GRIT_SLOT` names counts for
    this host alone.
    """
    host, slot = socket.gethostname(), os.environ.get(NAME)
    name = f"{host}-{slot}" if slot else first_gpu() or f"{host}-cpu"
    return re.sub(r"[^\w.-]", "-", name)


@contextmanager
def _slot() -> Iterator[None]:
    announce(f"Taking a slot of the limit '{SLOT}'; this waits while another run holds it")
    with ExitStack() as held:
        _take(held)
        try:
            yield
        finally:
            _give_back(held)


@retry(
    retry=retry_if_exception_type(TemporaryError),
    wait=wait_random_exponential(multiplier=5, max=60),
    stop=stop_after_delay(SERVER_MAY_BE_GONE),
    before_sleep=lambda attempt: run_logger().warning("%s", attempt.outcome and attempt.outcome.exception()),
    reraise=True,
)
def _take(held: ExitStack) -> None:
    try:
        # A lost lease must not end a training of hours: the store's lock keeps the machine's other runs out.
        slot = concurrency(SLOT, strict=True, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False)
        held.enter_context(slot)
    except ConcurrencySlotAcquisitionError as error:
        if error.__cause__ and is_temporary(error.__cause__):
            raise TemporaryError(f"concurrency limit {SLOT}: the Prefect server does not answer") from error
        fix = f"Create it: prefect gcl create {SLOT} --limit 1 (`llama3-grit serve` does)."
        raise UserError(f"no slot can be taken: {error}", where=f"concurrency limit {SLOT}", fix=fix) from None


def _give_back(held: ExitStack) -> None:
    try:
        held.close()
    except httpx.HTTPError as error:  # the training is done, whatever the server does
        why = "The slot of the limit '%s' cannot be given back and is free in %.0f s at the latest: %s"
        run_logger().warning(why, SLOT, LEASE_SECONDS, error)
