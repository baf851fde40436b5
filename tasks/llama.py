"""Loading a GGUF in llama.cpp."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_cpp import Llama


def load_gguf(file: Path, **options: Any) -> Llama:
    """Load a GGUF.

    Args:
        file: the model file.
        options: as `llama_cpp.Llama` takes them.

    Raises:
        ValueError, RuntimeError, AssertionError: llama.cpp cannot load it; what each is said of is not documented.
    """
    from llama_cpp import Llama

    _avoid_amx()
    return Llama(str(file), verbose=False, **options)


@functools.cache
def _avoid_amx() -> None:
    """Keep llama.cpp from Intel's AMX instructions, at which builds by some compilers crash (llama.cpp issue 20824).

    It uses them for weights that it repacks when it loads them, and `Llama` has no parameter that forbids this.
    """
    from llama_cpp import llama_cpp

    if b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info():
        return
    default = llama_cpp.llama_model_default_params

    def without_repacking() -> Any:
        parameters = default()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_model_default_params = without_repacking
