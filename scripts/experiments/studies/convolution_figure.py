"""What a person sees of the convolution study: a table and a figure."""

import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table

from experiments.studies.convolution import SHIFTS, Json, accuracies, spread
from experiments.studies.convolution_runs import FRAMEWORKS
from jax_cnn.files import write_atomically

# Okabe & Ito's palette, and a marker for each: colour-blind readers tell them apart.
STYLES = {"jax": ("JAX", "#0072B2", "o"), "torch": ("PyTorch", "#D55E00", "s")}
LINES = {
    "softmax regression": ("#009E73", "^", ":"),
    "feed-forward": ("#CC79A7", "v", "-."),
    "feed-forward, equal parameters": ("#E69F00", "D", "--"),
    "SimpleCNN": ("#000000", "o", "-"),
}


HEADINGS = ("network", "parameters", "epochs", "JAX", "PyTorch", "by 1 px", "by 2 px")


def rows(result: Json) -> list[tuple[str, ...]]:
    """Every entry under HEADINGS: epochs (JAX / PyTorch), accuracies of each, and those of both on shifted images."""
    return [
        (
            entry["name"],
            f"{entry['parameters']:,}",
            epochs(entry),
            *(spread([100 * value for value in entry[framework]["shifted"]["0"]]) for framework in FRAMEWORKS),
            *(f"{statistics.fmean(accuracies(result, entry['name'], distance)):.1f}" for distance in SHIFTS[1:]),
        )
        for entry in result["entries"]
    ]


def epochs(entry: Json) -> str:
    """How many, of JAX / of PyTorch where they differ."""
    return " / ".join(dict.fromkeys(str(entry[framework]["epochs"]) for framework in FRAMEWORKS))


def accuracy_table(result: Json) -> Table:
    """The rows for a terminal of 80 columns."""
    seeds = len(result["entries"][0]["jax"]["seeds"])
    caption = f"Test accuracy in %: mean ± standard deviation over {seeds} seeds; of both, on shifted images"
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), caption=caption)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "network" else "right", no_wrap=True)
    for name, *figures in rows(result):
        table.add_row(name.replace(", ", ",\n  "), *figures)
    return table


def markdown(result: Json) -> list[str]:
    """The same for a page."""
    body = rows(result)
    return [f"| {' | '.join(cells)} |" for cells in (HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *body)]


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
        f"{entry['name'].replace(', ', chr(10))}\n{entry['parameters']:,} parameters\n{epochs(entry)} epochs"
        for entry in entries
    ]
    axes.set_yticks(range(len(entries)), labels, fontsize="x-small")
    axes.invert_yaxis()
    axes.set(title="Each dot is a network of its own seed (epochs: JAX / PyTorch)", xlabel="test accuracy, %")
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
    axes.set(title="On shifted images: mean ± deviation", xlabel="shift, pixels", ylabel="test accuracy, %")
    axes.set_xticks(SHIFTS)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
