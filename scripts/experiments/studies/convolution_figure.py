"""The picture of the convolution study."""

from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.answers import FRAMEWORKS
from experiments.records import Json
from experiments.studies.convolution import SHIFTS, accuracies, epochs_text
from jax_cnn.run.charts import BLACK, FRAMEWORK_COLOURS, FRAMEWORK_MARKERS, GREEN, ORANGE, PURPLE, save_figure

# Markers and lines differ as well as colours, so that the picture can be read in grey.
OFFSETS = {"jax": -0.12, "torch": 0.12}  # distances from the middle of a row
LINES = {
    "softmax regression": (GREEN, "^", ":"),
    "feed-forward": (PURPLE, "v", "-."),
    "feed-forward, equal parameters": (ORANGE, "D", "--"),
    "SimpleCNN": (BLACK, "o", "-"),
}


def draw(result: Json, path: Path) -> None:
    """Draw the accuracy of every network, and how it falls on shifted test images, into a PNG."""
    *others, cnn = [mean(accuracies(entry)) for entry in result["entries"]]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_accuracies(result, left)
    draw_shifts(result, right)
    figure.suptitle(
        f"SimpleCNN classifies {cnn:.1f} % correctly, the best network without convolution {max(others):.1f} %"
    )
    save_figure(figure, path)


def draw_accuracies(result: Json, axes: Axes) -> None:
    """Draw a row for each network, with a dot for each seed and framework."""
    for row, entry in enumerate(result["entries"]):
        for framework, name in FRAMEWORKS.items():
            values = accuracies(entry, frameworks=[framework])
            axes.plot(
                values,
                [row + OFFSETS[framework]] * len(values),
                FRAMEWORK_MARKERS[framework],
                color=FRAMEWORK_COLOURS[framework],
                alpha=0.75,
                label=name if row == 0 else None,
            )
    labels = [
        f"{entry['name'].replace(', ', chr(10))}\n{entry['parameters']:,} parameters\n{epochs_text(entry)} epochs"
        for entry in result["entries"]
    ]
    axes.set_yticks(range(len(labels)), labels, fontsize="x-small")
    axes.invert_yaxis()
    axes.set(title="Each dot is a network of its own seed (epochs: JAX / PyTorch)", xlabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_shifts(result: Json, axes: Axes) -> None:
    """Draw a line for each network, with the deviation over seeds and frameworks."""
    entries = {entry["name"]: entry for entry in result["entries"]}
    for name, (colour, marker, line) in LINES.items():
        columns = [accuracies(entries[name], distance) for distance in SHIFTS]
        means, deviations = [mean(column) for column in columns], [stdev(column) for column in columns]
        axes.errorbar(SHIFTS, means, deviations, color=colour, marker=marker, linestyle=line, capsize=3, label=name)
    axes.set(title="On shifted images: mean ± deviation", xlabel="shift, pixels", ylabel="test accuracy, %")
    axes.set_xticks(SHIFTS)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
