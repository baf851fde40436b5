"""Talk to a model that a finished run has left, where no Ollama is at hand: `llama3-grit chat --preset demo`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_settings import CliSuppress, SettingsConfigDict

from flows.finetune import stages
from flows.support.command_line import CommandLine, exit_status, parse
from flows.support.pasting import typed
from tasks.chat.rendering import render
from tasks.chat.thinking import end_of_thinking, without_thinking
from tasks.engine.artifacts import Store
from tasks.engine.errors import UserError
from tasks.engine.planning import planning
from tasks.llamacpp.load import load_gguf
from tasks.ollama.modelfile import OllamaModel, ollama_model
from tasks.ollama.names import model_name
from tasks.settings.finetune import FinetuneSettings
from tasks.settings.presets import load_settings

if TYPE_CHECKING:
    from llama_cpp import Llama
    from transformers import PreTrainedTokenizerBase

MOST_TOKENS = 512
SAMPLING = {"temperature": 0.2, "top_p": 0.95, "top_k": 40}
"""What llama-cpp-python takes for a chat where nothing is set."""


class ChatLine(CommandLine):
    """Talk to the model that a run has made. The options are those of that run."""

    model_config = SettingsConfigDict(cli_prog_name="llama3-grit chat")

    plan: CliSuppress[bool] = False


@dataclass(frozen=True)
class Finished:
    """What a run has made."""

    gguf: Path
    model: OllamaModel
    """What Ollama is told about it."""
    example: str
    """A prompt from the held-out rows."""
    tokenizer: PreTrainedTokenizerBase
    """Of the data set, with the chat format."""


def finished(settings: FinetuneSettings, words: Sequence[str]) -> Finished:
    """Find what a run with these settings has made.

    Args:
        settings: the run's.
        words: the options that gave them.

    Raises:
        UserError: no run with these settings has finished.
    """
    from transformers import AutoTokenizer

    with planning() as plan:
        stages(settings)
    results: dict[str, Any] = dict(plan.results)
    if "convert" not in results:
        fix = f"Start it: {typed('finetune', words)}"
        raise UserError("no run with these settings has finished", where=settings.store, fix=fix)
    store = Store(settings.store, settings.store_uri)
    dataset, gguf = store.bring(results["prepare_dataset"]), store.bring(results["convert"])
    model = ollama_model(dataset, settings.ollama, None)
    tokenizer = AutoTokenizer.from_pretrained(dataset.path / "tokenizer")
    return Finished(gguf.path / "model.gguf", model, gguf.facts["answer"]["prompt"], tokenizer)


def answer(
    llama: Llama, tokenizer: PreTrainedTokenizerBase, model: OllamaModel, turns: Sequence[Mapping[str, str]]
) -> str:
    """Print the model's next turn while it comes.

    Args:
        llama: the loaded GGUF.
        tokenizer: of the data set, whose chat template the training used.
        model: system prompt and sampling parameters.
        turns: the conversation; the last turn is the user's.

    Returns:
        The whole turn without its thinking, which no later prompt holds.
    """
    system = [{"role": "system", "content": model.system}] if model.system else []
    prompt = render(tokenizer, [*system, *turns], prompt=True)
    sampling = {name: model.parameters[name] for name in SAMPLING if name in model.parameters}
    stream: Any = llama.create_completion(
        # The rendered text holds the beginning-of-text token already where the model has one.
        llama.tokenize(prompt.encode(), add_bos=False, special=True),
        stop=model.parameters["stop"],
        max_tokens=MOST_TOKENS,
        stream=True,
        **(SAMPLING | sampling),
    )
    text = ""
    for part in stream:
        piece = part["choices"][0]["text"]
        print(piece, end="", flush=True)
        text += piece
    print()
    return without_thinking(text, end_of_thinking(tokenizer))


def ask() -> str:
    """Read what the user says, which may be pasted lines.

    Raises:
        EOFError: the input has ended.
    """
    if sys.stdin.isatty():
        with suppress(ImportError):  # not on every system
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message
    return input(">>> ").strip()


def run(arguments: Sequence[str] | None = None) -> int:
    """Chat until the input ends; return the exit status: 0, or 2 for something the user can put right."""

    def act() -> None:
        words = sys.argv[1:] if arguments is None else arguments
        preset, _plan, overrides = parse(words, ChatLine)
        settings = load_settings(preset, overrides)
        result = finished(settings, words)
        llama = load_gguf(result.gguf, n_ctx=result.model.context)
        name = model_name(settings)
        print(f"{name}, as llama.cpp runs it. /clear forgets, Ctrl-D ends. Try, for example:\n\n{result.example}\n")
        talk(llama, result.tokenizer, result.model)

    return exit_status(act)


def talk(llama: Llama, tokenizer: PreTrainedTokenizerBase, model: OllamaModel) -> None:
    """Chat until the input ends.

    Args:
        llama: as in `answer`.
        tokenizer: as in `answer`.
        model: as in `answer`.
    """
    turns: list[dict[str, str]] = []
    while True:
        try:
            message = ask()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if message == "/clear":
            turns = []
        elif message:
            turns.append({"role": "user", "content": message})
            try:
                turns.append({"role": "assistant", "content": answer(llama, tokenizer, model, turns)})
            except ValueError:  # llama.cpp's word for more tokens than the context holds
                print("The conversation is longer than the model's context, and is forgotten.")
                turns = []


if __name__ == "__main__":
    sys.exit(run())
