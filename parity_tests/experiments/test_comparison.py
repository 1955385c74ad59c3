"""The comparison as a person runs it: what it prints, measures and writes, and its page in a real browser.

One small comparison, the real command on 1,280 images, serves all tests.
"""

import copy
import io
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console

import compare
from experiments.answers import FRAMEWORKS, STAGES
from experiments.comparison import figures, listings, page, report, runs, scores
from experiments.comparison.figures import DARK, LIGHT
from experiments.comparison.runs import CompareConfig
from experiments.records import Json
from jax_cnn.config import UserError
from jax_cnn.data import CLASS_NAMES, CLASS_NUMBERS
from jax_cnn.run.display import ProgressBar
from jax_cnn.torch_layout import TorchDict
from jax_cnn.weights import load_weights
from parity_tests.faults import FAULTS
from parity_tests.harness.checks import examine
from parity_tests.harness.report import to_json
from parity_tests.product import feed_forward
from parity_tests.support import ROOT, read_json, run_successfully

pytestmark = pytest.mark.extended

PARITY = ROOT / "docs" / "results" / "parity" / "report.json"


class Comparison(NamedTuple):
    """A finished comparison: its configuration, what the command printed, its report and its page."""

    config: CompareConfig
    output: str
    report: Json
    page: Path


@pytest.fixture(scope="module")
def comparison(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Run a small comparison in a folder that holds an earlier page; it trains with both commands."""
    out_dir = tmp_path_factory.mktemp("compare")
    (out_dir / page.PAGE).write_text("an earlier page", encoding="utf-8")
    changed: dict[str, Any] = {
        "epochs": 1,
        "limit_train": 1_280,
        "limit_test": 400,
        "images": 6,
        "disagreements": 6,
        "parity_report": PARITY,
        "data_dir": data_dir,
        "out_dir": out_dir,
    }
    flags = [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", value)]
    output = run_successfully("compare", *flags, cwd=out_dir)
    return Comparison(CompareConfig(**changed), output, read_json(out_dir / page.REPORT), out_dir / page.PAGE)


def render(content: Json) -> str:
    """Return the page of a report, with the same small picture for every figure."""
    picture = {"light": "", "dark": "", "width": 1, "height": 1}
    return page.render(json.loads(json.dumps(content, default=str)), dict.fromkeys(page.list_figures(content), picture))


# --- What the command leaves behind ---


def test_a_person_sees_progress_the_verdict_and_where_the_page_is(comparison: Comparison) -> None:
    lines = comparison.output.splitlines()
    assert not re.search(r"[\x1b\r]", comparison.output)
    assert [line for line in lines if re.match(r"\d of \d: ", line)] == [
        "1 of 6: PyTorch's initial weights, for both",
        "2 of 6: training with JAX",
        "3 of 6: training with PyTorch",
        "4 of 6: speed by configuration",
        "5 of 6: test images",
        "6 of 6: parity in float64",
    ]
    assert any(line.startswith("training with JAX: epoch 1/1: ") for line in lines), "the command's own progress"
    assert lines[-2] == comparison.report["verdict"]["sentence"]
    assert lines[-1] == f"The page is {comparison.page}: open it in a browser"


def test_an_earlier_page_is_moved_aside(comparison: Comparison) -> None:
    earlier = comparison.config.out_dir / "earlier-1" / page.PAGE
    assert earlier.read_text(encoding="utf-8") == "an earlier page"
    assert f"{comparison.config.out_dir} held an earlier run: it is now in" in comparison.output


def test_both_started_from_pytorchs_weights_and_trained_as_asked(comparison: Comparison) -> None:
    for framework, run in comparison.report["runs"].items():
        config = run["record"]["config"]
        assert config["init_weights"] == str(comparison.config.initial_weights)
        assert (config["epochs"], config["limit_train"], config["limit_test"]) == (1, 1_280, 400)
        assert run["record"]["command"].startswith(f"python scripts/train_{framework}.py ")
        assert run["peak_bytes"] > 100 * 2**20
        assert not run["reused"]
        assert comparison.report["scores"]["accuracy"][framework] == pytest.approx(run["epochs"][-1]["test_accuracy"])
        assert np.array(comparison.report["scores"]["confusion"][framework]).sum() == 400
    assert comparison.report["versions"]["torch"]
    assert comparison.report["machine"]["cores"] >= 1
    assert "scripts/compare.py" in comparison.report["command"]


def test_every_figure_is_a_picture_for_light_and_for_dark(comparison: Comparison) -> None:
    folder = comparison.config.out_dir / page.FIGURES
    names = list(page.list_figures(comparison.report))
    files = {f"{name}{theme.suffix}.png" for name in names for theme in (LIGHT, DARK)}
    assert {path.name for path in folder.iterdir()} == files
    for name in names:
        sizes = set()
        for theme in (LIGHT, DARK):
            picture = Image.open(folder / f"{name}{theme.suffix}.png").convert("RGB")
            colours = np.asarray(picture)
            assert f"#{colours[0, 0].tobytes().hex()}" == theme.paper
            assert colours.std() > 5, f"{name} is empty"
            sizes.add(picture.size)
        ((width, height),) = sizes
        assert width >= 800
        assert height >= 300


def test_every_figure_has_a_title_and_labelled_axes(comparison: Comparison) -> None:
    for name, drawer in page.list_figures(comparison.report).items():
        with figures.drawing(LIGHT):
            figure = drawer(comparison.report, LIGHT)
        assert figure.get_suptitle(), name
        assert {figure.get_supxlabel(), *(axes.get_xlabel() for axes in figure.axes)} != {""}, name
        assert {figure.get_supylabel(), *(axes.get_ylabel() for axes in figure.axes)} != {""}, name


def test_data_that_are_not_fashion_mnist_are_on_the_page_and_no_garment_is_named(comparison: Comparison) -> None:
    content = copy.deepcopy(comparison.report)
    run = content["runs"]["jax"]
    run["record"]["data"] = {"t10k-labels-idx1-ubyte": "ab" * 32}
    content["classes"] = report.name_classes(runs.Run(**run))
    for shown, classes, others in (
        (content, CLASS_NUMBERS, CLASS_NAMES),
        (comparison.report, CLASS_NAMES, CLASS_NUMBERS),
    ):
        text = re.sub(r"base64,[^\"]*", "", render(shown))
        assert all(name in text for name in classes)
        assert not [name for name in others if re.search(rf"\b{name}\b", text, re.IGNORECASE)]
        assert ("CNN on FashionMNIST" in text) == (shown is comparison.report)
        assert (f"t10k-labels-idx1-ubyte <code>{'ab' * 32}</code>" in text) == (shown is content)


# --- Finished runs ---


@pytest.fixture
def initial(comparison: Comparison) -> TorchDict:
    """Return the weights that both networks started from."""
    return load_weights(comparison.config.initial_weights, "float32")


@pytest.fixture
def copied(comparison: Comparison, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies a framework's finished run, so that a test may damage it."""
    return lambda framework: Path(shutil.copytree(comparison.config.out_dir / framework, tmp_path / framework))


def test_a_finished_run_in_the_output_folder_is_taken(comparison: Comparison, initial: TorchDict) -> None:
    for framework in FRAMEWORKS:
        output = io.StringIO()
        run = runs.obtain_run(framework, comparison.config, initial, ProgressBar(Console(file=output)))
        assert run._asdict() | {"folder": str(run.folder), "reused": False} == comparison.report["runs"][framework]
        assert run.reused
        assert output.getvalue() == f"{run.folder} holds this run already: it is taken\n"
        assert runs.starts_from(initial, framework, run.folder)
        other_weights = {name: array + np.float32(1e-6) for name, array in initial.items()}
        assert not runs.starts_from(other_weights, framework, run.folder)


def test_the_memory_and_the_first_weights_of_a_changed_run_are_unknown(
    comparison: Comparison, initial: TorchDict, copied: Callable[[str], Path]
) -> None:
    folder = copied("jax")
    record = read_json(folder / "config.json")
    record["config"]["init_weights"] = None
    (folder / "config.json").write_text(json.dumps(record | {"started": "long ago"}), encoding="utf-8")
    assert runs.read_run(folder, reused=True).peak_bytes is None, "process.json is about another run"
    assert not runs.starts_from(initial, "jax", folder)
    config = replace(comparison.config, jax_run=folder)
    report.check_named(config)
    with pytest.raises(UserError, match="it did not start from PyTorch's weights of seed 0, or its initial weights"):
        runs.obtain_run("jax", config, initial, ProgressBar(Console(file=io.StringIO())))


def test_runs_that_the_command_line_names_are_taken(
    comparison: Comparison, initial: TorchDict, copied: Callable[[str], Path]
) -> None:
    jax_run, torch_run = copied("jax"), copied("torch")
    config = replace(comparison.config, jax_run=jax_run, torch_run=torch_run)
    report.check_named(config)
    progress = ProgressBar(Console(file=io.StringIO()))
    (torch_run / runs.PROCESS).unlink()
    named = {framework: runs.obtain_run(framework, config, initial, progress) for framework in FRAMEWORKS}
    assert [(run.folder, run.reused) for run in named.values()] == [(jax_run, True), (torch_run, True)]

    content = copy.deepcopy(comparison.report)
    content["runs"] = {framework: run._asdict() for framework, run in named.items()}
    content["headline"] = report.headline(content)
    assert "not measured" not in render(comparison.report)
    assert render(content).count("not measured") == 1, "the memory of a command that others started"

    measured = scores.measure_networks(config, named)
    assert measured == {key: comparison.report[key] for key in measured}
    shutil.copy(comparison.config.initial_weights, named["jax"].folder / "weights.safetensors")
    with pytest.raises(UserError, match=r"jax: its weights classify \d+ of 400 images correctly, but"):
        scores.measure_networks(config, named)
    with pytest.raises(UserError, match="its seed: 0, not 1; give a run that fits"):
        report.check_named(replace(config, seed=1))


# --- The verdict ---


def test_the_verdict_follows_from_the_numbers(comparison: Comparison) -> None:
    verdict = comparison.report["verdict"]
    assert verdict == report.judge(comparison.report)
    assert verdict["same"]
    jax, torch = (comparison.report["runs"][side]["epochs"][-1]["test_accuracy"] for side in FRAMEWORKS)
    assert verdict["accuracy_allowed"] == pytest.approx(2 * np.sqrt((jax * (1 - jax) + torch * (1 - torch)) / 400))
    worse = copy.deepcopy(comparison.report)
    for accuracy in (torch - 1.2 * verdict["accuracy_allowed"], float("nan")):
        worse["runs"]["jax"]["epochs"][-1]["test_accuracy"] = accuracy
        assert not report.judge(worse)["same"]
        assert "points apart" in report.judge(worse)["sentence"]


def test_a_planted_fault_makes_the_page_say_not_the_same(comparison: Comparison) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == "one-weight")
    faulty = copy.deepcopy(comparison.report)
    result = examine(fault.plant(feed_forward()), names=("parameters", "outputs", "gradients"), steps=3)
    faulty["parity"] = report.describe_parity(to_json(result))
    faulty["verdict"] = report.judge(faulty)
    assert [divergence["check"] for divergence in faulty["parity"]["divergences"]] == ["outputs"]
    assert faulty["verdict"]["sentence"].startswith("JAX and PyTorch do not train the same network: in float64 they")
    assert "outputs: output of fc2: error " in faulty["verdict"]["sentence"]
    content = render(faulty)
    assert "<strong>Not the same.</strong>" in content
    assert "Where they differ, stage by stage" in content
    assert "In float64 they part as well" in content
    with figures.drawing(LIGHT):
        assert figures.draw_drift(faulty, LIGHT).get_suptitle() == "In float64 they part too"


def test_a_divergence_in_a_parity_report_decides_the_verdict(comparison: Comparison, tmp_path: Path) -> None:
    divergence = {"check": "outputs", "where": "output of relu1", "problem": "differs", "cause": ""}
    content = read_json(PARITY) | {"divergences": [divergence]}
    (tmp_path / "report.json").write_text(json.dumps(content), encoding="utf-8")
    config = replace(comparison.config, parity_report=tmp_path / "report.json")
    assert not report.judge(comparison.report | {"parity": report.measure_parity(config, print)})["same"]


# --- What the page is made from ---


def test_the_layers_are_those_of_both_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = scores.list_layers()
    flat, last = listed[6], listed[-1]
    assert [row["layer"] for row in listed if row["jax"]] == list(STAGES)
    assert flat == {"layer": "flatten", "jax": None, "torch": {"name": "Flatten", "shape": [3136], "parameters": 0}}
    assert last["torch"] == {"name": "Linear", "shape": [10], "parameters": 5_130}
    assert last["jax"] == {"name": "fc2", "shape": [10], "parameters": 5_130}
    for row in listed:
        if row["jax"]:
            *rest, channels = row["jax"]["shape"]
            assert (row["torch"]["shape"], row["torch"]["parameters"]) == ([channels, *rest], row["jax"]["parameters"])
    output = io.StringIO()
    monkeypatch.setattr("sys.argv", ["compare.py", "--layers"])
    monkeypatch.setattr("experiments.comparison.report.check_named", lambda config: pytest.fail("it goes on to train"))
    monkeypatch.setattr(compare, "Console", lambda: Console(file=output, width=80))
    compare.main()
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert ["conv1", "conv1.add_bias", "28×28×32", "320", "Conv2d", "32×28×28", "320"] in lines
    assert ["all", "1,630,090", "1,630,090"] in lines
    assert "PyTorch [channel, row, column], JAX [row, column, channel]" in output.getvalue()


def test_scores_of_a_small_case_by_hand() -> None:
    labels = np.array([0, 1, 1, 2])
    logits: dict[Any, np.ndarray] = {side: np.full((4, 10), -50.0, np.float32) for side in FRAMEWORKS}
    logits["jax"][range(4), (0, 1, 2, 2)] = 50
    logits["torch"][range(4), (0, 3, 1, 2)] = 50
    result = scores.compare(logits, labels)
    assert result["accuracy"] == {"jax": 0.75, "torch": 0.75}
    counts = [result[key] for key in ("both_right", "only_jax_right", "only_torch_right", "neither_right")]
    assert counts == [2, 1, 1, 0]
    assert result["disagreements"] == [1, 2]
    assert result["confusion"]["jax"][1][:4] == [0, 1, 1, 0]
    assert result["classes"][1] == {"label": 1, "images": 2, "jax": {"accuracy": 0.5}, "torch": {"accuracy": 0.5}}
    assert result["classes"][5]["jax"]["accuracy"] is None
    (row,) = scores.describe_images([1], logits, labels)
    assert row["torch"] == {"predicted": 3, "confidence": pytest.approx(1.0)}


def test_the_page_says_so_where_they_never_disagree(comparison: Comparison) -> None:
    agreeing = copy.deepcopy(comparison.report) | {"disagreements": []}
    agreeing["scores"]["disagreements"] = []
    assert "Nowhere: on all" in render(agreeing)
    assert "Nowhere: on all" not in render(comparison.report | {"disagreements": comparison.report["predictions"]})


def test_text_from_the_report_is_escaped(comparison: Comparison) -> None:
    assert "<script>" not in render(comparison.report | {"command": "<script>alert(1)</script>"})


def test_the_programs_shown_are_in_the_files(comparison: Comparison) -> None:
    parts = comparison.report["programs"]
    assert [part["title"] for part in parts] == ["Data", "Model", "Loss", "Step", "Loop"]
    labels = ["PyTorch", "JAX with Flax Linen", "JAX with Flax NNX", "JAX in plain functions"]
    assert [program["label"] for program in parts[1]["programs"]] == labels
    for part in parts:
        assert {program["side"] for program in part["programs"]} == {"jax", "torch"}
        for program in part["programs"]:
            assert program["lines"] > 0
            for listing in program["listings"]:
                assert listing["file"].startswith("torch_ref/" if program["side"] == "torch" else "jax_cnn/")
                lines = (ROOT / listing["file"]).read_text(encoding="utf-8").splitlines()
                expected = lines[listing["first_line"] - 1 : listing["last_line"]]
                assert [line.strip() for line in listing["code"].splitlines()] == [line.strip() for line in expected]
    step = parts[3]["programs"][0]["listings"][1]["code"].splitlines()
    assert (step[0], step[-1]) == ("optimizer.zero_grad()", "optimizer.step()")


PROGRAM = '''"""A docstring."""

X = 1  # a comment


def f():
    """Another."""
    # why
    return (
        X
    )
'''


def test_lines_of_code_are_counted_without_blank_lines_comments_and_docstrings(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM, encoding="utf-8")
    function, constant = listings.read_listing(str(file), "f"), listings.read_listing(str(file), "X")
    assert (function["first_line"], function["last_line"]) == (6, 11)
    assert listings.count_lines([function]) == 4
    assert listings.count_lines([function, constant, constant]) == 5
    with pytest.raises(LookupError, match="holds no g"):
        listings.read_listing(str(file), "g")
    with pytest.raises(LookupError, match="holds no f return yield"):
        listings.read_listing(str(file), "f", "return", "yield")


def test_the_headline_counts_the_programs_that_ran(comparison: Comparison) -> None:
    (row,) = (row for row in comparison.report["headline"] if row["figure"] == "lines")
    assert {side: row[side] for side in FRAMEWORKS} == listings.total_lines(comparison.report["programs"])
    lines = dict.fromkeys(FRAMEWORKS, 0)
    for part in comparison.report["programs"]:
        for program in part["programs"]:
            lines[program["side"]] += program["lines"]
    assert 0 < row["torch"] < lines["torch"], "the step is also in the loop, and counts once"
    assert 0 < row["jax"] < lines["jax"], "two of the dialects did not run"
    assert comparison.report["operations"]["lines"] > 30


# --- The page in a browser ---

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# The last four keep Chromium from sending requests of its own.
CHROMIUM_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PHONE, DESKTOP = 390, 1200  # pixels


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


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
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
