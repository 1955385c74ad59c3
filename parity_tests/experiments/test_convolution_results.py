"""The committed study of what convolution buys, held to its own numbers, and the page that tells of it."""

import json

import pytest

from experiments.studies import convolution, convolution_figure
from experiments.studies.convolution_runs import ENTRIES, FRAMEWORKS, ConvolutionConfig, epochs_of
from parity_tests.support import ROOT

RESULTS = ROOT / "docs" / "results" / "convolution" / "convolution.json"


@pytest.fixture(scope="module")
def results() -> convolution.Json:
    """The results file."""
    loaded: convolution.Json = json.loads(RESULTS.read_text())
    return loaded


def test_the_committed_study_is_whole_and_of_the_defaults(results: convolution.Json) -> None:
    assert results["limits"] == {"train": None, "test": None}
    assert "convolution_study.py" in results["provenance"]["command"]
    study = ConvolutionConfig()
    for entry, described in zip(ENTRIES, results["entries"], strict=True):
        assert (described["name"], described["network"]) == (entry.name, str(entry.network))
        assert described["parameters"] == convolution.parameters(entry.network)
        for framework in FRAMEWORKS:
            runs = described[framework]
            assert runs["epochs"] == epochs_of(entry, study, results["pace"][framework])
            assert runs["seeds"] == list(range(len(runs["seeds"])))
            assert len(runs["seeds"]) >= 2
            assert all(len(values) == len(runs["seeds"]) for values in runs["shifted"].values())


def test_the_page_says_what_the_study_found(results: convolution.Json) -> None:
    page = (ROOT / "docs" / "convolution.md").read_text()
    for line in (*convolution_figure.markdown(results), *convolution.sentences(results)):
        assert line in page, f"docs/convolution.md lacks: {line}"
