"""Little trainings of test_distributed.py, alone or by `accelerate launch`; saved is what the first process holds.

Arguments: directory of the rows, number of processes, and for each training its variant, basis and passes a step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor, distributed
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast
from trl import SFTConfig

from grit import GRITConfig, GRITManager, GritTrainer
from tests.support.adapters import arguments, network

FACTORS = ("mean_h", "mean_u", "samples")
ROWS_PER_STEP = 4


def main() -> None:
    """Train each of those asked for by all processes."""
    directory, processes = Path(sys.argv[1]), int(sys.argv[2])
    for variant, basis, passes in zip(*(sys.argv[start::3] for start in (3, 4, 5)), strict=True):
        tensors = three_steps(directory, variant, basis, passes=int(passes), processes=processes)
        if distributed.get_rank() == 0:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / f"{variant}.together"
            )
    distributed.barrier()  # or else the first to end aborts the other, which still talks to it
    distributed.destroy_process_group()


def three_steps(directory: Path, variant: str, basis: str, *, passes: int, processes: int) -> dict[str, Tensor]:
    """Train three steps on a fixed order of rows.

    Args:
        directory: of the rows and their tokenizer.
        variant: GRIT's.
        basis: GRIT's.
        passes: how many of the model make a step.
        processes: how many share a step's rows.

    Returns:
        Weights, GRIT's state, its factors after a step by each process's own count of tokens, and with several
        processes the weights of each after three such steps.
    """
    chosen: dict[str, Any] = {"variant": variant, "basis": basis}
    config = GRITConfig(**chosen, basis_steps=1, kfac_update_freq=1, cov_update_freq=1, kfac_min_samples=1)
    rows_per_pass = ROWS_PER_STEP // processes // passes
    sizes = {"per_device_train_batch_size": rows_per_pass, "gradient_accumulation_steps": passes}
    trainer = trained(directory, config, arguments(directory, max_steps=3, **sizes))
    manager = trainer.grit_manager
    tensors = {f"grit.{name}": value for name, value in manager.state_dict().items()}
    tensors |= weights(trainer)
    tensors["grad_norm"] = torch.tensor(manager.last_diagnostics["grad_norm"])
    # Each process divides its loss by its own count of tokens: the factors of the first step are the same all the same.
    own_counts: dict[str, Any] = {"average_tokens_across_devices": False, **sizes}
    first = trained(directory, config, arguments(directory, max_steps=1, **own_counts)).grit_manager
    tensors |= {f"first.{name}": value for name, value in first.state_dict().items() if name.split(".")[-1] in FACTORS}
    if distributed.is_initialized():
        local = trained(directory, config, arguments(directory, max_steps=3, **own_counts))
        own = torch.cat([weight.flatten() for weight in weights(local).values()])
        every = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
        distributed.all_gather(every, own)
        tensors["replicas"] = torch.stack(every)
    return tensors


def trained(directory: Path, config: GRITConfig, settings: SFTConfig) -> GritTrainer:
    """A trainer that has trained on a fixed order of rows."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory / "tokenizer")
    model = network(len(tokenizer))
    trainer = GritTrainer(
        model=model, grit_manager=GRITManager(model, config), args=settings, processing_class=tokenizer,
        train_dataset=Dataset.load_from_disk(directory),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.train()
    return trainer


def weights(trainer: GritTrainer) -> dict[str, Tensor]:
    """The adapter's weights by name, in the model as it was before any wrapper."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


if __name__ == "__main__":
    main()
