"""GRIT in any Transformers trainer, and its state in the trainer's checkpoints."""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from grit.basis import set_gradient_basis
from grit.calls import LossDenominator, base_of
from grit.manager import GRITManager

STATE_FILE = "grit_state.safetensors"
logger = logging.getLogger(__name__)


class GritState(TrainerCallback):
    """Attaches the manager to the optimizer, finds the first basis, and keeps the state in the checkpoints.

    Args:
        manager: the manager of the model's adapters.
    """

    def __init__(self, manager: GRITManager) -> None:
        self.manager = manager
        self.resumed_from: Path | None = None
        """The checkpoint that training goes on from, of which callbacks are not told. Without it, the state is looked
        for in `args.resume_from_checkpoint` and in `output_dir`/checkpoint-STEP, and must be the loaded adapter's."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the optimizer; find the first basis or, in a resumed training, load the state.

        A second training with the same manager goes on from the first, in its basis.

        Raises:
            FileNotFoundError: the checkpoint has no state of GRIT.
            ValueError: what was found is the state of another run.
        """
        self.manager.attach(kwargs["optimizer"])
        if state.global_step:
            self.manager.load_state_dict(load_file(self._state_file(args, state)))
        elif self.manager.config.first_basis != "initial" and not self.manager.steps:
            started = time.perf_counter()
            cuda = [args.device] if args.device.type == "cuda" else []
            # No random number that the training will draw is used up: the rows come in the same order with and without.
            with self.manager.paused(), torch.random.fork_rng(devices=cuda):
                self.find_basis(args, kwargs["model"], kwargs["train_dataloader"])
            self.manager.basis_seconds = time.perf_counter() - started
        self._warn_of_warm_up(state.max_steps - state.global_step)

    def _warn_of_warm_up(self, steps: int) -> None:
        config, done = self.manager.config, self.manager.steps
        coming = range(done, done + steps)
        if not config.variant_row.only_measures and all(step < config.at("ng_warmup_steps", step) for step in coming):
            logger.warning("GRIT stays off: ng_warmup_steps covers all of the %d steps of this training", steps)

    def find_basis(self, args: TrainingArguments, model: Any, loader: Any) -> None:
        """Find the first basis from rows drawn from the data set; of a stream, which is begun anew, the first."""
        size, data = args.per_device_train_batch_size, loader.dataset
        count = self.manager.config.basis_steps * args.gradient_accumulation_steps * size
        if hasattr(data, "__len__"):
            drawn = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed))[:count]
            rows = [data[index] for index in drawn.tolist()]
        else:
            rows = list(islice(data, count))
        batches = [loader.collate_fn(rows[start : start + size]) for start in range(0, len(rows), size)]
        sums = _accepts_loss_kwargs(model)

        def summed_loss(batch: Any) -> Tensor:
            inputs: dict[str, Any] = send_to_device(dict(batch), args.device)
            if sums:
                return _loss_of(model(**inputs, num_items_in_batch=1))
            labels = LossDenominator(model)
            labels.add(inputs)
            count = labels.take()
            return _loss_of(model(**inputs)) * (1 if count is None else count)

        self.set_basis(model, batches, summed_loss, args.seed)

    def set_basis(self, model: Any, batches: list[Any], loss: Callable[[Any], Tensor], seed: int) -> None:
        """Set the basis that the manager's settings ask for."""
        model.train()
        whitened = self.manager.config.first_basis == "whitened_gradient"
        set_gradient_basis(model, batches, loss, whitened=whitened, seed=seed)

    def figures(self) -> dict[str, float]:
        """The last step's `GRITManager.last_diagnostics`, as `grit/NAME`."""
        return {f"grit/{name}": value for name, value in self.manager.last_diagnostics.items()}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the state beside the trainer's."""
        if args.should_save:
            self.save(_checkpoint(args, state))

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint, whole or not at all."""
        tensors = {name: value.cpu().contiguous() for name, value in self.manager.state_dict().items()}
        file = checkpoint / STATE_FILE
        unfinished = file.with_suffix(".tmp")
        save_file(tensors, unfinished, {"adapter": _digest(self.manager)})
        unfinished.replace(file)

    def _state_file(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The state in the checkpoint that training goes on from."""
        guesses = [_checkpoint(args, state)]
        if isinstance(args.resume_from_checkpoint, str):
            guesses.insert(0, Path(args.resume_from_checkpoint))
        files = [directory / STATE_FILE for directory in ([self.resumed_from] if self.resumed_from else guesses)]
        states = [file for file in files if file.is_file()]
        if not states:
            raise FileNotFoundError(f"{files[-1]}: the checkpoint was made without GRIT; start again or resume without")
        if self.resumed_from:
            return states[0]
        for file in states:
            with safe_open(file, "pt") as opened:
                if (opened.metadata() or {}).get("adapter") == _digest(self.manager):
                    return file
        raise ValueError(
            f"{states[-1]} is not the state that belongs to the loaded adapter: set GritCallback.resumed_from to the "
            "checkpoint that train() was given, or use GritTrainer"
        )


class GritCallback(GritState):
    """GRIT in any `transformers.Trainer`: `callbacks=[GritCallback(manager)]`.

    Transformers clips the gradient before a callback can see it. With `norm_match` that makes no difference: the
    preconditioner is linear and keeps the norm. Without it the wrong gradient would be clipped, which is refused.

    A step's figures go, as `grit/NAME`, into `trainer.state.log_history` and to the callbacks that come later. Those of
    `report_to` come earlier; for TensorBoard give `report_to="none"` and `TensorBoardCallback()` after this one.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As in `GritState`.

        Raises:
            ValueError: float16, whose loss scale a callback does not see; more than one process or GPU; FSDP,
                DeepSpeed, torch_compile; clipping without `norm_match`; or accumulated batches of a model that divides
                the loss of each by the labels in it.
        """
        check_setup(args)
        if args.fp16 or args.world_size > 1:
            raise ValueError("GritCallback does not see float16's loss scale nor other processes: use GritTrainer")
        config = self.manager.config
        keeps_norms = config.norm_match or not config.variant_row.changes_gradient or config.variant_row.is_basis
        if not keeps_norms and 0 < args.max_grad_norm < math.inf:
            raise ValueError(
                "without norm_match GritCallback comes after the clipping of a gradient of another length: use "
                "GritTrainer or max_grad_norm=0"
            )
        if args.gradient_accumulation_steps > 1 and not _accepts_loss_kwargs(kwargs["model"]):
            raise ValueError(
                "the model takes no num_items_in_batch, so that the tokens of short batches would weigh more than "
                "others: with GRIT set gradient_accumulation_steps to 1"
            )
        super().on_train_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Precondition the accumulated gradient.

        Raises:
            ValueError: the calls of the model do not say what the loss is divided by.
        """
        self.manager.take_loss_denominator()
        self.manager.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log a step's figures with its loss."""
        if logs and "loss" in logs:
            logs.update(self.figures())
            state.log_history[-1].update(self.figures())


def check_setup(args: TrainingArguments, *, fsdp: bool = False, deepspeed: bool = False) -> None:
    """Refuse what hides hooks, gradients or tokens from the manager.

    Args:
        args: of the trainer.
        fsdp: whether it was switched on elsewhere than in `args`.
        deepspeed: likewise.

    Raises:
        ValueError: naming it.
    """
    refused = {
        "FSDP": fsdp or bool(args.fsdp),
        "DeepSpeed": deepspeed or bool(args.deepspeed),
        "torch_compile": args.torch_compile,
        "DataParallel (several GPUs in one process: start one for each by `accelerate launch`)": args.n_gpu > 1,
    }
    for name, used in refused.items():
        if used:
            raise ValueError(f"GRIT does not handle {name}")


def _loss_of(output: Any) -> Tensor:
    """The loss among what a model returns, where Transformers' trainer looks for it too."""
    loss: Tensor = output["loss"] if isinstance(output, dict) else output[0]
    return loss


def _accepts_loss_kwargs(model: nn.Module) -> bool:
    """Whether Transformers' trainer tells the model what to divide the loss by; as the trainer finds out itself."""
    base = base_of(model)
    parameters = inspect.signature(base.forward).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return bool(getattr(base, "accepts_loss_kwargs", takes_any))


def _digest(manager: GRITManager) -> str:
    """Of the adapter's weights, by which a state is known again."""
    digest = hashlib.sha256()
    for module in manager.modules:
        for weight in module.weights:
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
