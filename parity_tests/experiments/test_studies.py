"""The studies: which runs they plan and reuse, what they make of them, their statistics, and their committed results.

Random networks stand in for trained ones. The statistics are compared with published and hand-computed values.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

from experiments import records
from experiments.answers import FRAMEWORKS, compute_logits
from experiments.records import ENVIRONMENT, SLACK, as_json, explain_mismatch, flags, read_metrics, train
from experiments.studies import accuracy, convolution
from experiments.studies.accuracy import (
    AccuracyConfig,
    count_correct,
    describe_spread,
    equivalence,
    mcnemar_p_value,
)
from experiments.studies.convolution import ENTRIES, ConvolutionConfig, accuracies
from experiments.studies.runs import Run, StudyConfig, is_finished, mark_answers
from jax_cnn.config import CNN, TEST_SIZE, JaxTrainConfig, Network, UserError
from jax_cnn.data import FashionMNIST
from jax_cnn.run.folder import CONFIG, METRICS, WEIGHTS, RunFolder
from jax_cnn.run.provenance import provenance
from jax_cnn.torch_layout import layout_of
from parity_tests.support import ROOT, read_json, run_command

SMALL: dict[str, Any] = {"seeds": 2, "epochs": 2, "limit_train": 64, "limit_test": 60}


def pretend_to_train(run: Run, data: FashionMNIST) -> None:
    """Write the files of a finished run of a random network with its true accuracy."""
    config = run.config
    rng = np.random.default_rng((config.seed, run.framework == "jax", len(run.name)))
    layout = layout_of(config.network)
    weights = {name: rng.normal(0, 0.1, leaf.shape).astype(np.float32) for name, leaf in layout.items()}
    pixels, labels = data.test_images[: config.limit_test], data.test_labels[: config.limit_test]
    correct = compute_logits(run.framework, weights, pixels).argmax(axis=1) == labels
    losses = {"train_loss": 2.3, "test_loss": 2.3 + rng.normal(0, 0.01)}
    row = {"test_accuracy": correct.mean(), "train_seconds": 1.0, "compile_seconds": 1.0} | losses
    recorded = JaxTrainConfig(**vars(config)) if run.framework == "jax" else config
    with RunFolder(config.out_dir, print) as folder:
        folder.write_config(recorded, {"framework": run.framework, "device": "cpu (cpu)"} | provenance(("numpy",)))
        folder.write_weights(weights)
        folder.write_metrics([row] * config.epochs)


@pytest.fixture
def small_accuracy(data_dir: Path, tmp_path: Path) -> AccuracyConfig:
    """Return an accuracy study of two seeds on a few images."""
    return AccuracyConfig(**SMALL, data_dir=data_dir, out_dir=tmp_path, short_train=32)


@pytest.fixture
def run(small_accuracy: AccuracyConfig, data: FashionMNIST) -> Run:
    """Return one finished run of this study."""
    run = accuracy.plan_runs(small_accuracy)[2]
    assert (run.name, run.framework) == ("full", "jax")
    pretend_to_train(run, data)
    assert is_finished(run)
    return run


# --- Plans ---


def test_the_runs_of_a_seed_differ_by_framework_and_folder_only() -> None:
    planned = accuracy.plan_runs(AccuracyConfig(seeds=3))
    assert len({run.config.out_dir for run in planned}) == len(planned) == 12
    for jax_run, torch_run in zip(planned[::2], planned[1::2], strict=True):
        assert (jax_run.framework, torch_run.framework) == tuple(FRAMEWORKS)
        assert replace(jax_run.config, out_dir=Path()) == replace(torch_run.config, out_dir=Path())


def test_no_other_width_has_a_number_of_parameters_nearer_below_the_cnns() -> None:
    hidden = convolution.SAME_PARAMETERS
    counts = [convolution.count_parameters(Network("mlp", units)) for units in (hidden, hidden + 1)]
    assert counts[0] < convolution.count_parameters(CNN) == 1_630_090 < counts[1]


def test_a_faster_network_gets_more_epochs_for_equal_time() -> None:
    pace = {framework: {"linear": 1.0, "mlp": 2.0, "cnn": 3.1} for framework in FRAMEWORKS}
    epochs = {run.name: run.config.epochs for run in convolution.plan_runs(ConvolutionConfig(epochs=2), pace)}
    assert epochs.pop("softmax regression, equal time") == round(2 * 3.1)
    assert epochs.pop("feed-forward, equal time") == round(2 * 3.1 / 2)
    assert set(epochs.values()) == {2}


# --- Which runs are reused ---


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 9}, "its seed: 0, not 9"),
        ({"epochs": 3}, "its epochs: 2, not 3"),
        ({"batch_size": 32}, "its batch size: 64, not 32"),
        ({"out_dir": Path("nowhere")}, None),
        ({"checkpoint_seconds": 9.0}, None),
    ],
)
def test_a_run_of_another_configuration_is_not_reused(run: Run, change: dict[str, Any], reason: str | None) -> None:
    assert explain_mismatch(run.config.out_dir, run.framework, replace(run.config, **change)) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"framework": "torch"}, "it is a run of torch"),
        ({"versions": {"numpy": "1.0"}}, "it was made on another machine or with other versions"),
        ({"machine": {"cpu": "an abacus"}}, "it was made on another machine or with other versions"),
        ({"config": {"dialect": "plain"}}, "its dialect: plain, not linen"),
        ({"config": None}, "no run is there"),
    ],
)
def test_a_run_with_another_record_is_not_reused(run: Run, change: dict[str, Any], reason: str) -> None:
    path = run.config.out_dir / CONFIG
    record = read_json(path)
    if change.get("config"):
        change = {"config": record["config"] | change["config"]}
    path.write_text(json.dumps(record | change), encoding="utf-8")
    assert str(explain_mismatch(run.config.out_dir, "jax", run.config)).startswith(reason)


def test_a_run_cut_short_is_not_reused(run: Run) -> None:
    metrics = run.config.out_dir / METRICS
    text = metrics.read_text(encoding="utf-8")
    metrics.write_text(text.splitlines(keepends=True)[0], encoding="utf-8")
    assert explain_mismatch(run.config.out_dir, "jax", run.config) == "it is not finished (1 of 2 epochs)"
    metrics.write_text(text, encoding="utf-8")
    (run.config.out_dir / WEIGHTS).unlink()
    assert explain_mismatch(run.config.out_dir, "jax", run.config) == "it is not finished (2 of 2 epochs)"


# --- Scores ---


def test_weights_that_contradict_the_metrics_are_an_error(run: Run) -> None:
    rows = read_metrics(run.config.out_dir)
    rows[-1]["test_accuracy"] += 2.6 / 60  # of an image fewer would be rounding
    (run.config.out_dir / METRICS).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(UserError, match="delete the folder and train again"):
        mark_answers(run)


def test_both_frameworks_score_the_same_weights_equally(run: Run) -> None:
    for rows, columns in ((0, 0), (1, -2)):
        jax_marks, torch_marks = (mark_answers(run._replace(framework=name), rows, columns) for name in FRAMEWORKS)
        np.testing.assert_array_equal(jax_marks, torch_marks)


# --- The command ---


def complete(name: str, study: StudyConfig, planned: Sequence[Run], data: FashionMNIST) -> tuple[int, str]:
    """Check that the command trains the last run when only that is missing; return its status and output."""
    for run in planned:
        pretend_to_train(run, data)
    (planned[-1].config.out_dir / WEIGHTS).unlink()  # as if the study had been stopped before the end of this run
    before = [(run.config.out_dir / METRICS).stat().st_mtime_ns for run in planned]
    values = {f"--{field.replace('_', '-')}": value for field, value in asdict(study).items()}
    flags = [word for flag, value in values.items() for word in (flag, value)]
    done = run_command("study", name, *flags, cwd=study.out_dir)
    assert done.stderr == ""
    after = [(run.config.out_dir / METRICS).stat().st_mtime_ns for run in planned]
    assert [run for run, *times in zip(planned, before, after, strict=True) if times[0] != times[1]] == [planned[-1]]
    assert all(map(is_finished, planned))
    return done.returncode, done.stdout


@pytest.mark.slow
def test_an_interrupted_accuracy_study_goes_on_where_it_stopped(
    small_accuracy: AccuracyConfig, data: FashionMNIST, tmp_path: Path
) -> None:
    study = replace(small_accuracy, results=tmp_path / "elsewhere" / "accuracy.json")
    status, output = complete("accuracy", study, accuracy.plan_runs(study), data)
    assert status == 1  # all is done, and random networks are not equivalent
    assert "8 runs: 7 are there, 1 to do" in output
    result = read_json(tmp_path / "elsewhere" / "accuracy.json")
    assert "study.py accuracy" in result["provenance"]["command"]
    assert accuracy.sentence(result) in output
    assert accuracy.sentence(result).startswith("NOT shown to be equivalent")
    for setting in ("short", "full"):
        assert f"{setting} training" in output
        assert [sum(seed["table"].values()) for seed in result[setting]["seeds"]] == [60, 60]


@pytest.mark.slow
def test_an_interrupted_convolution_study_goes_on_where_it_stopped(
    data_dir: Path, data: FashionMNIST, tmp_path: Path
) -> None:
    study = ConvolutionConfig(**SMALL, data_dir=data_dir, out_dir=tmp_path, pace_train=32)
    timed = convolution.plan_pace_runs(study)
    for run in timed:
        pretend_to_train(run, data)
    planned = convolution.plan_runs(study, convolution.read_pace(study, timed))
    status, output = complete("convolution", study, planned, data)
    assert status == 0
    assert "6 runs: 6 are there, 0 to do" in output
    assert "jax, an epoch: linear 2.00 s, mlp 2.00 s, cnn 2.00 s" in output
    assert "24 runs: 23 are there, 1 to do" in output
    result = read_json(tmp_path / "convolution.json")
    assert [entry["name"] for entry in result["entries"]] == [entry.name for entry in convolution.ENTRIES]
    figures = [str(cell) for column in convolution.accuracy_table(result).columns[1:] for cell in column.cells]
    for text in (*figures, *convolution.sentences(result)):
        assert text in output
    assert (tmp_path / "convolution.png").stat().st_size > 20_000


def test_a_failed_training_says_which_and_why(run: Run) -> None:
    with pytest.raises(UserError, match=r"train_jax\.py .*status 2: error: weights file nowhere"):
        train(run.framework, replace(run.config, init_weights=Path("nowhere")), print)


# --- Statistics ---


SPREAD = np.array([-0.31, 0.12, 0.25, -0.08, 0.02, -0.17, 0.29, -0.22, 0.14, -0.04])  # points, ten seeds of equals


def test_tost_gives_the_value_that_pingouin_publishes() -> None:
    # pingouin-stats.org/generated/pingouin.tost.html, example 2: bound 0.5, 5 degrees of freedom, p = 0.954854
    differences = np.array([4.0, 7, 8, 6, 3, 2]) - np.array([6.0, 8, 7, 10, 11, 9])
    assert equivalence(differences, 0.5)["p_value"] == pytest.approx(0.954854, abs=1e-6)


@pytest.mark.parametrize(
    ("differences", "equivalent"),
    [
        (SPREAD, True),
        (SPREAD + 1, False),
        (SPREAD - 1, False),
        (SPREAD + 0.5, False),
        (SPREAD[:2], False),
        (5 * SPREAD, False),
    ],
    ids=["equals", "a point better", "a point worse", "the margin", "two seeds", "noisy"],
)
def test_tost_accepts_only_a_small_mean_of_enough_quiet_differences(differences: np.ndarray, equivalent: bool) -> None:
    assert equivalence(differences, 0.5)["equivalent"] is equivalent
    smallest = equivalence(differences, 0.5)["smallest_margin"]
    assert equivalence(differences, smallest * 1.0001)["equivalent"]
    assert not equivalence(differences, smallest * 0.9999)["equivalent"]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ([], "two or more finite"),
        ([0.1], "two or more finite"),
        ([0.1, math.nan, 0.2], "two or more finite"),
        ([0.1, 0.2, -math.inf], "two or more finite"),
        ([0.0, 0.0, 0.0], "compared with itself"),
        ([0.3, 0.1 + 0.2, 0.3], "compared with itself"),
    ],
)
def test_values_that_allow_no_test_are_errors(values: list[Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        equivalence(np.array(values, float), 0.5)
    with pytest.raises(ValueError, match=complaint):
        describe_spread(np.array(values, float))


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"),
    [
        (2, 9, 2 * (1 + 11 + 55) / 2**11),  # by hand; Fay's vignette exactMcNemar of R's exact2x2 prints 0.06543
        (12, 5, 0.1435),  # stat-tools.xyz/mcnemar?b=12&c=5
        (1, 9, 22 / 1024),  # by hand
        (7, 7, 1.0),
    ],
)
def test_mcnemars_exact_p_value(only_a: int, only_b: int, p_value: float) -> None:
    assert mcnemar_p_value(only_a, only_b) == pytest.approx(p_value, abs=5e-5)
    assert mcnemar_p_value(only_b, only_a) == pytest.approx(p_value, abs=5e-5)


def test_a_classifier_compared_with_itself_is_an_error() -> None:
    with pytest.raises(ValueError, match="compared with itself"):
        mcnemar_p_value(0, 0)


def test_items_are_counted_by_who_is_right() -> None:
    a = np.array([True, True, True, False, False, False, True, True])
    b = np.array([True, False, False, True, False, False, True, True])
    assert count_correct(a, b) == {"both": 3, "only_a": 2, "only_b": 1, "neither": 2}


def test_a_prediction_interval_by_hand() -> None:
    # One degree of freedom: the upper quartile of Student's t is tan(pi / 4) = 1, so 1 ± sqrt(2) sqrt(1 + 1/2).
    spread = describe_spread(np.array([0.0, 2.0]), 0.5)
    assert (spread["low"], spread["high"]) == pytest.approx((1 - math.sqrt(3), 1 + math.sqrt(3)))


# --- The committed results: verdicts follow from seeds, pages quote figures, and a new seed fits ---


ACCURACY = read_json(ROOT / "docs" / "results" / "accuracy" / "accuracy.json")
CONVOLUTION = read_json(ROOT / "docs" / "results" / "convolution" / "convolution.json")
PICTURES = read_json(ROOT / "docs" / "results" / "pictures" / "pictures.json")


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
    records.run_command("train_jax", [*flags(faulty.config), "--learning-rate", "1e-4"], print, ENVIRONMENT)
    findings = outliers(faulty, torch_run)
    assert any(finding.startswith("jax") for finding in findings), findings
    assert not any(finding.startswith("torch") for finding in findings), findings
