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
from transformers import PreTrainedTokenizerFast

from tests.support.distributed import three_steps

TRAININGS = [("kfac", "whitened_gradient", 1), ("graft", "gradient", 2)]
"""Variant, basis, and passes of the model that make a step of two processes."""


@pytest.fixture(scope="module")
def together(word_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of different length, so that each process sees another number of tokens; what two processes made of them."""
    directory = tmp_path_factory.mktemp("distributed")
    ids = [[10 + i, 20 + i, 30 + i, 40 + i, *[50 + i] * (i % 3)] for i in range(12)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]})
    rows.save_to_disk(directory)
    word_tokenizer.save_pretrained(directory / "tokenizer")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # --multi_gpu is what makes Accelerate start torchrun; the trainer's use_cpu makes the processes talk by gloo.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", port, "-m", "tests.support.distributed", str(directory), "2"]
    command += [str(word) for training in TRAININGS for word in training]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    return directory


@pytest.mark.parametrize(("variant", "basis", "passes"), TRAININGS)
def test_two_processes_give_the_result_of_one(together: Path, variant: str, basis: str, passes: int) -> None:
    """Each value to 1e-3 of itself and 1e-4 of the largest, after three steps in float32.

    With one pass of the model a step, and with two that are accumulated. The factors of a first step are the same
    where each process divides by its own count, and so are the processes' weights then.
    """
    alone = three_steps(together, variant, basis, passes=1, processes=1)
    of_two = load_file(together / f"{variant}.together")
    assert float(alone["grit.0.samples"][0]) == float(of_two["grit.0.samples"][0]) > 3 * 4 * 4
    for name, tensor in alone.items():
        scale = float(tensor.float().abs().max())
        torch.testing.assert_close(
            of_two[name], tensor, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    first, second = of_two["replicas"]
    assert bool(first.any()) and torch.equal(first, second)
