"""The pictures study: what predict.py says of test images as people save them, of several in one, and of digits.

matplotlib is loaded only to draw: an error in the command line should not wait for it.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw
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
from jax_cnn.torch_layout import TorchDict
from jax_cnn.weights import load_weights

Pixels = UInt8[np.ndarray, "28 28"]
Saver = Callable[[Pixels], Image.Image]

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
    """Folder for pictures.json. An earlier one is replaced."""

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
            has_class = name not in ("several garments", "drawn digits")  # for these, no answer is right
            rows[name] = judge(network["framework"], weights, pictures, labels if has_class else None)
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

    def of_test_image(save: Saver) -> Callable[[int], Image.Image]:
        return lambda index: save(images[index])

    makers = {name: of_test_image(save) for name, save in make_savers().items()}
    return makers | {"several garments": lambda seed: place_several(images, seed), "drawn digits": draw_digit}


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


# Pictures as people make them


def enlarge(pixels: np.ndarray, factor: int = 10) -> Image.Image:
    """Return a picture with larger edges."""
    height, width = pixels.shape
    return Image.fromarray(pixels).resize((width * factor, height * factor), Image.Resampling.BICUBIC)


def by_imsave(colours: str | None) -> Saver:
    """Save as `plt.imsave` does. None means matplotlib's default colours."""
    from matplotlib import image as matplotlib_image

    def save(pixels: Pixels) -> Image.Image:
        file = io.BytesIO()
        matplotlib_image.imsave(file, pixels, cmap=colours)
        return Image.open(file)

    return save


def by_savefig(colours: str | None, *, axes: bool = True, tight: bool = False) -> Saver:
    """Save as `plt.imshow` and `plt.savefig` do. One figure serves for all pictures, because a new one takes longer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    canvas = FigureCanvasAgg(figure)
    plot = figure.subplots()
    plot.set_axis_on() if axes else plot.set_axis_off()
    shown = plot.imshow(np.zeros((28, 28)), cmap=colours)

    def save(pixels: Pixels) -> Image.Image:
        shown.set_data(pixels)
        shown.autoscale()
        if tight:
            file = io.BytesIO()
            figure.savefig(file, bbox_inches="tight")
            return Image.open(file)
        canvas.draw()
        return Image.fromarray(np.array(canvas.buffer_rgba()))  # what `savefig` writes

    return save


def by_screenshot(desktop: int, window: int, inside: Callable[[Pixels], Image.Image]) -> Saver:
    """Show the picture in a window with a title bar on a desktop of 1280x800 pixels, and save the whole screen."""

    def save(pixels: Pixels) -> Image.Image:
        screen = Image.new("L", (1280, 800), desktop)
        draw = ImageDraw.Draw(screen)
        draw.rectangle((240, 100, 1000, 700), fill=window)
        draw.rectangle((240, 100, 1000, 128), fill=(window + 128) // 2)
        draw.text((590, 108), "picture.png", fill=255 - window)
        picture = inside(pixels)
        screen.paste(picture, (620 - picture.width // 2, 414 - picture.height // 2))
        return screen

    return save


def make_savers() -> dict[str, Saver]:
    """Return the ways to save a test image, by name."""
    return {
        "enlarged ten times": enlarge,
        "imsave, grey": by_imsave("gray"),
        "imsave, default colours": by_imsave(None),
        "savefig, grey": by_savefig("gray"),
        "savefig, default colours": by_savefig(None),
        "savefig, without axes": by_savefig("gray", axes=False),
        "savefig, tight": by_savefig("gray", tight=True),
        "screenshot, dark window on light": by_screenshot(225, 45, lambda pixels: enlarge(pixels, 8)),
        "screenshot, light window on dark": by_screenshot(30, 240, lambda pixels: enlarge(pixels, 8)),
        "screenshot of a savefig": by_screenshot(30, 60, by_savefig("gray")),
    }


def place_several(images: UInt8[np.ndarray, "size 28 28"], seed: int) -> Image.Image:
    """Return two to four test images in a row, in a column or in a square, up to 10 of their pixels apart."""
    rng = np.random.default_rng(seed)
    rows, columns = [(1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (2, 2)][rng.integers(6)]
    step = 28 + int(rng.integers(11))
    pixels = np.zeros((rows * step + 20, columns * step + 20), np.uint8)
    for place in range(rows * columns):
        top, left = (10 + step * number for number in divmod(place, columns))
        pixels[top : top + 28, left : left + 28] = images[rng.integers(len(images))]
    return enlarge(pixels if rng.integers(2) else 255 - pixels, 8)


def arc(x: float, y: float, width: float, height: float, start: float, end: float) -> list[tuple[float, float]]:
    """Return points on an ellipse: its centre, its radii, and two angles in degrees."""
    angles = np.radians(np.linspace(start, end, 16))
    return list(zip(x + width * np.cos(angles), y + height * np.sin(angles), strict=True))


# The lines of each digit in a square from 0 to 1, x to the right and y down.
DIGITS = (
    [arc(0.5, 0.5, 0.3, 0.5, 0, 360)],
    [[(0.35, 0.2), (0.55, 0.0), (0.55, 1.0)]],
    [[*arc(0.5, 0.28, 0.3, 0.28, 180, 400), (0.2, 1.0), (0.85, 1.0)]],
    [[*arc(0.45, 0.25, 0.3, 0.25, 200, 450), *arc(0.45, 0.75, 0.33, 0.25, 270, 520)]],
    [[(0.6, 0.0), (0.15, 0.65), (0.85, 0.65)], [(0.65, 0.35), (0.65, 1.0)]],
    [[(0.8, 0.0), (0.3, 0.0), (0.25, 0.45), *arc(0.48, 0.7, 0.32, 0.3, 235, 500)]],
    [[(0.65, 0.0), (0.35, 0.35), *arc(0.5, 0.72, 0.28, 0.28, 200, 560)]],
    [[(0.15, 0.0), (0.85, 0.0), (0.4, 1.0)]],
    [arc(0.5, 0.25, 0.24, 0.25, 90, 450), arc(0.5, 0.75, 0.3, 0.25, 270, 630)],
    [[*arc(0.5, 0.28, 0.28, 0.28, 0, 360), (0.7, 1.0)]],
)


def draw_digit(seed: int) -> Image.Image:
    """Draw a slanted, trembling digit on 280x280 pixels with a pen of 14 to 36, black on white or white on black."""
    rng = np.random.default_rng(seed)
    height, pen = rng.uniform(126, 224), rng.uniform(14, 36)
    slant = height * np.array([[rng.uniform(0.6, 0.95), rng.uniform(-0.3, 0.1)], [rng.uniform(-0.1, 0.1), 1]])
    picture = Image.new("L", (280, 280))
    draw = ImageDraw.Draw(picture)
    centre = 140 + rng.uniform(-22, 22, 2)
    for line in DIGITS[seed % 10]:
        points = (np.array(line) - 0.5 + rng.normal(0, 0.012, (len(line), 2))) @ slant.T + centre
        draw.line([(x, y) for x, y in points.tolist()], fill=255, width=round(pen))
        for x, y in points.tolist():
            draw.circle((x, y), pen / 2, fill=255)
    return picture if rng.integers(2) else Image.fromarray(255 - np.asarray(picture))
