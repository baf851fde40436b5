"""A comparison's report in a real browser: quiet, complete, readable in light and dark, on a phone and on paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.analysis.compared_runs import RateTrial
from tasks.analysis.figures import COLOURS as COLOURS_OF_METHODS
from tasks.stats import estimates
from tests.support.chromium import Page, find_chromium, opened
from tests.support.made_up_comparison import MadeUp

pytestmark = pytest.mark.slow  # a browser draws the page

METHODS = ("baseline", "grit", "grit:graft")
TEXT, LINE = 4.5, 3.0
"""Contrast that WCAG 2.2 asks of text, and of the lines of a picture."""
COLOURS = """
(() => {
  const ground = getComputedStyle(document.body).backgroundColor;
  const of = (kind, name) => [...document.querySelectorAll(kind)].map(element => getComputedStyle(element)[name]);
  const axes = [...document.querySelectorAll("svg [id*='patch_'] path")].map(path => getComputedStyle(path).stroke);
  return {ground, text: of("h1, h2, p, td, th, figcaption, .label, .soft", "color"), svg: of("svg text", "fill"),
          axes: axes.filter(stroke => stroke != "none")};
})()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = MadeUp(tmp_path_factory.mktemp("made-up"))
    trials = tuple(
        RateTrial(method=method, learning_rate=rate, history=outputs.history(rate, 1))
        for method in METHODS
        for rate in (1e-3, 2e-3)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "RESAMPLES", 50)
        return outputs.report(outputs.runs(METHODS, 2), trials, fault=True).path / "report.html"


@pytest.fixture(scope="module")
def page(report: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    browser = find_chromium()
    if browser is None:
        pytest.skip("there is no Chromium on this machine")
    with opened(browser, tmp_path_factory.mktemp("profile")) as page:
        page.show(1100)
        page.open(report)
        yield page


def test_nothing_is_said_on_the_console_and_nothing_is_loaded(page: Page, report: Path) -> None:
    seen = [event["method"] for event in page.events]
    assert not {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"} & set(seen)
    asked = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    assert report.as_uri() in asked
    assert [url for url in asked if url != report.as_uri() and not url.startswith("data:")] == []


@pytest.mark.parametrize("width", [320, 390, 1100])
def test_it_fits_its_width_and_every_picture_has_a_size(page: Page, width: int) -> None:
    page.show(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate(
        "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).map(b => [b.width, b.height])"
    )
    assert len(sizes) == 4 + 1 + 3 * 2, "curves, the fault, and three maps of each GRIT"
    assert all(wide > 250 and high > 100 for wide, high in sizes)
    # Text of ten units in a picture of 461 stays readable: on a phone the picture scrolls in its frame instead.
    assert min(wide for wide, _ in sizes) >= 400
    cells = page.evaluate(
        "[...document.querySelectorAll('.pair > *')].map(e => e.getBoundingClientRect()).map(b => b.right)"
    )
    assert max(cells) <= width


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_axes_stand_out_in_light_and_dark(page: Page, dark: bool) -> None:
    page.show(1100, dark=dark)
    colours = page.evaluate(COLOURS)
    assert (_luminance(colours["ground"]) < 0.1) == dark
    assert colours["svg"] and colours["axes"]
    for kind, least in (("text", TEXT), ("svg", TEXT), ("axes", LINE)):
        assert min(_contrast(colour, colours["ground"]) for colour in set(colours[kind])) >= least, kind


def test_every_methods_colour_stands_out_in_light_and_dark(page: Page) -> None:
    for dark in (False, True):
        page.show(1100, dark=dark)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        for colour in COLOURS_OF_METHODS:
            rgb = ", ".join(str(part) for part in bytes.fromhex(colour[1:]))
            assert _contrast(f"rgb({rgb})", ground) >= LINE, colour


def test_light_and_dark_look_different_and_paper_is_light(page: Page) -> None:
    page.show(390)
    light = page.screenshot()
    page.show(390, dark=True)
    assert light != page.screenshot()
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert _luminance(page.evaluate("getComputedStyle(document.body).color")) < 0.1, "dark ink"
    page.call("Emulation.setEmulatedMedia", media="")
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(colour: str, other: str) -> float:
    low, high = sorted((_luminance(colour), _luminance(other)))
    return (high + 0.05) / (low + 0.05)
