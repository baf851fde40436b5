"""Settings of what becomes of a trained model: the GGUF, its check, its registration, its promotion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from tasks.settings.base import PositiveInt, Section

Template = Literal["auto", "jinja", "go", "none"]
GgufType = Literal["q8_0", "f16", "bf16", "q6_k", "q5_k_m", "q4_k_m"]


class ExportSettings(Section):
    """The merged model and the GGUF file."""

    merge_into: Literal["best", "original", "dequantized"] = "best"
    """After training on NF4: into the original 16-bit weights, into the dequantised ones that training saw, or into
    whichever gives the lower validation loss (without validation rows into the original ones)."""
    gguf_type: GgufType = "q8_0"
    """Type of the large tensors."""
    llama_cpp: Path | None = None
    """Your own llama.cpp checkout; none: the pinned converter that `make setup` installs."""


class FidelitySettings(Section):
    """The GGUF in llama.cpp against the merged model in Transformers, token by token."""

    rows: PositiveInt = 32
    """Held-out rows that both read; training rows where none are held out."""
    max_tokens: Annotated[int, Field(ge=8)] = 512
    """Tokens of each row that are read, at most."""
    warn_perplexity_ratio: Annotated[float, Field(gt=1)] | None = None
    """GGUF's perplexity over the merged model's, from which on the report warns; none: by `export.gguf_type`."""
    max_perplexity_ratio: Annotated[float, Field(gt=1)] | None = None
    """The same ratio, above which the export has failed."""
    max_kl: Annotated[float, Field(gt=0)] | None = None
    """Mean Kullback-Leibler divergence of the next token's distribution, in nats, above which the export has failed."""
    min_top1: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of tokens whose likeliest successor was kept, or became one at least half as likely, below which the export
    has failed."""
    min_difference_kept: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of what tuning changed that the GGUF must show, less two standard errors."""


def without_secret(address: str | None) -> str | None:
    """Refuse an address that carries a user's name or password: settings are printed, and sent to Prefect's server."""
    if address and urlsplit(address if "//" in address else f"//{address}").username is not None:
        raise ValueError("no user name or password here: give them in the environment, as the address's service says")
    return address


class OllamaSettings(Section):
    """Registration with Ollama."""

    name: str = "llama3-{method}"
    """Model name; `{method}` becomes `baseline` or `grit`."""
    target: Literal["server", "store", "none"] = "server"
    """A running server, an Ollama model directory on disk, or no registration."""
    host: str = "http://127.0.0.1:11434"
    """The server, for the target `server`."""
    models: Path = Path("~/.ollama/models")
    """The model directory, for the target `store` (what Ollama calls OLLAMA_MODELS). In a preset it counts from
    the project's directory."""
    template: Template = "auto"
    """Who formats the chat: `jinja`, the GGUF's own template (Ollama 0.30 and later); `go`, a TEMPLATE, for the formats
    llama3, alpaca and chatml; `auto`, whichever fits; `none`, whatever the server takes, without a proof."""
    parameters: dict[str, float | int | bool | str] = Field({})
    """Further Modelfile parameters, e.g. {temperature: 0.2}."""

    _no_secret = field_validator("host")(without_secret)


class PromotionSettings(Section):
    """When a new model takes the place of the one in use, and how many former ones stay.

    Every model is registered under a tag of its own, as llama3-grit:2026-11-23-1a2b3c4d. The tag in `ollama.name`,
    `latest` where it has none, names the model in use.
    """

    rule: Literal["better", "faithful", "never"] = "better"
    """`better`: the validation loss is lower than the base model's and not higher than the present model's, no lm-eval
    metric is worse than either's by more than the difference's standard error, and the GGUF is faithful.
    `faithful`: the GGUF is. `never`: only `llama3-grit rollback --to TAG` changes what is in use."""
    keep: PositiveInt = 3
    """Tags of former models that stay; the one in use and the one before it always do."""
