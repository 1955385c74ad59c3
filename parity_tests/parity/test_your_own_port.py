"""The harness compares any port: the example in the README, and parts of networks that SimpleCNN does not have."""

import re
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
import torch
from jax import lax
from jax import numpy as jnp
from rich.console import Console
from torch import nn

from jax_cnn.config import UserError
from jax_cnn.model import Tap
from jax_cnn.torch_layout import Leaf, conv, dense, same
from parity_report import ReportConfig, load_pair
from parity_tests.harness.capture import Refused
from parity_tests.harness.checks import first_divergence
from parity_tests.harness.pair import Pair
from parity_tests.support import ROOT, assert_slip, run_command

LONGEST_EXAMPLE = 40  # lines that declare a pair


def test_the_readmes_example_works_as_it_stands(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) < LONGEST_EXAMPLE
    (tmp_path / "my_port.py").write_text(example, encoding="utf-8")
    for fault, status, words in (("none", 0, "No divergence"), ("relu-leaky", 1, "outputs: output of relu")):
        result = run_command("parity_report", "--pair=my_port:pair", f"--fault={fault}", "--steps=3", cwd=tmp_path)
        assert words in result.stdout, result.stdout + result.stderr
        assert result.returncode == status
        assert (tmp_path / "runs/parity/drift.png").stat().st_size > 10_000
    result = run_command("parity_report", "--pair=my_port:pair", "--fault=fixed-order", cwd=tmp_path)
    assert_slip(result, "--fault fixed-order cannot be planted: my port has no data pipeline in PyTorch")


def statistics(name: str, features: int) -> dict[str, Leaf]:
    """Map batch normalisation: scale, bias and both running statistics are vectors in both frameworks."""
    names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return {f"{name}.{torch_name}": Leaf((name, last), (features,), same, same) for torch_name, last in names.items()}


def module() -> nn.Module:
    """Return a network with a strided convolution, batch normalisation, average pooling and dropout."""
    norm = nn.BatchNorm2d(6)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    layers = OrderedDict[str, nn.Module](
        conv=nn.Conv2d(1, 6, 3, stride=2, padding=1),
        norm=norm,
        relu=nn.ReLU(),
        pool=nn.AvgPool2d(8),
        drop=nn.Dropout(0.5),
        flatten=nn.Flatten(),
        out=nn.Linear(6, 10),
    )
    return nn.Sequential(layers)


def apply(tree: Any, images: jax.Array, tap: Tap) -> jax.Array:
    """Compute the same in JAX, in evaluation mode. Dropout does nothing there and has no stage."""
    layout = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(images, tree["conv"]["kernel"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout)
    x = tap("conv", x + tree["conv"]["bias"])
    norm = tree["norm"]
    x = tap("norm", (x - norm["mean"]) * lax.rsqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"])
    x = tap("pool", tap("relu", jax.nn.relu(x)).mean(axis=(1, 2), keepdims=True))
    x = tap("flatten", x.reshape(len(x), -1))
    return tap("out", x @ tree["out"]["kernel"] + tree["out"]["bias"])


@pytest.fixture
def port() -> Pair:
    """Return the pair of both."""
    layout = {**conv("conv", 1, 6), **statistics("norm", 6), **dense("out", 6, 10)}
    return Pair("port", module, apply, layout, (1, 16, 16))


def test_stride_average_pool_dropout_and_batch_normalisation_are_compared(port: Pair) -> None:
    assert first_divergence(port) is None


def test_a_wrong_eps_in_the_normalisation_is_found_there(port: Pair) -> None:
    def wrong(tree: Any, images: jax.Array, tap: Tap) -> jax.Array:
        norm = tree["norm"] | {"var": tree["norm"]["var"] + 1e-3 - 1e-5}  # Flax's default eps is 1e-5, Keras's 1e-3
        return apply(tree | {"norm": norm}, images, tap)

    divergence = first_divergence(replace(port, apply=wrong))
    assert divergence is not None
    assert (divergence.check, divergence.where) == ("outputs", "output of norm")


class Twice(nn.Module):
    """A network that uses one ReLU for two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits [batch, 10] of inputs [batch, 4]."""
        return self.relu(self.second(self.relu(self.first(x))))


def test_a_module_that_is_used_twice_is_refused_with_the_reason() -> None:
    pair = Pair("twice", Twice, lambda *_: jnp.zeros(1), {**dense("first", 4, 4), **dense("second", 4, 10)}, (4,))
    with pytest.raises(Refused, match="stage relu runs twice"):
        first_divergence(pair)


MODULES = {
    "unreadable": "def (",
    "stops": "import sys\nsys.exit(0)",
    "lacking": "import nowhere_to_be_found",
    "sound": "number = 5\ndef needy(argument): ...\ndef failing(): raise RuntimeError('no such weights')",
}


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ("nothing", "or your own as module:name"),
        (":name", "or your own as module:name"),
        (".relative:name", "or your own as module:name"),
        ("absent:name", "run from the folder that holds absent.py"),
        ("unreadable:name", "SyntaxError"),
        ("stops:name", "SystemExit"),
        ("lacking:name", "No module named 'nowhere_to_be_found' (lacking.py, line 1)"),
        ("sound:name", "AttributeError"),
        ("sound:needy", "TypeError"),
        ("sound:failing", "RuntimeError: no such weights (sound.py, line 3)"),
        ("sound:number", "is int, not a parity_tests.harness.pair.Pair"),
    ],
)
def test_a_pair_that_cannot_be_made_is_refused_with_the_reason(
    pair: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, text in MODULES.items():
        (tmp_path / f"{module}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UserError) as refusal:
        load_pair(ReportConfig(pair=pair), Console())
    assert reason in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
