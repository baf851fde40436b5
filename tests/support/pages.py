"""Reports as pages of HTML."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Collects what a report must and must not hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures = 0
        self.loads: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.pictures += tag == "svg"
        self.loads += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)
