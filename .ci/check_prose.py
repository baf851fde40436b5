"""Check that Markdown pages can be read: sentences of fewer than 18 words in the mean, and none of more than 40.

A sentence ends at a full stop, a question or exclamation mark, a colon before a list, and at the end of a paragraph or
of a list item. Tables, headings, code and quoted blocks do not count. `python .ci/check_prose.py README.md docs/*.md`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

MEAN = 18
LONGEST = 40
FENCED = re.compile(r"^[ \t]*(`{3,}(?=[^`\n]*$)|~{3,}).*?(^[ \t]*\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
NO_PROSE = re.compile(r"^\s*(#{1,6}\s|\||>|\[?!\[|</?\w+[\s/>]|\[[^\]]+\]:)")
ITEM = re.compile(r"^\s*([-*+]|\d+\.)\s+")
CODE = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
END = re.compile(r"(?<!\b[Ee]\.g)(?<!\b[Ii]\.e)(?<!\bvs)(?<!\b[Cc]f)[.!?][\"”’)*_]*(?=\s|$)")
WORD = re.compile(r"\w[\w'’,.\-/=%×+]*")


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs and list items of a page, each on one line; without tables, headings, code and quotes.

    Args:
        text: Markdown.
    """
    lines: list[str] = []
    for line in [*COMMENT.sub("", FENCED.sub("", text)).split("\n"), ""]:
        if not line.strip() or NO_PROSE.match(line) or ITEM.match(line):
            if lines:
                yield " ".join(lines)
            lines = []
        if line.strip() and not NO_PROSE.match(line):
            lines.append(ITEM.sub("", line).strip())


def sentences(text: str) -> Iterator[str]:
    """The sentences of a page. Code in a sentence counts as one word, and a link as its text.

    Args:
        text: Markdown.
    """
    for paragraph in paragraphs(text):
        plain = LINK.sub(r"\1", CODE.sub("code", paragraph))
        yield from filter(WORD.search, END.split(plain))


def faults(name: str, text: str) -> Iterator[str]:
    """What makes a page hard to read, a line each.

    Args:
        name: of the page.
        text: Markdown.
    """
    counted = [(len(WORD.findall(sentence)), sentence.strip()) for sentence in sentences(text)]
    if not counted:
        return
    mean = sum(count for count, _ in counted) / len(counted)
    if mean >= MEAN:
        yield f"{name}: {mean:.1f} words a sentence in the mean, {MEAN} is too many"
    for count, sentence in counted:
        if count > LONGEST:
            yield f"{name}: a sentence of {count} words, {LONGEST} is the most: {sentence[:80]}…"


def main(paths: Sequence[str]) -> int:
    """Print the faults of all pages.

    Args:
        paths: Markdown files.

    Returns:
        The exit status: 1 if there is a fault.
    """
    lines = [fault for path in paths for fault in faults(path, Path(path).read_text(encoding="utf-8"))]
    print("\n".join(lines), end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
