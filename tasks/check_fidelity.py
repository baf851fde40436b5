"""Stage: the GGUF in llama.cpp is held against the merged model in Transformers, on the same tokens.

What the two are compared by is what users of llama.cpp's `perplexity` tool know: mean Kullback-Leibler divergence,
share of tokens whose likeliest successor is kept, ratio of the perplexities. Beyond that the GGUF must show what tuning
changed, which an export of the base model would not. Counted are the supervised tokens, those of the answers: a tuned
model's idea of the prompts is no matter to its users, and not stable.
"""

from __future__ import annotations

import json
from typing import Any

from tqdm import tqdm

from tasks.engine.artifacts import Artifact, Store
from tasks.engine.stage import stage
from tasks.evaluation.answering import conversations
from tasks.evaluation.loading import COMPUTING, load_model
from tasks.export.checks import Check
from tasks.export.fidelity_limits import FidelityFigures, fidelity_checks, limits
from tasks.export.fidelity_measures import (
    base_nll_by_row,
    compare_row,
    end_token_agrees,
    fidelity_figures,
    gguf_logits,
    open_gguf,
    rows_to_compare,
    token_logits,
)
from tasks.llamacpp.rendering import renderer_version
from tasks.llamacpp.template_proof import prove
from tasks.llamacpp.token_ids import mismatches, prompt_mismatches, torture
from tasks.settings.export import FidelitySettings, GgufType
from tasks.settings.finetune import ModelSettings

PROMPTS = 32
"""Held-out prompts whose token ids are compared, at most."""


@stage(
    libraries=("llama-cpp-python", "torch", "transformers"),
    watch=renderer_version,
    reads={"base": COMPUTING},
    alone=True,
)
def check_fidelity(
    gguf: Artifact,
    *,
    merged: Artifact,
    model: Artifact,
    dataset: Artifact,
    settings: FidelitySettings,
    gguf_type: GgufType,
    base: ModelSettings,
    store: Store,
) -> Artifact:
    """Compare a GGUF with the model that it was made from.

    Args:
        gguf: the exported file.
        model: the base model.
        dataset: held-out rows and tokenizer.
        settings: how much is read, and the limits.
        gguf_type: what type the file was to be.
        base: the type that is computed in, and whether to run code that comes with the model.
        store: where the artifact goes.

    Returns:
        The artifact `fidelity`: `fidelity.json`; its facts hold the checks and whether all were passed. A file that
        fails a check is no error: it is not promoted.

    Raises:
        UserError: llama.cpp cannot load the file.
    """
    file, bounds = gguf.path / "model.gguf", limits(settings, gguf_type)
    rows = rows_to_compare(dataset, settings)
    base_nll = base_nll_by_row(model, dataset, rows, base)
    network, tokenizer = load_model(merged, dataset, base.dtype, base.trust_remote_code)
    llama = open_gguf(file, max(len(row.ids) for row in rows))
    try:
        prompts = [row["messages"][:-1] for row in conversations(dataset, PROMPTS)]
        wrong = [*mismatches(llama, tokenizer, list(torture(tokenizer))), *prompt_mismatches(llama, tokenizer, prompts)]
        vocabulary = llama.n_vocab()
        compared = []
        for row, nats in tqdm(list(zip(rows, base_nll, strict=True)), desc="Fidelity of the GGUF", unit="row"):
            compared.append(
                compare_row(
                    merged=token_logits(network, row.ids)[row.before],
                    gguf=gguf_logits(llama, row.ids, vocabulary)[row.before],
                    targets=row.targets,
                    nll_base=nats,
                )
            )
        file_type = str(llama.metadata.get("general.file_type", "none"))
        end_token = end_token_agrees(llama, tokenizer)
    finally:
        llama.close()
    del network
    figures = fidelity_figures(compared, wrong, file_type=file_type, end_token=end_token)
    checks = fidelity_checks(figures, bounds, gguf_type)
    return _write(figures, checks, prove(tokenizer, file).facts(), store)


def _write(figures: FidelityFigures, checks: list[Check], template: dict[str, Any], store: Store) -> Artifact:
    with store.draft("fidelity") as draft:
        passed = all(check.reading != "failed" for check in checks)
        facts = {
            "passed": passed,
            "checks": [check._asdict() for check in checks],
            "rows": figures.rows,
            "tokens": figures.tokens,
            "template": template,
        }
        text = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)
        (draft.path / "fidelity.json").write_text(text + "\n", encoding="utf-8")
        draft.facts = facts
    return draft.done()
