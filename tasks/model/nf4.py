"""NF4 as training uses it (QLoRA, arXiv 2305.14314), and the 16-bit weights that such a training saw."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.quantizers import AutoHfQuantizer

if TYPE_CHECKING:
    from torch import Tensor


def nf4_config(dtype: str, double_quantization: bool) -> BitsAndBytesConfig:
    """NF4 in bitsandbytes' terms.

    Args:
        dtype: of the computation, and of the weights before they are quantised.
        double_quantization: quantise the quantisation constants too.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


class Nf4Weights:
    """The weights that training on NF4 computes with, in place of the 16-bit ones.

    Args:
        config: of the base model.
        trust_remote_code: run the model's own code.
        dtype: as for `nf4_config`.
        double_quantization: as for `nf4_config`.
    """

    def __init__(
        self, config: PretrainedConfig, trust_remote_code: bool, *, dtype: str, double_quantization: bool
    ) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        quantizer = AutoHfQuantizer.from_config(nf4_config(dtype, double_quantization))
        quantizer.preprocess_model(model=model, device_map=None)
        self.names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)}
        """Of the weights that Transformers quantises when it loads the model: not the output layer's."""
        self._dtype, self._double = getattr(torch, dtype), double_quantization

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """Quantise a weight and dequantise it again.

        Args:
            name: one of `names`.
            weight: the 16-bit weight, [out, in].

        Returns:
            Its NF4 values as numbers of the weight's own dtype.

        Raises:
            KeyError: training does not quantise it.
        """
        if name not in self.names:
            raise KeyError(name)
        device = "cuda" if torch.cuda.is_available() else "cpu"  # where training quantises as well
        loaded = weight.to(device, self._dtype).contiguous()
        packed, state = quantize_4bit(loaded, quant_type="nf4", compress_statistics=self._double)
        return dequantize_4bit(packed, state).to("cpu", weight.dtype)
