"""The comparison as a person runs it: what is printed and left behind, which runs are taken, and slips."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.comparison import publish, report, training
from experiments.comparison.settings import CompareConfig
from experiments.comparison.theme import DARK, LIGHT, drawing
from jax_cnn.config import UserError
from jax_cnn.run import command_line
from jax_cnn.torch_layout import load_weights
from parity_tests.experiments.small_comparison import Made, compare, rendered

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
    jax_run, torch_run = copied("jax"), copied("torch")
    config = replace(made.config, jax_run=jax_run, torch_run=torch_run)
    training.check_given(config)
    initial = load_weights(made.config.initial_weights, "float32")
    (torch_run / training.PROCESS).unlink()
    runs = {each: training.obtain(each, config, initial, print, print) for each in training.FRAMEWORKS}
    assert [(run.folder, run.reused) for run in runs.values()] == [(jax_run, True), (torch_run, True)]
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
def test_a_slip_is_one_line_and_status_2(arguments: tuple[str, ...]) -> None:
    done = compare(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {' '.join(arguments)}: ")


def test_a_run_with_other_settings_is_refused(made: Made) -> None:
    config = replace(made.config, seed=1, jax_run=made.config.out_dir / "jax")
    with pytest.raises(UserError, match="its seed: 0, not 1; give a run that fits"):
        training.check_given(config)
