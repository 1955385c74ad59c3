"""The pictures study: what predict.py says of test images as people save them, of several in one, and of digits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from experiments.answers import Framework, compute_logits, softmax
from experiments.records import PACKAGES, Json, read_metrics, read_record
from experiments.studies.runs import write_results
from jax_cnn.config import TEST_SIZE, FolderConfig, UserError, check_limits
from jax_cnn.data import load_fashion_mnist
from jax_cnn.pictures.likeness import find_oddities
from jax_cnn.pictures.prepare import Prepared, prepare_picture
from jax_cnn.pictures.read import decode_picture
from jax_cnn.run.display import ProgressBar
from jax_cnn.run.folder import WEIGHTS
from jax_cnn.run.provenance import provenance
from jax_cnn.torch_layout import TorchDict, load_weights

CONFIDENT = 0.9  # a wrong answer with more confidence and without a warning misleads


@dataclass(frozen=True)
class PicturesConfig(FolderConfig):
    """Measure what predict.py says of test images that are saved as a figure, as a screenshot or otherwise.

    The last two rows are pictures for which a warning is the only right answer.
    """

    run: Path = Path("runs/jax")
    """The finished run whose network answers."""
    images: int = 1_000
    """The number of pictures in each row of the table."""
    out_dir: Path = Path("runs/pictures")

    def __post_init__(self) -> None:
        check_limits(self, {"images": (1, TEST_SIZE)})


def run_study(study: PicturesConfig, console: Console) -> None:
    """Save the pictures, ask the network about each, write and show the figures."""
    network = describe_network(study.run)
    weights = load_weights(study.run / WEIGHTS, "float32")
    data = load_fashion_mnist(study.data_dir)
    images, labels = data.test_images[: study.images], data.test_labels[: study.images]
    rows: dict[str, Json] = {}
    with ProgressBar(console) as progress:
        makers = list_makers(images)
        for number, (name, make) in enumerate(makers.items()):
            progress.begin(name, number, len(makers))
            pictures = []
            for index in range(len(images)):
                pictures.append(prepare_picture(decode_picture(make(index))))
                progress.report(f"{index + 1:,} of {len(images):,}")
            nothing = name in ("several garments", "drawn digits")  # is a right answer
            rows[name] = judge(network["framework"], weights, pictures, None if nothing else labels)
    result = provenance((*PACKAGES, "scipy", "matplotlib", "pillow")) | {"network": network, "images": study.images}
    write_results(result | {"confident": CONFIDENT, "rows": rows}, study.out_dir / "pictures.json", "--out-dir")
    console.print(result_table(rows))
    console.print(f"Results are in {study.out_dir}: pictures.json", highlight=False, soft_wrap=True)


def describe_network(folder: Path) -> Json:
    """Return which network a run has trained.

    Raises:
        UserError: there is no finished run in the folder.
    """
    try:
        record, epochs = read_record(folder), read_metrics(folder)
        network = {"framework": record["framework"], "epochs": len(epochs), "seed": record["config"]["seed"]}
        return network | {"test_accuracy": epochs[-1]["test_accuracy"], "trained": record["started"]}
    except (OSError, ValueError, LookupError):
        raise UserError(f"--run {folder}: no finished run is there; train first, or give the folder of a run") from None


def list_makers(images: np.ndarray) -> dict[str, Callable[[int], Image.Image]]:
    """Return the rows of the table: a name, and a function that makes the picture of a number."""
    from experiments.studies import saved_pictures  # only now: no slip should wait for matplotlib

    def of_test_image(save: saved_pictures.Saver) -> Callable[[int], Image.Image]:
        return lambda index: save(images[index])

    makers = {name: of_test_image(save) for name, save in saved_pictures.make_savers().items()}
    makers["several garments"] = lambda seed: saved_pictures.place_several(images, seed)
    makers["drawn digits"] = saved_pictures.draw_digit
    return makers


def judge(framework: Framework, weights: TorchDict, pictures: list[Prepared], labels: np.ndarray | None) -> Json:
    """Return the shares of right answers, of warnings, and of answers that mislead. Without labels none is right."""
    logits = compute_logits(framework, weights, np.stack([picture.pixels for picture in pictures]))
    warned = np.array([find_oddities(picture) is not None for picture in pictures])
    right = logits.argmax(axis=1) == (-1 if labels is None else labels)
    misleading = ~right & ~warned & (softmax(logits).max(axis=1) > CONFIDENT)
    share = None if labels is None else float(right.mean())
    return {"right": share, "warned": float(warned.mean()), "misleading": float(misleading.mean())}


def result_table(rows: dict[str, Json]) -> Table:
    """Return the figures in percent."""
    caption = f"In percent. Misleading: wrong, without a warning, and with a confidence above {CONFIDENT:.0%}"
    table = Table("pictures", "right", "warned", "misleading", caption=caption)
    for name, row in rows.items():
        table.add_row(name, *("" if value is None else f"{100 * value:.1f}" for value in row.values()))
    return table
