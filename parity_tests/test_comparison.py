"""The comparison page: the command as a person runs it, the page in a real browser, and what the page is made from."""

import copy
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from jax_cnn.errors import UserError
from jax_cnn.shell import command_line
from jax_cnn.weights import load_weights
from parity_tests.comparison import charts, parity, programs, publish, report, scores, sources, training, verdict
from parity_tests.comparison.settings import CompareConfig
from parity_tests.comparison.sources import Cut
from parity_tests.comparison.theme import DARK, LIGHT, drawing
from parity_tests.harness.faults import FAULTS
from parity_tests.harness.pairs import feed_forward

Json = dict[str, Any]

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "compare.py"
PARITY = ROOT / "docs" / "results" / "parity" / "report.json"
TIMEOUT = 300.0  # seconds for the small comparison, on a machine that is busy with other things
SMALL = CompareConfig(epochs=1, limit_train=3_000, limit_test=400, images=6, disagreements=6, parity_report=PARITY)
STYLING = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in STYLING}


class Made(NamedTuple):
    """A finished comparison: its configuration, what was printed, its report and its page."""

    config: CompareConfig
    output: str
    report: Json
    page: Path


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a pipe."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)


def flags(config: CompareConfig) -> list[str]:
    """The command line of a small comparison."""
    return [
        *("--epochs", str(config.epochs), "--limit-train", str(config.limit_train)),
        *("--limit-test", str(config.limit_test), "--images", str(config.images)),
        *("--disagreements", str(config.disagreements), "--parity-report", str(config.parity_report)),
        *("--data-dir", str(config.data_dir), "--out-dir", str(config.out_dir)),
    ]


def read_report(out_dir: Path) -> Json:
    """The report, from a file that any JSON reader takes: Python's own would let NaN pass."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    told: Json = json.loads((out_dir / publish.REPORT).read_text(), parse_constant=refuse)
    return told


@pytest.fixture(scope="module")
def made(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A small comparison, made once: both commands train."""
    config = replace(SMALL, data_dir=data_dir, out_dir=tmp_path_factory.mktemp("compare"))
    (config.out_dir / publish.PAGE).write_text("an earlier page")
    done = compare(*flags(config))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return Made(config, done.stdout, read_report(config.out_dir), config.out_dir / publish.PAGE)


# What the command leaves behind


def test_a_person_sees_progress_the_verdict_and_where_the_page_is(made: Made) -> None:
    """In plain lines; both commands' progress among them."""
    lines = made.output.splitlines()
    assert not re.search(r"[\x1b\r]", made.output)
    assert [line for line in lines if re.match(r"\d of \d: ", line)][:3] == [
        "1 of 6: PyTorch's initial weights, for both",
        "2 of 6: training with JAX",
        "3 of 6: training with PyTorch",
    ]
    assert lines[-2] == made.report["verdict"]["sentence"]
    assert lines[-1] == f"The page is {made.page}: open it in a browser"


def test_both_started_from_pytorchs_weights_and_trained_as_asked(made: Made) -> None:
    """By the real commands; and the report says by which, where and on what."""
    for framework, run in made.report["runs"].items():
        config = run["record"]["config"]
        assert config["init_weights"] == str(made.config.initial_weights)
        assert (config["epochs"], config["limit_train"], config["limit_test"]) == (1, 3_000, 400)
        assert run["record"]["command"].startswith(f"python scripts/train_{framework}.py ")
        assert run["peak_bytes"] > 100 * 2**20
        assert not run["reused"]
    assert made.report["versions"]["torch"]
    assert made.report["machine"]["cores"] >= 1
    assert "scripts/compare.py" in made.report["command"]


def test_every_figure_is_a_picture_for_light_and_for_dark(made: Made) -> None:
    """Wide enough to read; on the grounds of the page; not two copies of one."""
    names = [*publish.figures_of(made.report)]
    assert {path.name for path in (made.config.out_dir / publish.FIGURES).iterdir()} == {
        f"{name}{theme.suffix}.png" for name in names for theme in (LIGHT, DARK)
    }
    for name in names:
        light, dark = (
            Image.open(made.config.out_dir / publish.FIGURES / f"{name}{theme.suffix}.png").convert("RGB")
            for theme in (LIGHT, DARK)
        )
        assert light.size == dark.size
        assert light.width >= 800
        assert light.height >= 300
        for picture, theme in ((light, LIGHT), (dark, DARK)):
            colours = np.asarray(picture)
            assert f"#{colours[0, 0].tobytes().hex()}" == theme.paper
            assert colours.std() > 5, f"{name} is empty"


def test_every_chart_has_a_title_and_labelled_axes(made: Made) -> None:
    for name, drawer in publish.figures_of(made.report).items():
        with drawing(LIGHT):
            figure = drawer(made.report, LIGHT)
        assert figure.get_suptitle(), name
        xlabels = {figure.get_supxlabel(), *(axes.get_xlabel() for axes in figure.axes)}
        ylabels = {figure.get_supylabel(), *(axes.get_ylabel() for axes in figure.axes)}
        assert xlabels - {""}, name
        assert ylabels - {""}, name


def test_an_earlier_page_is_moved_aside(made: Made) -> None:
    assert (made.config.out_dir / "earlier-1" / publish.PAGE).read_text() == "an earlier page"
    assert f"{made.config.out_dir} held an earlier run: it is now in" in made.output


# The verdict


def test_the_verdict_follows_from_the_numbers(made: Made) -> None:
    """The same as long as nothing differs; each planted difference turns it, and is told."""
    assert made.report["verdict"] == verdict.judge(made.report)
    assert made.report["verdict"]["same"]
    allowed = made.report["verdict"]["accuracy_allowed"]
    jax, torch = (made.report["runs"][side]["epochs"][-1]["test_accuracy"] for side in ("jax", "torch"))
    assert allowed == pytest.approx(2 * np.sqrt((jax * (1 - jax) + torch * (1 - torch)) / 400))

    worse = copy.deepcopy(made.report)
    worse["runs"]["jax"]["epochs"][-1]["test_accuracy"] = torch - 1.2 * allowed
    assert not verdict.judge(worse)["same"]
    assert "points apart" in verdict.judge(worse)["sentence"]
    worse["runs"]["jax"]["epochs"][-1]["test_accuracy"] = float("nan")
    assert not verdict.judge(worse)["same"]


def test_a_planted_fault_makes_the_page_say_not_the_same(made: Made) -> None:
    """From the harness that finds it, by the verdict and the headings, to the curve that parts in float64 too."""
    (fault,) = (fault for fault in FAULTS if fault.name == "one-weight")
    faulty = copy.deepcopy(made.report)
    faulty["parity"] = parity.measure(fault.plant(feed_forward()), 0, 3, lambda name: None)
    faulty["verdict"] = verdict.judge(faulty)
    assert faulty["parity"]["passed"] == ["shapes"]
    assert faulty["verdict"]["sentence"].startswith("JAX and PyTorch do not train the same network: in float64 they")
    assert "fc2.weight" in faulty["verdict"]["sentence"]
    page = rendered(faulty)
    assert "<strong>Not the same.</strong>" in page
    assert "Where they differ, stage by stage" in page
    assert "In float64 they part as well" in page
    with drawing(LIGHT):
        assert charts.drift(faulty, LIGHT).get_suptitle() == "In float64 they part too"


def test_a_parity_report_with_a_fault_is_believed(made: Made, tmp_path: Path) -> None:
    told = json.loads(PARITY.read_text()) | {"first_divergence": "outputs: output of relu1: differs"}
    (tmp_path / "report.json").write_text(json.dumps(told))
    assert not verdict.judge(made.report | {"parity": parity.taken(tmp_path / "report.json")})["same"]


def rendered(told: Json) -> str:
    """The page of a report, with one and the same small figure in every place."""
    drawn = publish.Drawn("data:,", "data:,", 1, 1)
    return publish.render(json.loads(json.dumps(told, default=str)), dict.fromkeys(publish.figures_of(told), drawn))


# What the page is made from


def test_scores_of_a_small_case_by_hand() -> None:
    labels = np.array([0, 1, 1, 2])
    logits = {side: np.full((4, 10), -50.0, np.float32) for side in ("jax", "torch")}
    for side, said in (("jax", (0, 1, 2, 2)), ("torch", (0, 3, 1, 2))):
        logits[side][range(4), said] = 50
    told = scores.compare(logits, labels)
    assert (told["accuracy"]["jax"], told["accuracy"]["torch"]) == (0.75, 0.75)
    assert (told["both_right"], told["only_jax_right"], told["only_torch_right"], told["neither_right"]) == (2, 1, 1, 0)
    assert told["disagreements"] == [1, 2]
    assert told["confusion"]["jax"][1][:4] == [0, 1, 1, 0]
    assert told["classes"][1]["torch"] == {"right": 1, "accuracy": 0.5, "mistaken_for": 3, "mistaken": 1}
    assert told["classes"][5]["jax"]["accuracy"] is None
    (second,) = scores.predictions([1], logits, labels)
    assert second["torch"] == {"predicted": 3, "confidence": pytest.approx(1.0)}


def test_the_weights_give_the_accuracies_that_the_page_tells(made: Made) -> None:
    """Each framework's own evaluation while it trained, and the page's look at the saved weights."""
    for side, run in made.report["runs"].items():
        assert made.report["scores"]["accuracy"][side] == pytest.approx(run["epochs"][-1]["test_accuracy"])
        assert np.array(made.report["scores"]["confusion"][side]).sum() == 400


def test_where_they_never_disagree_the_page_says_so(made: Made) -> None:
    agreeing = copy.deepcopy(made.report) | {"disagreements": []}
    agreeing["scores"]["disagreements"] = []
    assert "Nowhere: on all" in rendered(agreeing)
    assert "Nowhere: on all" not in rendered(made.report | {"disagreements": made.report["predictions"]})


def test_what_comes_from_the_report_is_escaped(made: Made) -> None:
    """A configuration is only text, whatever it holds."""
    hostile = copy.deepcopy(made.report) | {"command": "<script>alert(1)</script>"}
    assert "<script>" not in rendered(hostile)


def test_the_programs_shown_stand_in_the_files(made: Made) -> None:
    """Line by line, in every part on both sides, and the three dialects beside PyTorch's model."""
    told = made.report["programs"]
    assert [stage["title"] for stage in told] == ["Data", "Model", "Loss", "Step", "Loop"]
    assert [program["label"] for program in told[1]["programs"]] == [
        "PyTorch",
        "JAX with Flax Linen",
        "JAX with Flax NNX",
        "JAX in plain functions",
    ]
    for stage in told:
        assert {program["side"] for program in stage["programs"]} == {"jax", "torch"}
        for program in stage["programs"]:
            assert program["lines"] > 0
            for listing in program["listings"]:
                assert listing["file"].startswith("torch_ref/" if program["side"] == "torch" else "jax_cnn/")
                lines = (ROOT / listing["file"]).read_text().splitlines()
                held = lines[listing["first_line"] - 1 : listing["last_line"]]
                assert [line.strip() for line in listing["code"].splitlines()] == [line.strip() for line in held]
    step = told[3]["programs"][0]["listings"][1]["code"].splitlines()
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


def test_lines_of_code_are_counted_without_what_is_none(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    whole, part = sources.listing(Cut(str(file), "f")), sources.listing(Cut(str(file), "X"))
    assert (whole["first_line"], whole["last_line"]) == (6, 11)
    assert sources.count_lines([whole]) == 4
    assert sources.count_lines([whole, part, part]) == 5
    with pytest.raises(LookupError, match="holds no g"):
        sources.listing(Cut(str(file), "g"))
    with pytest.raises(LookupError, match="holds no f return yield"):
        sources.listing(Cut(str(file), "f", "return", "yield"))


def test_the_headline_counts_what_ran(made: Made) -> None:
    (row,) = (row for row in made.report["headline"] if row["figure"] == "lines")
    assert {side: row[side] for side in ("jax", "torch")} == programs.total_lines(made.report["programs"])
    shown = dict.fromkeys(("jax", "torch"), 0)
    for stage in made.report["programs"]:
        for program in stage["programs"]:
            shown[program["side"]] += program["lines"]
    assert 0 < row["torch"] < shown["torch"], "the step stands in the loop as well, and counts once"
    assert 0 < row["jax"] < shown["jax"], "two of the dialects did not run"
    assert made.report["operations"]["lines"] > 30


# Finished runs


def test_a_finished_run_is_taken_and_one_that_differs_is_not(made: Made, data_dir: Path) -> None:
    """In the output folder: what differs is named, whatever it is."""
    initial = load_weights(made.config.initial_weights, "float32")
    said: list[str] = []
    for framework in training.FRAMEWORKS:
        run = training.obtain(framework, made.config, initial, said.append, said.append)
        assert run.reused
        assert run.epochs == made.report["runs"][framework]["epochs"]
        assert run.peak_bytes == made.report["runs"][framework]["peak_bytes"]
        assert said.pop() == f"{run.folder} holds this very run: it is taken"

        wanted = made.config.training(framework)
        assert training.why_not(framework, run.folder, wanted, here=True) is None
        assert training.why_not(framework, run.folder, replace(wanted, seed=1)) == "its seed: 0, not 1"
        assert training.why_not(framework, run.folder, replace(wanted, epochs=2)) == "its epochs: 1, not 2"
        other = "torch" if framework == "jax" else "jax"
        assert training.why_not(other, run.folder, wanted) == f"it is a run of {framework}"
        moved = {name: array + np.float32(1e-6) for name, array in initial.items()}
        assert training.same_start(framework, run.folder, initial)
        assert not training.same_start(framework, run.folder, moved)


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a finished run, to be damaged."""
    return lambda framework: Path(shutil.copytree(made.config.out_dir / framework, tmp_path / framework))


def test_what_is_wrong_with_a_run_is_told(made: Made, copied: Callable[[str], Path]) -> None:
    folder, wanted = copied("jax"), made.config.training("jax")
    record = json.loads((folder / "config.json").read_text())

    def with_record(**changes: object) -> str | None:
        (folder / "config.json").write_text(json.dumps(record | changes))
        return training.why_not("jax", folder, wanted, here=True)

    assert with_record() is None
    assert with_record(versions=record["versions"] | {"jax": "0.1"}) == (
        "it was made on another machine or with other versions"
    )
    assert with_record(config=record["config"] | {"batch_size": 32}) == "its batch size: 32, not 64"
    assert with_record(config=record["config"] | {"seeds": 3}) == "it is one of 3 networks trained at once"
    assert with_record(started="long ago") is None
    assert training.read_run("jax", folder, reused=True).peak_bytes is None, "that was measured of another run"
    (folder / "metrics.jsonl").write_text("")
    assert training.why_not("jax", folder, wanted) == "it is not finished (0 of 1 epochs)"
    assert str(training.why_not("jax", folder / "nowhere", wanted)).startswith("no run is there (")
    (folder / "config.json").write_text(json.dumps(record | {"config": record["config"] | {"init_weights": None}}))
    assert not training.same_start("jax", folder, {})


def test_runs_that_the_command_line_names_are_taken(made: Made, copied: Callable[[str], Path]) -> None:
    """No memory is told of what was not measured, and weights of another epoch do not pass for these."""
    config = replace(made.config, jax_run=copied("jax"), torch_run=copied("torch"))
    training.check_given(config)
    initial = load_weights(made.config.initial_weights, "float32")
    (config.torch_run / training.PROCESS).unlink()  # type: ignore[operator]
    runs = {each: training.obtain(each, config, initial, print, print) for each in training.FRAMEWORKS}
    assert [(run.folder, run.reused) for run in runs.values()] == [(config.jax_run, True), (config.torch_run, True)]
    assert runs["torch"].peak_bytes is None
    told = copy.deepcopy(made.report)
    told["runs"] = {each: run.as_json() for each, run in runs.items()}
    told["headline"] = report.headline(told)
    assert "not measured" not in rendered(made.report)
    assert rendered(told).count("not measured") == 1

    looked = report.look(config, runs)
    for key in ("scores", "predictions", "disagreements", "pictures"):
        assert looked[key] == made.report[key], key
    shutil.copy(made.config.initial_weights, runs["jax"].weights)
    with pytest.raises(UserError, match=r"jax: its weights score \d+\.\d\d%, and its metrics say"):
        report.look(config, runs)
    with pytest.raises(UserError, match="it did not start from PyTorch's weights of seed 0, or that cannot be told"):
        training.obtain("jax", config, {name: array + 1 for name, array in initial.items()}, print, print)


SLIPS: dict[str, tuple[tuple[str, ...], str]] = {
    "a run that is none": (("--jax-run", "nowhere"), "--jax-run nowhere: no run is there (No such file or directory)"),
    "too many epochs": (("--epochs", "0"), "--epochs must be between 1 and 10,000, not 0"),
    "no pictures": (("--images", "0"), "--images must be between 1 and 200, not 0"),
    "both ways": (("--retrain", "--jax-run", "x"), "--retrain trains both and --jax-run or --torch-run takes"),
    "two benchmarks": (("--run-benchmark", "--benchmark", "x"), "--run-benchmark measures anew and --benchmark FILE"),
    "an unknown flag": (("--epoch", "1"), "Unrecognized options: --epoch"),
    "no such benchmark": (("--benchmark", "nowhere"), "--benchmark nowhere: No such file or directory; give"),
    "no such parity report": (("--parity-report", "nowhere"), "--parity-report nowhere: No such file or directory"),
    "no parity report": (("--parity-report", "other.json"), "--parity-report other.json: not a parity report with"),
}


@pytest.mark.parametrize(("arguments", "message"), SLIPS.values(), ids=SLIPS)
def test_a_slip_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError) as slip:
        training.check_given(command_line.parse(CompareConfig(), "", arguments))
    assert str(slip.value).startswith(message)
    assert str(slip.value).isprintable()


@pytest.mark.parametrize("arguments", [("--out-dir", "/dev/null/x"), ("--jax-run", "nowhere")])
def test_a_slip_is_one_line_and_status_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {' '.join(arguments)}: ")


def test_a_run_with_other_settings_is_refused(made: Made) -> None:
    config = replace(made.config, seed=1, jax_run=made.config.out_dir / "jax")
    with pytest.raises(UserError, match="its seed: 0, not 1; give a run that fits"):
        training.check_given(config)


# In a browser

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# The last four keep it from asking the network anything by itself.
CHROMIUM_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PHONE, DESKTOP = 390, 1200

in_a_browser = pytest.mark.browser


def find_chromium() -> str:
    """The system's Chromium; without one the test fails in CI, and is skipped elsewhere."""
    for name in CHROMIUM:
        if path := shutil.which(name):
            return path
    reason = "no Chromium is there to open the page in: apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def test_without_chromium_ci_fails_and_others_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no Chromium is there"):
        find_chromium()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no Chromium is there"):
        find_chromium()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A running Chromium."""
    path = find_chromium()
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=list(CHROMIUM_FLAGS))
        yield running
        running.close()


def opened(browser: Browser, file: Path, width: int = DESKTOP, scheme: Any = "light") -> tuple[Page, list[str]]:
    """The page on a screen of that width, and what it did that it should not."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url[:80]}"))
    page.on("request", lambda request: None if own(request.url, file) else wrong.append(f"request: {request.url[:80]}"))
    page.goto(file.as_uri())
    missing = page.evaluate("[...document.images].filter(image => !image.naturalWidth).map(image => image.alt)")
    wrong += [f"no image: {alt}" for alt in missing]
    if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
        wrong.append("it scrolls sideways")
    return page, wrong


def own(url: str, file: Path) -> bool:
    """Whether an address is the page itself, or holds what it names."""
    return url.startswith("data:") or url.partition("#")[0] == file.as_uri()


@in_a_browser
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_errors_requests_missing_images_or_scrolling_sideways(
    made: Made, browser: Browser, tmp_path: Path, width: int, scheme: str
) -> None:
    """On a phone and on a desktop, light and dark. The screenshot is of the whole page, and something is on it."""
    page, wrong = opened(browser, made.page, width, scheme)
    assert wrong == []
    assert page.locator("img").count() > 2 * made.config.images
    screenshot = tmp_path / f"page-{width}-{scheme}.png"
    page.screenshot(path=screenshot, full_page=True)
    picture = Image.open(screenshot).convert("L")
    assert picture.width == width
    assert picture.height > 5_000
    assert np.asarray(picture).std() > 20
    page.close()


PLANTED = {
    "an error on the console": '<script>console.error("planted")</script>',
    "an error in a script": "<script>nowhere()</script>",
    "a file beside the page": '<img src="nowhere.png" alt="planted">',
    "something from the network": '<img src="http://127.0.0.1:9/x.png" alt="planted">',
    "a broken image": '<img src="data:image/png;base64,AAAA" alt="planted">',
    "something too wide": '<div style="width: 5000px">planted</div>',
}


@in_a_browser
@pytest.mark.parametrize("fault", PLANTED.values(), ids=PLANTED)
def test_what_would_be_wrong_with_the_page_is_seen(browser: Browser, tmp_path: Path, fault: str) -> None:
    file = tmp_path / "page.html"
    for body, complaint in (("<p>nothing</p>", False), (fault, True)):
        file.write_text(f"<!DOCTYPE html><link rel=icon href='data:,'><body>{body}</body>")
        page, wrong = opened(browser, file)
        assert bool(wrong) == complaint, wrong
        page.close()


ROWS = """id => [...document.querySelectorAll(`#${id} tbody tr`)].map(
    row => [...row.querySelectorAll("data")].map(cell => [cell.value, cell.textContent]))"""


def expected_tables(told: Json) -> dict[str, list[list[float]]]:
    """The numbers that each table has to show, row by row, without the differences of the headline."""
    runs, sides = told["runs"], ("jax", "torch")
    keys = ("train_loss", "test_loss", "test_accuracy")
    epochs = zip(*(runs[side]["epochs"] for side in sides), strict=True)
    errors = ("local_error", "inherited_error", "gradient_error", "torch_float32_error", "jax_float32_error")
    return {
        "headline": [[row["jax"], row["torch"]] for row in told["headline"]],
        "epochs": [[one[key] for key in keys for one in pair] for pair in epochs],
        "stages": [[row[error] for error in errors] for row in told["parity"]["stages"]],
        "speeds": [
            [
                *(row["ms_per_step"][name] for name in ("median", "low_quartile", "high_quartile")),
                *(row[name]["median"] for name in ("images_per_second", "speed_to_best_torch", "times_floor")),
                row["peak_bytes"],
            ]
            for row in told["speed"]["rows"]
        ],
        "by-class": [[row["images"], *(row[side]["accuracy"] for side in sides)] for row in told["scores"]["classes"]],
        "inside": [[row[name] for name in ("largest", "median", "furthest")] for row in told["inside"]["stages"]],
    }


@in_a_browser
def test_the_tables_carry_the_numbers_of_the_report(made: Made, browser: Browser) -> None:
    """Exactly in each cell's value, and rounded in what the reader sees."""
    page, _ = opened(browser, made.page)
    tables = expected_tables(made.report)
    assert sorted(tables) == sorted(page.evaluate("[...document.querySelectorAll('table')].map(table => table.id)"))
    for name, expected in tables.items():
        rows = page.evaluate(ROWS, name)
        assert len(rows) == len(expected) > 0
        for cells, numbers in zip(rows, expected, strict=True):
            shown = cells[: len(numbers)]
            assert [float(value) for value, _ in shown] == numbers, name
            assert all(says(text, number) for (_, text), number in zip(shown, numbers, strict=True)), (name, shown)
            for value, text in cells[len(numbers) :]:
                assert float(value) == pytest.approx(numbers[0] - numbers[1])
                assert says(text, float(value)), (name, text)
    accuracy = made.report["headline"][0]
    first = page.locator("#headline tbody tr").first.inner_text().split("\t")
    assert first[1:3] == [f"{100 * accuracy[side]:.2f} %" for side in ("jax", "torch")]
    assert made.report["verdict"]["sentence"] in page.locator("#verdict").inner_text()
    page.close()


def says(text: str, number: float) -> bool:
    """Whether a text is the number rounded, in percent or in MiB where that is its unit."""
    plain = text.replace("−", "-").replace(",", "").replace("%", "").strip()
    digits, _, power = plain.partition("e")
    places = len(digits.partition(".")[2])
    unit = 10.0 ** int(power or 0)
    scales = (1, 100, 2**-20)
    return any(abs(number * scale - float(plain)) <= 0.5001 * unit * 10.0**-places for scale in scales)


def test_a_wrong_text_is_seen() -> None:
    for text, number in (("91.84 %", 0.9184), ("−0.0021", -0.00214), ("1,091", 1144000512), ("3.2e−15", 3.2e-15)):
        assert says(text, number)
        assert not says(text, 1.1 * number)
        assert not says(text, -number)


@in_a_browser
def test_the_predictions_shown_are_the_reports(made: Made, browser: Browser) -> None:
    page, _ = opened(browser, made.page)
    for key in ("predictions", "disagreements"):
        cards = page.locator(f"#{key} .cards li").all()
        assert len(cards) == len(made.report[key])
        for card, row in zip(cards, made.report[key], strict=True):
            assert f"no. {row['image']}" in card.inner_text()
            for side, said in zip(("jax", "torch"), card.locator(".said").all(), strict=True):
                assert float(said.locator("data").get_attribute("value") or "") == row[side]["confidence"]
                assert made.report["classes"][row[side]["predicted"]] in said.inner_text()
                assert ("(wrong)" in (said.text_content() or "")) == (row[side]["predicted"] != row["label"])
    page.close()


COLOURS = """() => ["body", ".note", "th.jax", "th.torch", "#verdict strong", ".said.jax", ".said.torch", ".quiet",
    ...["k", "sd", "c1", "mi", "nf"].map(name => `code .${name}`)].map(selector => {
        const one = document.querySelector(selector);
        let behind = one;
        while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        return [selector, getComputedStyle(one).color, getComputedStyle(behind).backgroundColor];
    })"""


@in_a_browser
def test_dark_is_dark_and_everything_can_be_read_in_both(made: Made, browser: Browser) -> None:
    """Other colours and other figures; text has the contrast of 4.5 that WCAG 2 (AA) asks for."""
    grounds, pictures = {}, {}
    for scheme in ("light", "dark"):
        page, _ = opened(browser, made.page, scheme=scheme)
        colours = page.evaluate(COLOURS)
        for selector, ink, ground in colours:
            assert contrast(ink, ground) >= 4.5, f"{selector} is hard to read in {scheme}: {ink} on {ground}"
        grounds[scheme] = luminance(colours[0][2])
        pictures[scheme] = page.evaluate("[...document.querySelectorAll('.plot img')].map(image => image.currentSrc)")
        page.close()
    assert grounds["dark"] < 0.05 < 0.9 < grounds["light"]
    assert len(pictures["light"]) == len(set(pictures["light"] + pictures["dark"])) / 2 > 10


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(…)`, as WCAG 2 defines it."""
    channels = np.array([int(number) for number in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def contrast(one: str, other: str) -> float:
    """Between two colours, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@in_a_browser
def test_it_can_be_heard_followed_and_printed(made: Made, browser: Browser, tmp_path: Path) -> None:
    """Every image has words, every link leads somewhere, headings go down by one, and there is no script."""
    page, _ = opened(browser, made.page)
    assert page.evaluate("[...document.images].every(image => image.alt.length > 5)")
    assert page.evaluate("[...document.links].every(link => document.getElementById(link.hash.slice(1)))")
    assert page.locator("nav a").count() == page.locator("main > section").count()
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(each => Number(each.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    assert page.locator("script").count() == 0
    page.pdf(path=tmp_path / "page.pdf", prefer_css_page_size=True)
    assert (tmp_path / "page.pdf").stat().st_size > 100_000
    page.close()
