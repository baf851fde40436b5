"""The methods that `grit_convergence` compares: an adapter, an optimizer and, for GRIT's, a manager."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import (
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.timing import clock
from benchmarks.workload import RANK, TARGETS, Workload, summed_loss
from grit import GRITConfig, GRITManager, set_gradient_basis

DECAY = 0.01


@dataclass(frozen=True)
class Method:
    """How a method differs from LoRA with AdamW."""

    optimizer: str = "adamw"
    """One of `OPTIMIZERS`; all but `adamw` are PEFT's."""
    grit: GRITConfig | None = None
    """GRIT's settings, without the basis."""
    start: str = "default"
    """Where A starts: `default`, GRIT's `gradient` or `whitened_gradient`, or one of PEFT's: `pissa`, `lora_ga`, `eva`,
    `corda`."""
    basis_batches: int = 4
    """Batches that a data-driven start sees."""
    rate_factor: float = 1.0
    """Its learning rates are these of the others, times this."""
    sides: str = "AB"
    """Whose gradients GRIT preconditions: those of A, of B, or of both."""
    changes: str | None = None
    """Of an ablation: the method that it changes."""


METHODS = {
    "AdamW": Method(),
    "LoRA+ (PEFT)": Method("loraplus", rate_factor=0.1),
    "LoRA-FA (PEFT)": Method("lorafa"),
    "Riemannian AdamW (PEFT)": Method("riemannian"),
    "published": Method(grit=GRITConfig(variant="published", power=1.0, norm_match=False)),
    "kfac": Method(grit=GRITConfig(power=1.0)),
    "kfac^1/2": Method(grit=GRITConfig(power=0.5)),
    "eigen_adam": Method(grit=GRITConfig(variant="eigen_adam")),
    "graft": Method(grit=GRITConfig(variant="graft", power=0.5)),
    "AdamW, gradient basis": Method(start="gradient"),
    "AdamW, whitened basis": Method(start="whitened_gradient"),
    "AdamW, PiSSA (PEFT)": Method(start="pissa"),
    "AdamW, LoRA-GA (PEFT)": Method(start="lora_ga"),
    "AdamW, EVA (PEFT)": Method(start="eva"),
    "AdamW, CorDA (PEFT)": Method(start="corda"),
}
for _name in ("kfac^1/2", "eigen_adam", "graft"):
    METHODS[f"{_name}, gradient basis"] = replace(METHODS[_name], start="gradient")
METHODS["kfac^1/2, whitened basis"] = replace(METHODS["kfac^1/2"], start="whitened_gradient")
for _name in ("kfac^1/2, gradient basis", "AdamW, gradient basis", "AdamW, whitened basis"):
    METHODS[f"{_name} of one batch"] = replace(METHODS[_name], basis_batches=1)
_HALF = GRITConfig()
ABLATIONS = {
    f"kfac^1/2, {name}": Method(grit=grit, changes="kfac^1/2")
    for name, grit in {
        "damping 0.003": replace(_HALF, kfac_damping=0.003),
        "damping 0.3": replace(_HALF, kfac_damping=0.3),
        "decay 0.5": replace(_HALF, kfac_ema=0.5),
        "power 1/4": replace(_HALF, power=0.25),
        "updates each step": replace(_HALF, kfac_update_freq=1, cov_update_freq=1),
        "off for 10 steps": replace(_HALF, ng_warmup_steps=10),
        "no norm match": replace(_HALF, norm_match=False),
        "raw length and power 1": replace(_HALF, power=1.0, norm_match=False),
    }.items()
} | {f"kfac^1/2, only {side}": Method(grit=_HALF, sides=side, changes="kfac^1/2") for side in "AB"}
ABLATIONS["kfac^1/2, B's rate 16 times A's"] = Method("loraplus", grit=_HALF, rate_factor=0.1, changes="kfac^1/2")
ABLATIONS |= {
    f"kfac^1/2, gradient basis, {name}": Method(grit=grit, start="gradient", changes="kfac^1/2, gradient basis")
    for name, grit in {
        "updates each step": replace(_HALF, kfac_update_freq=1, cov_update_freq=1),
        "reprojection": replace(_HALF, reprojection_freq=10),
        "rank for 0.99 of the energy": replace(_HALF, reprojection_freq=10, rank_adaptation_threshold=0.99),
        "rank for 0.9 of the energy": replace(_HALF, reprojection_freq=10, rank_adaptation_threshold=0.9),
    }.items()
}
"""One change each to `kfac^1/2`, or to it on the gradient's basis (the ranks: on top of the reprojection)."""


class SidedManager(GRITManager):
    """GRIT on the gradients of A, of B, or of both."""

    def __init__(self, network: PeftModel, config: GRITConfig, sides: str) -> None:
        super().__init__(network, config)
        kept = [f"lora_{side}." for side in "AB" if side not in sides]
        self._kept = [p for name, p in network.named_parameters() if any(part in name for part in kept)]

    def step(self) -> None:
        """Precondition, and put the other side's gradients back."""
        raw = [parameter.grad.clone() for parameter in self._kept if parameter.grad is not None]
        super().step()
        for parameter, gradient in zip(self._kept, raw, strict=True):
            parameter.grad = gradient


@dataclass
class Contender:
    """A method made ready to train."""

    network: PeftModel
    optimizer: Optimizer
    manager: GRITManager | None
    seconds: float
    """What the start cost beyond PEFT's default."""


def make(method: Method, workload: Workload, rate: float, seed: int) -> Contender:
    """Build model, optimizer and manager.

    Args:
        method: which.
        workload: model and rows; the first batches serve the data-driven starts.
        rate: learning rate.
        seed: rules the adapter.
    """
    steps = zip(range(method.basis_batches), workload.steps(seed), strict=False)
    batches = [batch for _, step in steps for batch in step]
    base = workload.base()
    started = clock()
    network = _network(base, method.start, batches, seed)
    if method.start in ("gradient", "whitened_gradient"):
        whitened = method.start == "whitened_gradient"
        set_gradient_basis(network, batches, lambda batch: summed_loss(network, batch), whitened=whitened, seed=seed)
    seconds = clock() - started if method.start != "default" else 0.0
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    optimizer = OPTIMIZERS[method.optimizer](network, rate)
    manager = SidedManager(network, method.grit, method.sides) if method.grit else None
    if manager:
        manager.attach(optimizer)
    return Contender(network, optimizer, manager, seconds)


def _adamw(network: PeftModel, rate: float) -> Optimizer:
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return AdamW(weights, lr=rate, weight_decay=DECAY)


def _loraplus(network: PeftModel, rate: float) -> Optimizer:
    return create_loraplus_optimizer(network, AdamW, lr=rate, loraplus_lr_ratio=16.0, weight_decay=DECAY)


def _lorafa(network: PeftModel, rate: float) -> Optimizer:
    return create_lorafa_optimizer(network, RANK, RANK, lr=rate, weight_decay=DECAY)


def _riemannian(network: PeftModel, rate: float) -> Optimizer:
    return create_riemannian_optimizer(network, AdamW, lr=rate, weight_decay=DECAY)


OPTIMIZERS: dict[str, Callable[[PeftModel, float], Optimizer]] = {
    "adamw": _adamw,
    "loraplus": _loraplus,
    "lorafa": _lorafa,
    "riemannian": _riemannian,
}
"""What makes each optimizer for a network and a learning rate, by the names in `Method`."""


def _network(base: Any, start: str, batches: list[dict[str, Tensor]], seed: int) -> PeftModel:
    """The model with the adapter that PEFT makes; the data-driven starts see the same batches as GRIT's."""
    starts: dict[str, dict[str, Any]] = {
        "default": {},
        "gradient": {},
        "whitened_gradient": {},
        "pissa": {"init_lora_weights": "pissa_niter_4"},
        "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
        "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)},
        "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="ipm")},
    }
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM", **starts[start])
    if start == "lora_ga":
        preprocess_loraga(base, config, lambda: _each(batches, lambda batch: summed_loss(base, batch).backward()))
    elif start == "corda":
        with torch.no_grad():
            preprocess_corda(base, config, lambda: _each(_rows(batches), base))
    network = get_peft_model(base, config)
    if start == "eva":
        initialize_lora_eva_weights(network, batches, show_progress_bar=False)
    return network.train()


def _each(items: Iterable[Any], function: Callable[[Any], Any]) -> None:
    for item in items:
        function(item)


def _rows(batches: list[dict[str, Tensor]]) -> Iterator[Tensor]:
    """Each row alone and without padding, as CorDA wants it: [1, length]."""
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            yield ids[mask.bool()].unsqueeze(0)
