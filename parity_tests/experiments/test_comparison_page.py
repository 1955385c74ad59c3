"""The comparison page in a real browser: it opens, shows the report's numbers, and can be read, heard and printed."""

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from experiments.answers import FRAMEWORKS
from parity_tests.experiments.small_comparison import Comparison, Json

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# The last four keep Chromium from sending requests of its own.
CHROMIUM_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PHONE, DESKTOP = 390, 1200  # pixels

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return a running Chromium of the system. Without one the tests fail in CI and are skipped elsewhere."""
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up("no Chromium is there to open the page in: apt-get install chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_FLAGS))
        yield running
        running.close()


def open_page(browser: Browser, file: Path, width: int = DESKTOP, scheme: Any = "light") -> tuple[Page, list[str]]:
    """Open a page on a screen of this width, and return it with everything that went wrong."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    faults: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: faults.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("requestfailed", lambda request: faults.append(f"failed: {request.url[:80]}"))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    faults += [f"request: {url[:80]}" for url in requests if not url.startswith(("data:", file.as_uri()))]
    missing = page.evaluate("[...document.images].filter(image => !image.naturalWidth).map(image => image.alt)")
    faults += [f"no image: {alt}" for alt in missing]
    if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
        faults.append("it scrolls sideways")
    return page, faults


@pytest.mark.parametrize(("width", "scheme"), [(PHONE, "dark"), (DESKTOP, "light")])
def test_the_page_opens_without_errors_requests_missing_images_or_scrolling_sideways(
    comparison: Comparison, browser: Browser, tmp_path: Path, width: int, scheme: str
) -> None:
    page, faults = open_page(browser, comparison.page, width, scheme)
    assert faults == []
    assert page.locator("img").count() > 2 * comparison.config.images
    screenshot = tmp_path / f"page-{width}-{scheme}.png"
    page.screenshot(path=screenshot, full_page=True)
    picture = Image.open(screenshot).convert("L")
    assert picture.width == width
    assert picture.height > 5_000
    assert np.asarray(picture).std() > 20, "the page is empty"


PLANTED = {
    "an error on the console": '<script>console.error("planted")</script>',
    "an error in a script": "<script>nowhere()</script>",
    "a file beside the page": '<img src="nowhere.png" alt="planted">',
    "a request to the network": '<img src="http://127.0.0.1:9/x.png" alt="planted">',
    "a broken image": '<img src="data:image/png;base64,AAAA" alt="planted">',
    "a part that is too wide": '<div style="width: 5000px">planted</div>',
}


@pytest.mark.parametrize("fault", PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_of_the_page_is_seen(browser: Browser, tmp_path: Path, fault: str) -> None:
    file = tmp_path / "page.html"
    for body, faulty in (("<p>nothing</p>", False), (fault, True)):
        file.write_text(f"<!DOCTYPE html><link rel=icon href='data:,'><body>{body}</body>", encoding="utf-8")
        _, faults = open_page(browser, file)
        assert bool(faults) == faulty, faults


ROWS = """id => [...document.querySelectorAll(`#${id} tbody tr`)].map(
    row => [...row.querySelectorAll("data")].map(cell => [cell.value, cell.textContent]))"""


def expected_tables(report: Json) -> dict[str, list[list[float]]]:
    """Return the numbers of each table, row by row, without the differences of the headline."""
    keys = ("train_loss", "test_loss", "test_accuracy")
    epochs = zip(*(report["runs"][side]["epochs"] for side in FRAMEWORKS), strict=True)
    errors = ("local_error", "inherited_error", "gradient_error", "torch_float32_error", "jax_float32_error")
    return {
        "headline": [[row["jax"], row["torch"]] for row in report["headline"]],
        "epochs": [[row[key] for key in keys for row in pair] for pair in epochs],
        "stages": [[row[error] for error in errors] for row in report["parity"]["stages"]],
        "speeds": [
            [
                *(row["ms_per_step"][name] for name in ("median", "low_quartile", "high_quartile")),
                *(row[name]["median"] for name in ("images_per_second", "speed_to_best_torch", "times_floor")),
                row["peak_bytes"],
            ]
            for row in report["speed"]["rows"]
        ],
        "by-class": [
            [row["images"], *(row[side]["accuracy"] for side in FRAMEWORKS)] for row in report["scores"]["classes"]
        ],
        "layer-table": [
            *([row[side]["parameters"] for side in FRAMEWORKS if row[side]] for row in report["layers"]),
            [sum(row[side]["parameters"] for row in report["layers"] if row[side]) for side in FRAMEWORKS],
        ],
        "inside": [[row[name] for name in ("largest", "median", "furthest")] for row in report["inside"]["stages"]],
    }


def test_the_tables_show_the_numbers_of_the_report(comparison: Comparison, browser: Browser) -> None:
    page, _ = open_page(browser, comparison.page)
    tables = expected_tables(comparison.report)
    assert sorted(tables) == sorted(page.evaluate("[...document.querySelectorAll('table')].map(table => table.id)"))
    for name, expected in tables.items():
        rows = page.evaluate(ROWS, name)
        assert len(rows) == len(expected) > 0
        for cells, numbers in zip(rows, expected, strict=True):
            values = [float(value) for value, _ in cells]
            assert values[: len(numbers)] == numbers, name
            for difference in values[len(numbers) :]:
                assert difference == pytest.approx(numbers[0] - numbers[1])
            for value, (_, text) in zip(values, cells, strict=True):
                assert is_rounded(text, value), (name, cells)
    accuracy = comparison.report["headline"][0]
    first = page.locator("#headline tbody tr").first.inner_text().split("\t")
    assert first[1:3] == [f"{100 * accuracy[side]:.2f} %" for side in FRAMEWORKS]
    assert comparison.report["verdict"]["sentence"] in page.locator("#verdict").inner_text()


def is_rounded(text: str, number: float) -> bool:
    """Return whether a text is the number rounded, in percent or in MiB where that is its unit."""
    plain = text.replace("−", "-").replace(",", "").replace("%", "").strip()
    digits, _, power = plain.partition("e")
    places = len(digits.partition(".")[2])
    unit = 10.0 ** int(power or 0)
    scales = (1, 100, 2**-20)
    return any(abs(number * scale - float(plain)) <= 0.5001 * unit * 10.0**-places for scale in scales)


def test_a_wrong_text_of_a_number_is_seen() -> None:
    for text, number in (("91.84 %", 0.9184), ("−0.0021", -0.00214), ("1,091", 1144000512), ("3.2e−15", 3.2e-15)):
        assert is_rounded(text, number)
        assert not is_rounded(text, 1.1 * number)
        assert not is_rounded(text, -number)


def test_the_page_shows_the_predictions_of_the_report(comparison: Comparison, browser: Browser) -> None:
    page, _ = open_page(browser, comparison.page)
    for key in ("predictions", "disagreements"):
        cards = page.locator(f"#{key} .cards li").all()
        assert len(cards) == len(comparison.report[key])
        for card, row in zip(cards, comparison.report[key], strict=True):
            assert f"no. {row['image']}" in card.inner_text()
            for side, answer in zip(FRAMEWORKS, card.locator(".answer").all(), strict=True):
                assert float(answer.locator("data").get_attribute("value") or "") == row[side]["confidence"]
                assert comparison.report["classes"][row[side]["predicted"]] in answer.inner_text()
                assert ("(wrong)" in (answer.text_content() or "")) == (row[side]["predicted"] != row["label"])


COLOURS = """() => ["body", ".note", "th.jax", "th.torch", "#verdict strong", ".answer.jax", ".answer.torch", ".quiet",
    ...["k", "sd", "c1", "mi", "nf"].map(name => `code .${name}`)].map(selector => {
        const element = document.querySelector(selector);
        let ground = element;
        while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
        return [selector, getComputedStyle(element).color, getComputedStyle(ground).backgroundColor];
    })"""


def test_text_can_be_read_in_light_and_in_dark(comparison: Comparison, browser: Browser) -> None:
    grounds, pictures = {}, {}
    for scheme in ("light", "dark"):
        page, _ = open_page(browser, comparison.page, scheme=scheme)
        colours = page.evaluate(COLOURS)
        for selector, ink, ground in colours:
            low, high = sorted((luminance(ink), luminance(ground)))
            contrast = (high + 0.05) / (low + 0.05)
            # WCAG 2 asks for 4.5 (level AA).
            assert contrast >= 4.5, f"{selector} is hard to read in {scheme}: {ink} on {ground}"
        grounds[scheme] = luminance(colours[0][2])
        pictures[scheme] = page.evaluate("[...document.querySelectorAll('.plot img')].map(image => image.currentSrc)")
    assert grounds["dark"] < 0.05 < 0.9 < grounds["light"]
    assert len(pictures["light"]) == len(set(pictures["light"] + pictures["dark"])) / 2 > 10, "no figure is used twice"


def luminance(colour: str) -> float:
    """Return the relative luminance of `rgb(…)`, as WCAG 2 defines it."""
    channels = np.array([int(number) for number in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def test_the_page_can_be_heard_navigated_and_printed(comparison: Comparison, browser: Browser, tmp_path: Path) -> None:
    page, _ = open_page(browser, comparison.page)
    assert page.evaluate("[...document.images].every(image => image.alt.length > 5)")
    assert page.evaluate("[...document.links].every(link => document.getElementById(link.hash.slice(1)))")
    assert page.locator("nav a").count() == page.locator("main > section").count()
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(head => Number(head.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels)), "headings go down by one level"
    assert page.locator("script").count() == 0
    page.pdf(path=tmp_path / "page.pdf", prefer_css_page_size=True)
    assert (tmp_path / "page.pdf").stat().st_size > 100_000
