"""How a plain text is cut into what its loss is measured on."""

from __future__ import annotations

from pathlib import Path

from tasks.comparison.measure_forgetting import paragraphs, read_text, windows


def test_a_text_needs_neither_spaces_nor_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("春眠不覚暁。\n夜来風雨声。\n  \n花落知多少。\n", encoding="utf-8")
    assert paragraphs(read_text(str(tmp_path / "text.txt"))) == ["春眠不覚暁。 夜来風雨声。", "花落知多少。"]


def test_a_long_paragraph_is_measured_to_its_end() -> None:
    assert windows(list(range(7)), 3) == [[0, 1, 2], [3, 4, 5]], "a single token has none before it"
    assert windows(list(range(8)), 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert windows([1], 3) == windows([], 3) == []
