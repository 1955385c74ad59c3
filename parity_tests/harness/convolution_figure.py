"""What a person sees of the convolution study: a table and a figure."""

import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from jax_cnn.files import write_atomically
from parity_tests.harness.convolution import SHIFTS, Json, accuracies, spread
from parity_tests.harness.convolution_runs import FRAMEWORKS

# Okabe & Ito's palette, and a marker for each: colour-blind readers tell them apart.
STYLES = {"jax": ("JAX", "#0072B2", "o"), "torch": ("PyTorch", "#D55E00", "s")}
LINES = {
    "softmax regression": ("#009E73", "^", ":"),
    "feed-forward": ("#CC79A7", "v", "-."),
    "feed-forward, equal parameters": ("#E69F00", "D", "--"),
    "SimpleCNN": ("#000000", "o", "-"),
}


def accuracy_table(result: Json) -> Table:
    """Every entry, with both frameworks' epochs and accuracies."""
    seeds = len(result["entries"][0]["jax"]["seeds"])
    table = Table(
        title="Test accuracy in %",
        caption=f"Mean ± standard deviation over {seeds} seeds; shifted: JAX's and PyTorch's networks together",
    )
    table.add_column("network")
    for heading in ("parameters", "epochs", "JAX", "PyTorch", "1 px shift", "2 px shift"):
        table.add_column(heading, justify="right")
    for entry in result["entries"]:
        both = (
            [100 * value for value in entry["jax"]["shifted"]["0"]],
            [100 * value for value in entry["torch"]["shifted"]["0"]],
        )
        table.add_row(
            entry["name"],
            f"{entry['parameters']:,}",
            " / ".join(str(entry[framework]["epochs"]) for framework in FRAMEWORKS),
            *map(spread, both),
            *(spread(accuracies(result, entry["name"], distance)) for distance in SHIFTS[1:]),
        )
    return table


def draw(result: Json, path: Path) -> None:
    """Accuracy of every entry, and how it falls as the test images are shifted, as a PNG."""
    cnn = statistics.fmean(accuracies(result, "SimpleCNN"))
    names = [entry["name"] for entry in result["entries"]]
    best = max(statistics.fmean(accuracies(result, name)) for name in names if name != "SimpleCNN")
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_accuracies(result, left)
    draw_shifts(result, right)
    figure.suptitle(f"SimpleCNN classifies {cnn:.1f} % rightly, the best network without convolution {best:.1f} %")
    temporary = path.with_name(path.name + ".drawing")
    figure.savefig(temporary, dpi=150, format="png")
    write_atomically(path, temporary.read_bytes())
    temporary.unlink()


def draw_accuracies(result: Json, axes: Axes) -> None:
    """A row for each entry, a dot for each seed and framework."""
    entries = result["entries"]
    for place, entry in enumerate(entries):
        for framework, offset in zip(FRAMEWORKS, (-0.12, 0.12), strict=True):
            label, colour, marker = STYLES[framework]
            values = [100 * value for value in entry[framework]["shifted"]["0"]]
            axes.plot(
                values,
                [place + offset] * len(values),
                marker,
                color=colour,
                alpha=0.75,
                label=label if place == 0 else None,
            )
    labels = [
        f"{entry['name'].replace(', ', chr(10))}\n{entry['parameters']:,} parameters\n"
        f"{' / '.join(str(entry[framework]['epochs']) for framework in FRAMEWORKS)} epochs"
        for entry in entries
    ]
    axes.set_yticks(range(len(entries)), labels, fontsize="x-small")
    axes.invert_yaxis()
    axes.set(title="A dot is a network, trained from its own seed", xlabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_shifts(result: Json, axes: Axes) -> None:
    """A line for each network, with the spread over seeds and frameworks."""
    for name, (colour, marker, line) in LINES.items():
        columns = [accuracies(result, name, distance) for distance in SHIFTS]
        axes.errorbar(
            SHIFTS,
            [statistics.fmean(column) for column in columns],
            [statistics.stdev(column) for column in columns],
            color=colour,
            marker=marker,
            linestyle=line,
            capsize=3,
            label=name,
        )
    axes.set(title="Test images shifted, mean of 8 directions", xlabel="shift, pixels", ylabel="test accuracy, %")
    axes.set_xticks(SHIFTS)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
