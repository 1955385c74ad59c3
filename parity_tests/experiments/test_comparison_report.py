"""What the comparison page tells: the verdict, and what stands on the page beside it."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.comparison import charts, parity, programs, scores, sources, verdict
from experiments.comparison.settings import ROOT
from experiments.comparison.sources import Cut
from experiments.comparison.theme import LIGHT, drawing
from parity_tests.experiments.small_comparison import PARITY, Made, rendered
from parity_tests.harness.faults import FAULTS
from parity_tests.harness.product_pairs import feed_forward

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
