"""Imported by the process that is forked: what takes seconds to import, and is the same for all forks."""

from __future__ import annotations

import gc

import llama_cpp  # noqa: F401
import torch  # noqa: F401
import trl.trainer.sft_trainer  # noqa: F401, with peft, datasets and accelerate

gc.collect()
gc.freeze()  # a fork that goes through what was imported would also copy its pages
