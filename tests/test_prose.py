"""The measure of the pages' prose: what counts as a sentence, what does not count, and what is a fault."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def prose() -> ModuleType:
    """`.ci/check_prose.py`, which lies in no package."""
    specification = importlib.util.spec_from_file_location("check_prose", REPOSITORY / ".ci/check_prose.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def words(number: int) -> str:
    return " ".join(["word"] * number)


def page(*counts: int) -> str:
    """Sentences of so many words."""
    return " ".join(f"{words(count)}." for count in counts)


@pytest.mark.parametrize(
    "block",
    [
        "```sh\nmake demo. And more.\n\n# Not a heading.\n```",
        "~~~\nmake demo.\n~~~",
        "````\n```\nA fence in a fence.\n```\n````",
        "- \n  ```sh\n  make demo.\n  ```",
        "| a table | with a sentence. And another. |\n|---|---:|\n| one | two |",
        "# A heading. Of two sentences.\n\n### Another",
        "> A quote. Of two sentences.",
        "![A picture.](a.png)",
        "[![A picture that is a link.](a.png)](page.md)",
        "[name]: https://example.org/a",
        "<details>\n<summary>Folded.</summary>\n</details>",
        "<!-- A remark. In\n\ntwo paragraphs. -->",
    ],
)
def test_what_is_no_prose_does_not_count(prose: ModuleType, block: str) -> None:
    assert list(prose.sentences(block)) == []
    assert list(prose.sentences(f"Before it.\n\n{block}\n\nAfter it.")) == ["Before it", "After it"]


def test_a_fence_that_never_ends_goes_to_the_end_of_the_page(prose: ModuleType) -> None:
    assert list(prose.sentences("Before it.\n\n```\nNot this. Nor this.")) == ["Before it"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Set `export.gguf_type` now", 3),
        ("Set `one two. three four` now", 3),
        ("Set ``a `b` c`` now", 3),
        ("See [the long page](docs/page.md#a-b-c) now", 5),
        ("See [`the code`](docs/page.md) now", 3),
        ("It takes 0.5 to 1,000 ms - at most", 8),
        ("A *marked* **word** and it's one-sided", 6),
    ],
)
def test_code_is_a_word_and_a_link_is_its_text(prose: ModuleType, text: str, number: int) -> None:
    (sentence,) = prose.sentences(f"{text}.")
    assert len(prose.WORD.findall(sentence)) == number


@pytest.mark.parametrize(
    "text",
    [
        "Other data, e.g. a file, i.e. rows, do.",
        "E.g. a file does.",
        "AdamW vs. GRIT, cf. the table.",
        "It takes 0.5 s of 3.11 and `a.b. c`.",
        "A line\nthat is wrapped\nends at the stop.",
        "- An item\n  that is wrapped.",
        "#1 of the list is a sentence.",
        "<https://example.org> is a page.",
        "```one line``` is code.",
    ],
)
def test_one_sentence(prose: ModuleType, text: str) -> None:
    assert len(list(prose.sentences(text))) == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("One. Two! Three?", 3),
        ('He said "one." She said (two.) **Three.** Four.', 4),
        ("A paragraph without a stop\n\nAnother", 2),
        ("There are three:\n- one\n- two\n* three", 4),
        ("1. one\n2. two\n10. ten", 3),
        ("- one\n  - two, within it", 2),
        ("Before the table\n| a | b |\n|---|---|\nAfter it", 2),
    ],
)
def test_what_ends_a_sentence(prose: ModuleType, text: str, number: int) -> None:
    assert len(list(prose.sentences(text))) == number


def test_a_mean_of_18_words_is_a_fault(prose: ModuleType) -> None:
    assert list(prose.faults("page.md", page(18, 17))) == []
    (fault,) = prose.faults("page.md", page(19, 17))
    assert fault == "page.md: 18.0 words a sentence in the mean, 18 is too many"


def test_a_sentence_of_41_words_is_a_fault(prose: ModuleType) -> None:
    assert list(prose.faults("page.md", page(40, 2, 2))) == []
    (fault,) = prose.faults("page.md", page(41, 2, 2))
    assert fault.startswith("page.md: a sentence of 41 words, 40 is the most: word word")


def test_a_page_without_prose_has_no_fault(prose: ModuleType) -> None:
    assert list(prose.faults("page.md", "# Only a heading\n")) == []


def test_main_prints_a_line_for_each_fault(
    prose: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text(page(5))
    bad.write_text(page(41))
    assert prose.main([str(good)]) == 0
    assert capsys.readouterr().out == ""
    assert prose.main([str(good), str(bad)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"{bad}: ") for line in lines)
