"""The model as it is trained: base weights, quantised or not, with a fresh LoRA adapter."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from tasks.engine.artifacts import Artifact
from tasks.model.files import check_targets
from tasks.model.nf4 import nf4_config
from tasks.settings.finetune import LoraSettings, ModelSettings, TrainingSettings


def load_network(
    model: Artifact, *, base: ModelSettings, lora: LoraSettings, training: TrainingSettings, max_length: int, seed: int
) -> PeftModel:
    """Load the base model with a fresh adapter, by the chosen backend.

    Args:
        base: dtype and quantisation.
        training: backend and gradient checkpointing.
        max_length: longest row in tokens, which Unsloth wants to know.
        seed: rules the initial adapter.
    """
    if training.backend == "unsloth":
        return load_unsloth(model, base=base, lora=lora, training=training, max_length=max_length, seed=seed)
    return add_adapter(load_base(model, base), base.name, lora, seed)


def load_base(model: Artifact, settings: ModelSettings) -> PreTrainedModel:
    """Load the base model onto the GPU if there is one, in 4-bit NF4 if the settings say so.

    Args:
        settings: dtype and quantisation.
    """
    quantization = nf4_config(settings.dtype, settings.double_quantization)
    network = AutoModelForCausalLM.from_pretrained(
        model.path,
        dtype=getattr(torch, settings.dtype),
        quantization_config=quantization if settings.quantization == "nf4" else None,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        use_safetensors=True,
        trust_remote_code=settings.trust_remote_code,
    )
    for module in network.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 the first evaluation would repack the weights for a kernel without a backward
            # pass, and no gradient would pass this layer from then on.
            module.support_avx512bf16_for_cpu = False
    return network


def add_adapter(base: PreTrainedModel, name: str, lora: LoraSettings, seed: int) -> PeftModel:
    """Put a fresh LoRA adapter on the base model: A by Kaiming, B zero.

    Args:
        base: the base model.
        name: what the adapter's configuration calls its base model.
        lora: rank, scale, dropout and target modules.
        seed: rules the initial A.

    Raises:
        UserError: an entry of `target_modules` matches no linear layer.
    """
    linear = {path.rsplit(".")[-1] for path, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    check_targets(lora, linear, name)
    set_seed(seed)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=name,
    )
    model = get_peft_model(base, config)
    config.base_model_name_or_path = name  # not the directory that it was loaded from
    return model


def load_unsloth(
    model: Artifact, *, base: ModelSettings, lora: LoraSettings, training: TrainingSettings, max_length: int, seed: int
) -> PeftModel:
    """The same through Unsloth's kernels, on a CUDA machine; arguments as for `load_network`."""
    from unsloth import FastLanguageModel  # patches Transformers when imported, so only where it is wanted

    network, _tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(model.path),
        max_seq_length=max_length,
        dtype=getattr(torch, base.dtype),
        load_in_4bit=base.quantization == "nf4",
        trust_remote_code=base.trust_remote_code,
    )
    return FastLanguageModel.get_peft_model(
        network,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        bias="none",
        use_gradient_checkpointing="unsloth" if training.gradient_checkpointing else False,
        random_state=seed,
    )
