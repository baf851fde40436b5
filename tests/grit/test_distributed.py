"""Two processes give what one gives on the same global batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast


def launch(processes: int, directory: Path, rows_per_pass: int, passes: int, *grit: str) -> dict[str, Tensor]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    output = directory / f"{processes}.safetensors"
    # --multi_gpu is what makes Accelerate start torchrun; the trainer's use_cpu makes the processes talk by gloo.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--multi_gpu"] if processes > 1 else ["--cpu"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", port]
    command += ["-m", "tests.support.distributed", str(directory), str(output), str(rows_per_pass), str(passes), *grit]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr.decode()
    return load_file(output)


@pytest.mark.parametrize(("variant", "basis", "passes"), [("kfac", "whitened_gradient", 1), ("graft", "gradient", 2)])
def test_two_processes_give_the_result_of_one(
    word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, variant: str, basis: str, passes: int
) -> None:
    """Each value to 1e-3 of itself and 1e-4 of the largest, after three steps in float32.

    Rows of different length, so that each process sees another number of tokens. With one pass of the model a step,
    and with two that are accumulated. The factors of a first step are the same where each process divides by its own
    count, and so are the processes' weights then.
    """
    ids = [[10 + i, 20 + i, 30 + i, 40 + i, *[50 + i] * (i % 3)] for i in range(12)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})
    rows.save_to_disk(tmp_path)
    word_tokenizer.save_pretrained(tmp_path / "tokenizer")
    alone = launch(1, tmp_path, 4, 1, variant, basis)
    together = launch(2, tmp_path, 2 // passes, passes, variant, basis)
    assert float(alone["grit.0.samples"][0]) == float(together["grit.0.samples"][0]) > 3 * 4 * 4
    for name, tensor in alone.items():
        scale = float(tensor.float().abs().max())
        torch.testing.assert_close(
            together[name], tensor, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    first, second = together["replicas"]
    assert bool(first.any()) and torch.equal(first, second)
