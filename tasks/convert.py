"""Stage: the merged model becomes one GGUF file, by llama.cpp's own converter, and answers one prompt."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tasks.chat.rendering import render
from tasks.chat.thinking import end_of_thinking, without_thinking
from tasks.engine.artifacts import Artifact, Store
from tasks.engine.errors import TrainingError
from tasks.engine.stage import stage
from tasks.export.converter import check_ended, converter_version, find_converter, run_converter
from tasks.export.gguf_types import GGUF_TYPES, INTERMEDIATE
from tasks.export.quantization import quantize
from tasks.llamacpp.load import check_loads, load_gguf
from tasks.settings.export import ExportSettings

FALLBACK_PROMPT = "What is the capital of France?"
ANSWER_TOKENS = 96
CONTEXT = 2048


class Description(BaseModel):
    """What the GGUF says of itself."""

    base_model: str
    """As the settings name it; of a local path only the last part is written down."""
    data: str
    """Where the instruction data comes from; of a local path only the last part."""
    training: str
    """Method and size of the training, for people to read."""


@stage(
    libraries=("llama-cpp-python", "transformers"),
    watch=converter_version,
    reads={"settings": ("gguf_type", "llama_cpp")},
)
def convert(
    merged: Artifact,
    dataset: Artifact,
    settings: ExportSettings,
    license_name: str | None,
    description: Description,
    *,
    store: Store,
) -> Artifact:
    """Convert, for K-quants by way of a file in bfloat16, then load the result in llama.cpp and let it answer.

    Args:
        dataset: for a prompt that the model was not trained on.
        settings: type of the large tensors, and which converter.
        license_name: the base model's, if known.
        description: written into the file.
        store: where the artifact goes.

    Returns:
        The artifact `gguf`: `model.gguf`; its facts hold type, size, converter and the answer.

    Raises:
        UserError: no converter, it refuses the model, or llama.cpp cannot load the GGUF.
        TrainingError: the GGUF gives no answer.
    """
    converter = find_converter(settings)
    with store.draft("gguf") as draft:
        file = draft.path / "model.gguf"
        log = store.root / "logs" / f"convert-{merged.digest[:16]}.log"
        origin = metadata(description, dataset, license_name)
        if GGUF_TYPES[settings.gguf_type].by_converter:
            run_converter(converter, merged.path, file, gguf_type=settings.gguf_type, metadata=origin, log=log)
        else:
            with tempfile.TemporaryDirectory(dir=draft.path) as directory:
                whole = Path(directory) / f"{INTERMEDIATE}.gguf"
                run_converter(converter, merged.path, whole, gguf_type=INTERMEDIATE, metadata=origin, log=log)
                done = quantize(whole, file, settings.gguf_type)
                check_ended(done, file, "llama.cpp cannot quantise the model", "tasks/export/quantization.py", log)
        check_loads(file)
        draft.facts = {
            "type": settings.gguf_type,
            "bytes": file.stat().st_size,
            "converter": converter.version,
            "answer": answer(file, dataset),
        }
    return draft.done()


def metadata(description: Description, dataset: Artifact, license_name: str | None) -> dict[str, Any]:
    """What the converter is to write into the GGUF about its origin, by GGUF's standard keys.

    Args:
        description: base model, data and training.
        dataset: its digest is the version of the data.
        license_name: the base model's, if known.
    """
    base, data = (name.rstrip("/").rpartition("/")[2] for name in (description.base_model, description.data))
    values: dict[str, Any] = {
        # The name would otherwise be that of the directory, a digest.
        "general.name": f"{base} fine-tuned",
        "general.basename": base,
        "general.finetune": description.training.partition(",")[0],
        "general.description": f"{base}, fine-tuned on {data}: {description.training}",
        "general.base_models": [{"name": base}],
        "general.datasets": [{"name": data, "version": dataset.digest[:16]}],
    }
    return values | ({"general.license.name": license_name} if license_name else {})


def answer(file: Path, dataset: Artifact) -> dict[str, Any]:
    """Load a GGUF in llama.cpp and answer one held-out prompt greedily.

    Args:
        file: the GGUF.
        dataset: gives prompt and chat format.

    Returns:
        Prompt, text, and generated tokens per second (reading the prompt included in the time).

    Raises:
        TrainingError: nothing but space was generated.
    """
    from transformers import AutoTokenizer

    messages = _prompt(dataset)
    tokenizer = AutoTokenizer.from_pretrained(dataset.path / "tokenizer")
    text = render(tokenizer, messages, prompt=True)
    llama = load_gguf(file, n_ctx=CONTEXT, seed=0)
    # The rendered text holds the beginning-of-text token already where the model has one.
    tokens = llama.tokenize(text.encode(), add_bos=False, special=True)[-(CONTEXT - ANSWER_TOKENS) :]
    started = time.perf_counter()
    completion: Any = llama.create_completion(
        tokens, max_tokens=ANSWER_TOKENS, temperature=0.0, stop=[tokenizer.eos_token]
    )
    seconds = time.perf_counter() - started
    llama.close()
    generated = completion["usage"]["completion_tokens"]
    said = without_thinking(completion["choices"][0]["text"], end_of_thinking(tokenizer)).strip()
    if generated == 0 or not said:
        what = f"the GGUF loads in llama.cpp and answers nothing to {messages[-1]['content']!r}"
        fix = "Look at the training's losses: lower training.learning_rate, or train on answers that are not empty."
        raise TrainingError(what, where="export", fix=fix)
    return {
        "prompt": messages[-1]["content"],
        "text": said,
        "tokens_per_second": round(generated / seconds, 1),
    }


def _prompt(dataset: Artifact) -> list[dict[str, str]]:
    for name in ("test.jsonl", "validation.jsonl"):
        if (path := dataset.path / name).is_file():
            with path.open(encoding="utf-8") as file:
                messages: list[dict[str, str]] = json.loads(file.readline())["messages"][:-1]
                return messages
    return [{"role": "user", "content": FALLBACK_PROMPT}]
