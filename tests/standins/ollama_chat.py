"""The STAND-IN's chat: the registered template rendered by Go, the registered file run by llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.llamacpp.load import load_gguf
from tests.standins.ollama_models import MEDIA, ModelDirectory, shown_name
from tests.support.go_template import rendered


def answer(directory: ModelDirectory, manifest: Path, request: dict[str, Any], go: Path) -> Iterator[dict[str, Any]]:
    """The lines of an answer; the last holds `done_reason` and the counts.

    Args:
        directory: where the model is.
        manifest: the model's.
        request: `messages`, and `options` over the model's parameters.
        go: what renders templates.
    """
    layers = json.loads(manifest.read_bytes())["layers"]
    blobs = {layer["mediaType"].removeprefix(MEDIA): directory.blob(layer["digest"]) for layer in layers}
    texts = {kind: blob.read_text(encoding="utf-8") for kind, blob in blobs.items() if kind != "model"}
    options = json.loads(texts.get("params", "{}")) | (request.get("options") or {})
    messages = list(request.get("messages") or [])
    if "system" in texts and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": texts["system"]})
    about = {"model": shown_name(manifest), "created_at": datetime.now(UTC).isoformat()}
    if not request.get("messages"):
        yield {**about, "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "load"}
        return
    llama = load_gguf(blobs["model"], n_ctx=options.get("num_ctx", 2048))
    tokens = llama.tokenize(rendered(go, texts["template"], messages).encode(), add_bos=True, special=True)
    parts: Any = llama.create_completion(
        tokens,
        max_tokens=options.get("num_predict"),
        temperature=options.get("temperature", 0.8),
        stop=options.get("stop", []),
        stream=True,
    )
    count, reason = 0, None
    for part in parts:
        choice = part["choices"][0]
        count, reason = count + 1, choice["finish_reason"] or reason
        yield {**about, "message": {"role": "assistant", "content": choice["text"]}, "done": False}
    llama.close()
    end = {"done": True, "done_reason": reason, "prompt_eval_count": len(tokens), "eval_count": count}
    yield {**about, "message": {"role": "assistant", "content": ""}, **end}
