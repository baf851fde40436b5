"""A training in a process of its own, which tells its parent each step and can be stopped at any.

Messages are lines of JSON through a pipe: a step's figures, or how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

from filelock import FileLock

from tasks.engine.errors import BUSY, TemporaryError, TrainingError, UserError
from tasks.engine.paths import REPOSITORY
from tasks.training.job import Job

STOP_SECONDS = 300.0
"""How long a stopped training may take to finish its step and write a checkpoint."""


class OutOfMemoryError(Exception):
    """The device's memory does not hold the micro-batch."""


def train_in_child(job: Job, show: Callable[[int, int, dict[str, Any]], None]) -> dict[str, Any]:
    """Train in a child process and return the summary's figures.

    Whatever ends the wait (Ctrl-C, SIGTERM) stops the child after its current step, with a checkpoint.

    Args:
        job: what to train, and where to.
        show: called after each step with its number, the number of steps, and its figures.

    Raises:
        UserError: what the training found wrong.
        OutOfMemoryError: a smaller micro-batch may fit; what was trained until then is in the newest checkpoint.
        TemporaryError: the process was killed or stopped, or the GPU is busy; another attempt goes on from the newest
            checkpoint.
        RuntimeError: the training failed otherwise; its traceback is on the standard error output.
    """
    end: dict[str, Any] = {}
    incoming, outgoing = os.pipe()
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tasks.training.process", str(outgoing)],
        stdin=subprocess.PIPE,
        pass_fds=(outgoing,),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        text=True,
    )
    os.close(outgoing)
    with os.fdopen(incoming, encoding="utf-8") as messages:
        try:
            _send(process, job)
            for line in messages:
                message = json.loads(line)
                if "step" in message:
                    show(message["step"], message["steps"], message["figures"])
                else:
                    end = message
            status = process.wait()
        except BaseException:
            _stop(process)
            raise
    return facts_of(end, status)


def _send(process: subprocess.Popen[str], job: Job) -> None:
    assert process.stdin is not None  # noqa: S101, for the type checker
    with process.stdin as pipe:
        pipe.write(job.model_dump_json())


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def facts_of(end: dict[str, Any], status: int) -> dict[str, Any]:
    """The summary's figures, from how a training's process ended.

    Args:
        end: its last message; empty if there was none.
        status: its exit status.

    Raises:
        TrainingError: what the training found wrong.
        OutOfMemoryError: a smaller micro-batch may fit.
        TemporaryError: the process was killed or stopped, or the GPU is busy.
        RuntimeError: the training failed otherwise.
    """
    if end.get("facts"):
        facts: dict[str, Any] = end["facts"]
        return facts
    if "user_error" in end:
        raise TrainingError(end["user_error"]["what"], where=end["user_error"]["where"], fix=end["user_error"]["fix"])
    if "out_of_memory" in end:
        raise OutOfMemoryError(end["out_of_memory"])
    if BUSY in end.get("error", ""):
        raise TemporaryError(f"the GPU is busy: {end['error']}")
    if "stopped" in end:
        raise TemporaryError(f"the training was stopped after step {end['stopped']}; it can go on from there")
    if status < 0:
        name = signal.Signals(-status).name
        memory = ", perhaps by the system for want of memory" if name == "SIGKILL" else ""
        raise TemporaryError(f"the training process was ended by {name}{memory}; it can go on from its last checkpoint")
    raise RuntimeError(f"the training failed: {end.get('error', f'exit status {status}')}")


def main() -> None:
    """The child: read the job, train, tell how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then sends SIGTERM
    with os.fdopen(int(sys.argv[1]), "w", buffering=1, encoding="utf-8") as channel:

        def send(**message: Any) -> None:
            channel.write(json.dumps(message) + "\n")

        # Nothing that a user could act on: names that both of transformers' versions here know, and ours for the base.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name|Could not find a config file")
        try:
            _train(sys.stdin.read(), send)
        except UserError as error:
            send(user_error={"what": error.what, "where": error.where, "fix": error.fix})
        except Exception as error:
            from accelerate.utils.memory import should_reduce_batch_size

            message = f"{type(error).__name__}: {error}"
            if not should_reduce_batch_size(error):
                send(error=message)
                raise
            send(out_of_memory=message)


def _train(text: str, send: Callable[..., None]) -> None:
    if json.loads(text)["training"]["backend"] == "unsloth":
        os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"  # it would tell its maker what machine this is
        import unsloth  # noqa: F401 - patches torch, Transformers and TRL, so it must come before them
    from tasks.training.run import Training

    last = 0

    def report(step: int, steps: int, figures: dict[str, Any]) -> None:
        nonlocal last
        last = step
        try:
            send(step=step, steps=steps, figures=figures)
        except BrokenPipeError:  # the parent is dead
            training.checkpoints.stop = True

    def stop(*_: Any) -> None:
        training.checkpoints.stop = True

    job = Job.model_validate_json(text)
    # The training of a parent that was killed may still be at its last step and write there.
    with FileLock(job.checkpoints.with_suffix(".lock")):
        training = Training(job, report)
        signal.signal(signal.SIGTERM, stop)
        facts = training.run()
    if facts is None:
        send(stopped=last)
    else:
        send(facts=facts)


if __name__ == "__main__":
    main()
