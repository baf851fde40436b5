"""Tiny models and rows for GRIT's tests; a fixture imports what it needs when a test asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from tests.support.adapters import MakeModel


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Of 97 words, so that models, trainings and checkpoints stay small. The tests give token numbers themselves."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"word{number}" for number in range(3, 97))]
    level = WordLevel({word: number for number, word in enumerate(words)}, special["unk_token"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(level), **special)


@pytest.fixture
def make_model() -> MakeModel:
    """Makes a tiny random Llama in float32 with LoRA, B not zero; the same one each time."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**lora: Any) -> PeftModel:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **lora}
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        return model.train()

    return make


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Four rows; the first two are padded on the right, prompts are unsupervised."""
    import torch

    ids = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, 7:] = mask[1, 10:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


@pytest.fixture
def rows() -> Dataset:
    from tests.support.adapters import eight_rows

    return eight_rows()
