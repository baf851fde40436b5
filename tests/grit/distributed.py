"""Run by `accelerate launch` from test_distributed: trains a little and saves what the first process holds.

Arguments: directory of the rows, output file, rows per process and step, variant.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from grit import GRITConfig, GRITManager, GritTrainer
from tests.grit.test_trainer import arguments, network


def main() -> None:
    """Train three steps on a fixed order of rows."""
    rows, output, count, variant = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(rows) / "tokenizer")
    model = network(len(tokenizer))
    settings = {"kfac_update_freq": 1, "cov_update_freq": 1, "kfac_min_samples": 1}
    manager = GRITManager(model, GRITConfig(variant=variant, basis="gradient", basis_steps=1, **settings))
    trainer = GritTrainer(
        model=model, grit_manager=manager, train_dataset=Dataset.load_from_disk(rows), processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        args=arguments(output.parent, max_steps=3, per_device_train_batch_size=count),
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.train()
    if trainer.is_world_process_zero():
        tensors = {f"grit.{name}": value for name, value in manager.state_dict().items()}
        tensors |= {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        tensors["grad_norm"] = torch.tensor(manager.last_diagnostics["grad_norm"])
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output)


if __name__ == "__main__":
    main()
