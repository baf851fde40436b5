"""Checks that cost seconds, made before anything that costs minutes."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from packaging.version import Version

from grit.variants import VARIANTS
from tasks.chat.formats import format_names
from tasks.data.conversations import to_conversations
from tasks.data.files import check_files, read_rows
from tasks.engine.artifacts import Artifact
from tasks.engine.errors import TemporaryError, UserError
from tasks.engine.logs import run_logger
from tasks.engine.paths import checkout_directory
from tasks.engine.planning import Pending, looking
from tasks.export.converter import find_converter
from tasks.model.files import check_targets, matrix_layers
from tasks.ollama.directory import OllamaDirectory
from tasks.ollama.modelfile import DEFAULT_CONTEXT, check_parameters, ollama_model
from tasks.ollama.names import model_name, parse_name, version_name
from tasks.ollama.registry import registry
from tasks.ollama.served_template import jinja_counts
from tasks.ollama.server import OllamaServer
from tasks.settings.export import OllamaSettings
from tasks.settings.finetune import DataSettings, FinetuneSettings
from tasks.training.limits import check_machine
from tasks.training.token_counts import supervised_tokens

QUICKLY_READ = 32_000_000
"""Bytes of a data file that are read within a second or two."""
TIED = {"lm_head", "embed_tokens"}
"""Layers that share one weight in many models."""


def check_settings(settings: FinetuneSettings) -> None:
    """Check what only later stages would find out: backend, data files, converter, Ollama's name and parameters.

    Raises:
        UserError: one of them cannot work.
    """
    check_machine(settings.model, settings.training, settings.grit if settings.method == "grit" else None)
    if settings.method == "grit" and settings.lora.r == 1 and not VARIANTS[settings.grit.variant].only_measures:
        raise UserError(
            "in a rank space of one dimension GRIT's preconditioner is a number, so it would do nothing",
            where="lora.r",
            fix="Use at least 2, or train the baseline.",
        )
    steps, off = settings.training.max_steps, settings.grit.ng_warmup_steps
    if settings.method == "grit" and not VARIANTS[settings.grit.variant].only_measures and off >= steps:
        raise UserError(
            f"GRIT would be off in all of the {steps} steps (training.max_steps)",
            where="grit.ng_warmup_steps",
            fix=f"Set it below {steps}, or train the baseline.",
        )
    check_data(settings.data)
    find_converter(settings.export)
    checkout_directory("modelfiles")
    version_name(parse_name(model_name(settings)), datetime.now(UTC).date(), "0" * 64)
    check_parameters(settings.ollama.parameters)


def check_data(settings: DataSettings) -> None:
    """Check that local data files are there, and the rows of those that are quickly read.

    Raises:
        UserError: a file is missing or broken, or its rows are of no known shape.
    """
    for split, file in check_files(settings).items():
        if file.stat().st_size <= QUICKLY_READ:
            rows = read_rows(file, file)
            to_conversations(rows[: settings.max_rows] if split == "train" else rows, settings, file)


def check_registry(settings: OllamaSettings) -> str | None:
    """Check, before anything is trained, that the model could be registered afterwards.

    Returns:
        A warning where a server does not answer now; it may by the time that it is needed.

    Raises:
        UserError: a model directory cannot be written, or something else than Ollama is behind the address.
    """
    place = registry(settings, 10)
    if isinstance(place, OllamaDirectory):
        place.check_writable()
    elif place is not None:
        try:
            place.models()
        except TemporaryError as error:
            return f"{error} It is needed for the registration, after the training."
    return None


def check_prepared(settings: FinetuneSettings, model: Artifact, dataset: Artifact) -> None:
    """Check what is known once model and data are there: LoRA's targets, lengths, what Ollama is told.

    Args:
        settings: adapter, data and what is registered.
        model: the base model.
        dataset: the chat format.

    Raises:
        UserError: a target that does not exist or is tied to another layer, rows longer than the model's context,
            no validations to choose by, or a chat format that Ollama cannot serve as the settings want it.
    """
    if isinstance(model, Pending) or isinstance(dataset, Pending):
        return
    if model.facts["tied_embeddings"] and (shared := TIED & set(settings.lora.target_modules)):
        raise UserError(
            f"the model's output layer and embedding are tied, so {min(shared)} would change the other as well",
            where="lora.target_modules",
            fix="Leave it out.",
        )
    check_targets(settings.lora, matrix_layers(model.path), settings.model.name)
    if _chooses(settings) and not (dataset.path / "validation.parquet").is_file():
        raise UserError(
            "keep_best and early_stopping_patience need validation rows, and none are held out",
            where="training",
            fix="Hold rows out: data.validation_fraction or data.validation_source.",
        )
    check_validations(settings, dataset)
    if settings.data.max_length > (context := int(model.facts["context_length"])):
        raise UserError(
            f"{settings.data.max_length} tokens are more than the model's context of {context}",
            where="data.max_length",
            fix=f"Use at most {context}.",
        )
    check_served(settings, dataset, model.facts.get("license"))


def check_served(settings: FinetuneSettings, dataset: Artifact, license_name: str | None) -> None:
    """Check what Ollama would be told, and warn where it would read less of a prompt than there is.

    Args:
        settings: template and parameters.
        dataset: chat format, held-out rows.
        license_name: the base model's, if known.

    Raises:
        UserError: as `ollama_model` has it.
    """
    server = server_version(settings.ollama)
    model = ollama_model(dataset, settings.ollama, license_name, server)
    if looking():
        return
    if model.needs and settings.ollama.target == "server" and server is None:
        run_logger().warning("ollama.host: the server must be Ollama %s or newer by then.", model.needs)
    if model.parameters.get("num_ctx", DEFAULT_CONTEXT) < DEFAULT_CONTEXT:
        what = "ollama.parameters: num_ctx is %d, below Ollama's own %d: longer chats lose their beginning"
        run_logger().warning(what, model.context, DEFAULT_CONTEXT)
    if dataset.facts["unseen_tools"]:
        run_logger().warning("Ollama does not see that the chat template knows tools: it will refuse chats with tools.")
    longest = dataset.facts["longest_prompt"]
    if longest and longest["tokens"] > model.context:
        what = "ollama.parameters: the prompt of row %d of the %s rows that were kept has %d tokens, "
        what += "and Ollama reads %d. Set num_ctx."
        run_logger().warning(what, longest["row"], longest["split"], longest["tokens"], model.context)


def server_version(settings: OllamaSettings) -> Version | None:
    """The version of the server that is to have the model; none for other targets, or where none answers now."""
    place = registry(settings, 10)
    try:
        return place.version() if isinstance(place, OllamaServer) else None
    except TemporaryError:
        return None  # `check_registry` warns of it


def check_chat(settings: FinetuneSettings, dataset: Artifact, vocabulary: Artifact) -> None:
    """Check that llama.cpp renders the chat template as the training does, where a server would render it.

    Args:
        settings: who formats the chat.
        dataset: chat format.
        vocabulary: how llama.cpp renders the template.

    Raises:
        UserError: it cannot parse the template, or renders a conversation otherwise.
    """
    if isinstance(vocabulary, Pending) or isinstance(dataset, Pending) or looking():
        return
    proof, counts = vocabulary.facts["template"], jinja_counts(dataset, settings.ollama.template)
    if proof["proven"]:
        return
    what = proof["why"]
    if proof["differences"]:
        first = proof["differences"][0]
        what = f"llama.cpp renders the conversation {first['conversation']!r} otherwise than the training: "
        what += f"{first['server']!r} in place of {first['training']!r}"
    if proof["proven"] is False and counts:
        raise UserError(
            what,
            where="the model's chat template",
            fix=f"Set chat.format to {format_names('or')}, or ollama.template to none if you accept the difference.",
        )
    if counts or proof["proven"] is False:
        run_logger().warning("The chat template is not proven to be served as it was trained: %s", what)


def _chooses(settings: FinetuneSettings) -> bool:
    return bool(settings.training.keep_best or settings.training.early_stopping_patience)


def check_validations(settings: FinetuneSettings, dataset: Artifact) -> None:
    """Warn of a training that ends before its first validation.

    Args:
        settings: when to validate.
        dataset: whose facts count the tokens.

    Raises:
        UserError: the validations were to choose the adapter or the end.
    """
    every, tokens = settings.training.eval_tokens, supervised_tokens(settings.training, dataset.facts)
    if not every or every < tokens:
        return
    seen = f"the training sees some {tokens:.0f} supervised tokens, and {every} pass between two validations"
    fix = f"Use {math.ceil(tokens / 10)}, for some ten validations."
    if _chooses(settings):
        wrong = f"keep_best and early_stopping_patience would have nothing to choose by: {seen}"
        raise UserError(wrong, where="training.eval_tokens", fix=fix)
    if not looking():
        run_logger().warning("training.eval_tokens: no validation during the training: %s. %s", seen, fix)
