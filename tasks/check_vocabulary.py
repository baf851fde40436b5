"""Stage: whether llama.cpp reads the model's vocabulary and renders its chat template as the training does.

All this is found out before anything is trained.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.logs import run_logger
from tasks.engine.stage import stage
from tasks.export.converter import converter_version, find_converter, run_converter
from tasks.export.gguf_types import VOCABULARY
from tasks.llamacpp.load import check_loads, load_gguf
from tasks.llamacpp.rendering import renderer_version
from tasks.llamacpp.template_proof import prove
from tasks.llamacpp.token_ids import mismatches, torture
from tasks.settings.export import ExportSettings

CONFIGURATION = ("config.json", "generation_config.json")


def programs(*, settings: ExportSettings, **_others: object) -> str:
    """Versions of what llama.cpp is asked by: its converter, and its server where there is one."""
    return f"{converter_version(settings=settings)} {renderer_version()}"


@stage(libraries=("llama-cpp-python", "transformers"), watch=programs, reads={"settings": {"llama_cpp"}})
def check_vocabulary(model: Artifact, dataset: Artifact, settings: ExportSettings, *, store: Store) -> Artifact:
    """Convert the vocabulary alone, and compare how llama.cpp and the tokenizer read texts that are hard to read.

    A difference is a warning here: the fidelity of the whole GGUF decides whether it is promoted.

    Args:
        model: the base model, for its architecture.
        dataset: for the tokenizer that the merged model will have.
        settings: which converter.
        store: where the artifact goes.

    Returns:
        The artifact `vocabulary`: a GGUF without tensors; its facts hold the texts that are read as other tokens, and
        as `template` how llama.cpp renders the chat template.

    Raises:
        UserError: llama.cpp's converter knows neither the architecture nor the tokenizer, or lacks a part of it.
    """
    from transformers import AutoTokenizer

    converter = find_converter(settings)
    with store.draft("vocabulary") as draft:
        file = draft.path / "vocabulary.gguf"
        with tempfile.TemporaryDirectory() as directory:
            for path in [*(model.path / name for name in CONFIGURATION), *(dataset.path / "tokenizer").iterdir()]:
                if path.is_file():
                    shutil.copy(path, Path(directory) / path.name)
            run_converter(converter, Path(directory), file, gguf_type=VOCABULARY, vocabulary_only=True)
        check_loads(file, vocabulary_only=True)
        tokenizer = AutoTokenizer.from_pretrained(dataset.path / "tokenizer", local_files_only=True)
        with redirect_stderr(io.StringIO()):  # a model without weights has no context, of which llama.cpp would warn
            llama = load_gguf(file, vocab_only=True)
        try:
            wrong = mismatches(llama, tokenizer, list(torture(tokenizer)))
        finally:
            llama.close()
        proof = prove(tokenizer, file)
        draft.facts = {"wrong_texts": [text.text for text in wrong], "template": proof.facts()}
    if wrong:
        warning = (
            "llama.cpp reads %d of the hard texts as other tokens than the tokenizer, first %r: the GGUF will not pass"
        )
        run_logger().warning(warning, len(wrong), wrong[0].text)
    return draft.done()
