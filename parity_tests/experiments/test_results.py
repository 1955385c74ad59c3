"""The committed results of the studies: verdicts follow from seeds, pages quote figures, and a new seed fits."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from experiments.answers import FRAMEWORKS
from experiments.records import ENVIRONMENT, SLACK, as_json, flags, read_metrics, run_command, train
from experiments.studies import accuracy, convolution
from experiments.studies.accuracy import AccuracyConfig
from experiments.studies.convolution import ENTRIES, ConvolutionConfig, accuracies
from experiments.studies.runs import Run
from jax_cnn.config import TEST_SIZE
from jax_cnn.run.folder import METRICS
from parity_tests.support import ROOT, read_json

ACCURACY = read_json(ROOT / "docs" / "results" / "accuracy" / "accuracy.json")
CONVOLUTION = read_json(ROOT / "docs" / "results" / "convolution" / "convolution.json")
PICTURES = read_json(ROOT / "docs" / "results" / "pictures" / "pictures.json")


# --- The files ---


@pytest.mark.parametrize(("setting", "epochs", "images"), [("full", 5, None), ("short", 1, 12_800)])
def test_accuracy_is_of_todays_trainings_with_ten_complete_seeds(setting: str, epochs: int, images: int | None) -> None:
    planned = [run for run in accuracy.plan_runs(AccuracyConfig()) if run.name == setting]
    config, seeds = ACCURACY[setting]["config"], ACCURACY[setting]["seeds"]
    assert config.items() <= as_json(planned[0].config).items()
    assert (config["epochs"], config["limit_train"]) == (epochs, images)
    assert [seed["seed"] for seed in seeds] == [run.config.seed for run in planned[::2]] == list(range(10))
    for seed in seeds:
        table = seed["table"]
        assert sum(table.values()) == TEST_SIZE
        for framework, alone in zip(FRAMEWORKS, ("only_a", "only_b"), strict=True):
            assert len(seed[framework]["test_accuracy"]) == epochs
            correct = round(TEST_SIZE * seed[framework]["test_accuracy"][-1])
            assert abs(table["both"] + table[alone] - correct) <= SLACK


@pytest.mark.parametrize("setting", ["full", "short"])
def test_the_verdict_on_accuracy_follows_from_the_seeds(setting: str) -> None:
    for part, figures in accuracy.judge(ACCURACY[setting]["seeds"]).items():
        assert figures.keys() == ACCURACY[setting][part].keys()
        for name, figure in figures.items():
            assert ACCURACY[setting][part][name] == pytest.approx(figure), f"{part}: {name}"
    assert ACCURACY[setting]["equivalence"]["equivalent"]


def test_convolution_is_of_todays_networks_for_the_epochs_that_the_pace_gives() -> None:
    planned = convolution.plan_runs(ConvolutionConfig(), CONVOLUTION["pace"])
    assert CONVOLUTION["limits"] == {"train": None, "test": None}
    for entry, figures in zip(ENTRIES, CONVOLUTION["entries"], strict=True):
        assert (figures["name"], figures["network"]) == (entry.name, str(entry.network))
        assert figures["parameters"] == convolution.count_parameters(entry.network)
        for framework in FRAMEWORKS:
            runs = [run for run in planned if run[:2] == (entry.name, framework)]
            assert figures[framework]["seeds"] == [run.config.seed for run in runs]
            assert {run.config.epochs for run in runs} == {figures[framework]["epochs"]}
            assert all(len(values) == len(runs) for values in figures[framework]["shifted"].values())


def test_hardly_a_picture_misleads_however_it_was_saved() -> None:
    assert (PICTURES["images"], PICTURES["confident"]) == (1_000, 0.9)
    *saved, garments, digits = PICTURES["rows"].values()
    assert all(row["misleading"] < 0.02 for row in (*saved, garments, digits))
    assert all(row["right"] + row["warned"] >= saved[0]["right"] - 0.03 for row in saved)
    assert min(garments["warned"], digits["warned"]) >= 0.9


# --- The pages that quote them ---


def accuracy_figures() -> list[str]:
    """Return what docs/parity.md says about accuracy."""
    full = ACCURACY["full"]
    verdict, pooled = full["equivalence"], full["mcnemar"]
    spread = [full["spread"][name] for name in ("jax accuracy", "torch accuracy", "accuracy difference")]
    return [
        "| {:.2f} % | {:.2f} % | {:+.2f} points |".format(*(column["mean"] for column in spread)),
        "| {:.2f} | {:.2f} | {:.2f} |".format(*(column["deviation"] for column in spread)),
        f"{verdict['low']:.2f} to {verdict['high']:+.2f} points",
        f"(p = {verdict['p_value']:.1g})",
        f"on {pooled['only_a']:,} of 100,000 predictions, PyTorch alone on {pooled['only_b']:,} "
        f"(p = {pooled['p_value']:.2f})",
    ]


def convolution_figures() -> list[str]:
    """Return the rows of the table and the sentences of docs/convolution.md."""
    columns = convolution.accuracy_table(CONVOLUTION).columns
    rows = zip(*(column.cells for column in columns), strict=True)
    table = [f"| {' | '.join(map(str, row))} |".replace("\n  ", ", ") for row in rows]
    return [*table, *convolution.sentences(CONVOLUTION), gain()]


def picture_figures() -> list[str]:
    """Return the rows of the table about pictures in docs/robustness.md, and how good the network is."""
    rows = [
        f"| {name} | {' | '.join('–' if value is None else f'{100 * value:.1f}' for value in row.values())} |"
        for name, row in PICTURES["rows"].items()
    ]
    return [*rows, f"recognises {PICTURES['network']['test_accuracy']:.2%}".replace("%", " %")]


def gain() -> str:
    """Return what SimpleCNN gains compared with the best other network."""
    *others, cnn = [mean(accuracies(entry)) for entry in CONVOLUTION["entries"]]
    return f"{cnn - max(others):.1f} points"


@pytest.mark.parametrize(
    ("page", "figures"),
    [
        ("README.md", [f"{ACCURACY['full']['spread'][f'{name} accuracy']['mean']:.2f} %" for name in FRAMEWORKS]),
        ("README.md", [gain()]),
        ("docs/parity.md", accuracy_figures()),
        ("docs/convolution.md", convolution_figures()),
        ("docs/robustness.md", picture_figures()),
    ],
)
def test_a_page_quotes_the_figures_of_the_results(page: str, figures: Sequence[str]) -> None:
    text = re.sub(r"\s+", " ", (ROOT / page).read_text(encoding="utf-8").replace("**", ""))
    assert [figure for figure in figures if figure not in text] == []


# --- A new seed ---


def outliers(jax_run: Run, torch_run: Run) -> list[str]:
    """Return what lies outside the study's interval, each with its value and the interval. NaN lies outside."""
    pair = {"jax": accuracy.describe_run(jax_run), "torch": accuracy.describe_run(torch_run)}
    spread = ACCURACY["short"]["spread"]
    return [
        f"{name} {value:.4f} is outside {spread[name]['low']:.4f} … {spread[name]['high']:.4f}"
        for name, value in accuracy.observations(pair).items()
        if not spread[name]["low"] <= value <= spread[name]["high"]
    ]


@pytest.fixture(scope="module")
def new_pair(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Run the shortened training in both frameworks, with a seed that the study has not seen."""
    study = AccuracyConfig(seeds=11, data_dir=data_dir, out_dir=tmp_path_factory.mktemp("new_seed"))
    pair = [run for run in accuracy.plan_runs(study) if run.name == "short"][-2:]
    for run in pair:
        assert run.config.seed == len(ACCURACY["short"]["seeds"])
        train(run.framework, run.config, print)
    return pair


@pytest.mark.slow
def test_a_new_seed_lies_within_the_studys_spread(new_pair: list[Run]) -> None:
    # Bounds: prediction intervals. One sound seed in 10,000 lies outside each of them.
    assert not outliers(*new_pair)


@pytest.mark.slow
def test_a_loss_one_and_a_half_times_as_large_lies_outside(new_pair: list[Run], tmp_path: Path) -> None:
    jax_run, torch_run = new_pair
    (row,) = read_metrics(jax_run.config.out_dir)
    (tmp_path / METRICS).write_text(json.dumps(row | {"test_loss": 1.5 * row["test_loss"]}), encoding="utf-8")
    findings = outliers(jax_run._replace(config=replace(jax_run.config, out_dir=tmp_path)), torch_run)
    assert [finding.split(" 0.")[0] for finding in findings] == ["jax loss", "loss difference"]


@pytest.mark.slow
def test_a_learning_rate_ten_times_too_small_lies_outside(new_pair: list[Run], tmp_path: Path) -> None:
    # Ten times too large would not: after 200 steps it costs no more than a bad seed. The trajectory tests see that.
    jax_run, torch_run = new_pair
    faulty = jax_run._replace(config=replace(jax_run.config, out_dir=tmp_path))
    run_command("train_jax", [*flags(faulty.config), "--learning-rate", "1e-4"], print, ENVIRONMENT)
    findings = outliers(faulty, torch_run)
    assert any(finding.startswith("jax") for finding in findings), findings
    assert not any(finding.startswith("torch") for finding in findings), findings
