"""A picture of any size, mode and format becomes 28x28 pixels as the training images are, or a warning says why not."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import image as matplotlib_image
from matplotlib.figure import Figure
from PIL import Image

from experiments.studies import pictures as study
from experiments.studies.pictures import by_savefig, by_screenshot, enlarge
from jax_cnn.config import UserError
from jax_cnn.data import FashionMNIST
from jax_cnn.pictures import likeness, prepare
from jax_cnn.pictures.frame import take_from_frame
from jax_cnn.pictures.likeness import find_oddities
from jax_cnn.pictures.prepare import Prepared, count_things, prepare_picture
from jax_cnn.pictures.read import Picture, decode_picture, read_picture

pytestmark = pytest.mark.extended


def plain(grey: np.ndarray) -> Picture:
    """Return grey pixels as if they had been read from a file."""
    return Picture(grey, None, (f"{grey.shape[1]}x{grey.shape[0]} L",))


def read_back(image: Image.Image, path: Path, **options: Any) -> Picture:
    """Write an image to a file and read that file."""
    image.save(path, **options)
    return read_picture(path)


def as_palette(image: Image.Image) -> Image.Image:
    """Return a copy whose greys are the entries of a palette."""
    coloured = image.copy()
    coloured.putpalette([level for level in range(256) for _ in range(3)])
    return coloured


def as_16_bits(pixels: np.ndarray) -> Image.Image:
    """Return grey pixels as an image of 16 bits."""
    return Image.fromarray(pixels.astype(np.uint16) * 257)


def coat(width: int, height: int, background: int = 253, garment: int = 60) -> np.ndarray:
    """Return a photograph of 300x400 pixels: an even garment of this size, a little off the centre."""
    grey = np.full((400, 300), background, np.uint8)
    grey[40 : 40 + height, 30 : 30 + width] = garment
    return grey


def assert_same_shape(actual: np.ndarray, expected: np.ndarray) -> None:
    """Assert that two even garments have the same outline; the first and the last row may be blurred away."""
    assert np.array_equal(actual[1:-1] > 127, expected[1:-1] > 127)


# --- Pictures of 28x28 pixels ---

MODES: dict[str, Callable[[np.ndarray], Image.Image]] = {
    "L": Image.fromarray,
    "LA": lambda pixels: Image.fromarray(pixels).convert("LA"),
    "P": lambda pixels: as_palette(Image.fromarray(pixels)),
    "RGB": lambda pixels: Image.fromarray(pixels).convert("RGB"),
    "RGBA": lambda pixels: Image.fromarray(pixels).convert("RGBA"),
    "I;16": as_16_bits,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_training_image_reaches_the_network_bit_by_bit(data: FashionMNIST, tmp_path: Path, mode: str) -> None:
    for image in data.test_images[:100]:  # the fiftieth is a bag that fills its image
        picture = read_back(MODES[mode](image), tmp_path / "image.png")
        prepared = prepare_picture(picture)
        assert picture.history[0] == f"28x28 {mode}"
        assert np.array_equal(prepared.pixels, image)
        assert find_oddities(prepared) is None


def test_no_test_image_is_inverted_and_every_negative_is(data: FashionMNIST) -> None:
    for image in data.test_images[::4]:
        as_it_is, inverted = prepare_picture(plain(image)), prepare_picture(plain(255 - image))
        assert as_it_is.summary == "28x28 L, as it is"
        assert inverted.summary == "28x28 L: inverted (dark on light)"
        assert np.array_equal(as_it_is.pixels, image)
        assert np.array_equal(inverted.pixels, image)


def test_the_flag_decides_about_inverting_and_the_summary_says_so(data: FashionMNIST) -> None:
    image = data.test_images[0]
    inverted, negative = prepare_picture(plain(image), "yes"), prepare_picture(plain(255 - image), "no")
    assert np.array_equal(inverted.pixels, 255 - image)
    assert np.array_equal(negative.pixels, 255 - image)
    assert inverted.summary == "28x28 L: inverted (as asked)"
    assert negative.summary == "28x28 L: not inverted though dark on light (as asked)"


# --- Pictures of any size ---


@pytest.mark.parametrize(("background", "garment"), [(253, 60), (253, 200), (128, 40), (100, 180), (0, 255)])
def test_a_garment_of_any_contrast_is_centred_on_black_in_its_proportions(background: int, garment: int) -> None:
    prepared = prepare_picture(plain(coat(100, 200, background, garment)))
    expected = np.zeros((28, 28), np.uint8)
    expected[:, 7:21] = 255
    assert_same_shape(prepared.pixels, expected)
    assert prepared.pixels[1:-1, 8:20].min() >= 230
    assert prepared.pixels[:, [*range(7), *range(21, 28)]].max() <= 12
    inverted = "inverted (dark on light), " if background > garment else ""
    assert prepared.summary.startswith(f"300x400 L: {inverted}trimmed to 10")
    assert "scaled to 14x28, padded to 28x28" in prepared.summary
    assert ("contrast stretched by" in prepared.summary) == (abs(background - garment) < 240)


@pytest.mark.parametrize(
    ("grey", "words"),
    [
        (coat(200, 100), "scaled to 28x14, padded to 28x28"),
        (np.full((1, 30_000), 7, np.uint8), "30000x1 L: reduced to 2000x1, scaled to 28x1, padded to 28x28"),
        (np.array([[0, 9, 0], [0, 90, 0]], np.uint8), "trimmed to 1x1, scaled to 28x28"),
    ],
    ids=["wide", "thin", "tiny"],
)
def test_proportions_stay_at_any_size(grey: np.ndarray, words: str) -> None:
    prepared = prepare_picture(plain(grey))
    assert words in prepared.summary
    assert prepared.pixels.shape == (28, 28)


def test_a_photograph_of_48_million_pixels_is_read_at_a_part_of_its_size(tmp_path: Path) -> None:
    picture = read_back(Image.fromarray(coat(100, 200)).resize((6_000, 8_000)), tmp_path / "large.jpg")
    assert picture.history[0] == "6000x8000 L"
    assert 2_000 <= max(picture.grey.shape) <= 4_000
    assert "reduced to 1" in prepare_picture(picture).summary


# --- Kinds of files ---

ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: np.transpose,
    6: np.rot90,
    7: lambda upright: np.rot90(upright, 2).T,
    8: lambda upright: np.rot90(upright, 3),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_turns_a_photograph_upright(tmp_path: Path, orientation: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(ORIENTATIONS[orientation](coat(60, 280))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    prepared = prepare_picture(read_back(stored, tmp_path / "turned.png", exif=exif))
    assert np.array_equal(prepared.pixels, prepare_picture(plain(coat(60, 280))).pixels)
    assert ("turned upright (EXIF)" in prepared.summary) == (orientation > 1)


def cut_out(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    """Return a dark garment on a transparent background (black or red if shown), and what to save it with."""
    grey = coat(100, 200, background=0)
    if mode == "P":
        return as_palette(Image.fromarray(grey)), {"transparency": b"\0" + b"\xff" * 255}
    if mode == "RGB":
        coloured = np.stack([np.where(grey > 0, grey, 255), grey, grey], axis=-1)
        return Image.fromarray(coloured), {"transparency": (255, 0, 0)}
    if mode == "I;16":
        return as_16_bits(grey), {"transparency": 0}
    image = Image.fromarray(grey).convert(mode)
    image.putalpha(Image.fromarray((grey > 0).astype(np.uint8) * 255))
    return image, {}


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "RGB", "I;16"])
def test_transparent_parts_become_background(tmp_path: Path, mode: str) -> None:
    image, options = cut_out(mode)
    picture = read_back(image, tmp_path / "cut_out.png", **options)
    assert picture.history[0] == f"300x400 {mode}"
    on_white, on_black = prepare_picture(picture), prepare_picture(picture, "no")
    assert "transparent parts made white, inverted (dark on light)" in on_white.summary
    assert "transparent parts made black, trimmed" in on_black.summary
    assert np.array_equal(on_white.pixels, prepare_picture(plain(coat(100, 200, background=255))).pixels)
    assert np.array_equal(on_black.pixels, prepare_picture(plain(coat(100, 200, background=0)), "no").pixels)


def test_half_transparent_parts_are_mixed_linearly() -> None:
    grey, opacity = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    for background in (0, 255):
        exact = (grey * (opacity / 255) + background * (1 - opacity / 255)).round()
        assert np.abs(prepare.blend(grey, opacity, background) - exact).max() <= 1
        assert np.array_equal(prepare.blend(grey, np.full_like(grey, 255), background), grey)


@pytest.mark.parametrize(
    ("name", "mode", "note"),
    [
        ("a.jpg", "CMYK", "CMYK: made grey"),
        ("a.png", "1", "300x400 1: inverted"),
        ("a.gif", "P", "P: made grey"),
        ("a.webp", "RGB", "RGB: made grey"),
        ("a.bmp", "L", "300x400 L: inverted"),
        ("a.ppm", "L", "300x400 L: inverted"),
    ],
)
def test_other_modes_and_formats_are_read(tmp_path: Path, name: str, mode: str, note: str) -> None:
    image = Image.fromarray(coat(100, 200)).convert(mode, dither=Image.Dither.NONE)
    prepared = prepare_picture(read_back(image, tmp_path / name))
    assert note in prepared.summary
    assert_same_shape(prepared.pixels, prepare_picture(plain(coat(100, 200))).pixels)


@pytest.mark.parametrize("name", ["frames.gif", "frames.png", "frames.webp"])
def test_the_first_of_several_frames_is_read(tmp_path: Path, name: str) -> None:
    frames = [Image.fromarray(coat(*size)) for size in ((100, 200), (100, 10), (10, 10))]
    picture = read_back(frames[0], tmp_path / name, save_all=True, append_images=frames[1:])
    assert "first of 3 frames" in picture.history
    assert_same_shape(prepare_picture(picture).pixels, prepare_picture(plain(coat(100, 200))).pixels)


# --- Pictures that look nothing like the training images ---

PORTRAIT = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")  # a photograph before a flag


def count_odd(images: np.ndarray) -> int:
    """Count the images that are found odd, prepared without inverting."""
    return sum(find_oddities(prepare_picture(plain(image), "no")) is not None for image in images)


def odd_images(data: FashionMNIST) -> dict[str, np.ndarray]:
    """Return a few hundred images of each kind that is always found, by the table in `likeness`."""
    rng = np.random.default_rng(0)
    kinds = {
        "uniform noise": rng.integers(0, 256, (300, 28, 28)),
        "Gaussian noise": rng.normal(127, 50, (300, 28, 28)).clip(0, 255).round(),
        "faint noise on black": np.abs(rng.normal(0, 30, (300, 28, 28))).round(),
        "black or white": 255 * rng.integers(0, 2, (300, 28, 28)),
        "plain": np.broadcast_to(np.arange(256)[:, None, None], (256, 28, 28)),
        "negatives": 255 - data.test_images[:300],
    }
    return {kind: images.astype(np.uint8) for kind, images in kinds.items()}


@pytest.mark.parametrize(("images", "odd"), [(2_500, 3), pytest.param(10_000, 8, marks=pytest.mark.slow)])
def test_one_in_a_thousand_test_images_is_a_false_alarm(data: FashionMNIST, images: int, odd: int) -> None:
    assert count_odd(data.test_images[:images]) == odd


def test_negatives_noise_and_plain_images_are_always_found(data: FashionMNIST) -> None:
    missed = {kind: len(images) - count_odd(images) for kind, images in odd_images(data).items()}
    assert not any(missed.values()), missed


@pytest.mark.parametrize(
    ("limit", "off", "kind"),
    [("LIGHT_CORNER", 255, "negatives"), ("FLAT", 0.0, "plain"), ("ROUGH", 9.0, "faint noise on black")],
)
def test_without_one_limit_the_images_of_its_kind_pass(
    data: FashionMNIST, monkeypatch: pytest.MonkeyPatch, limit: str, off: float, kind: str
) -> None:
    monkeypatch.setattr(likeness, limit, off)
    images = odd_images(data)[kind]
    assert count_odd(images) < 0.95 * len(images)


def test_a_portrait_and_large_noise_are_found_by_their_clutter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled to 28x28 pixels, neither looks odd by the other measures."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 300)).astype(np.uint8)
    cluttered = [prepare_picture(read_picture(PORTRAIT)), prepare_picture(plain(noise))]
    for prepared in cluttered:
        assert "not even" in str(find_oddities(prepared))
    monkeypatch.setattr(likeness, "CLUTTERED", 1.0)
    assert not any(find_oddities(prepared) for prepared in cluttered)


def test_a_garment_on_its_side_passes(data: FashionMNIST) -> None:
    """The measures cannot see it, as the table in `likeness` says."""
    assert count_odd(np.rot90(data.test_images[:1000], axes=(1, 2))) < 5


# --- Pictures inside a frame: found, and nothing else is taken for one; what is not one garment is warned of ---


FEW = 8  # test images
# The mean difference from the image itself, of 255. The worst kind below has 27.8 in the mean over these images;
# with its frame, a picture has 106 or more.
NEAR = 30.0


def prepare_image(image: Image.Image) -> Prepared:
    """Prepare a picture as predict.py does after opening its file."""
    return prepare_picture(decode_picture(image))


def as_figure(
    cmap: str | None = None,
    *,
    dpi: float = 100,
    facecolor: str = "white",
    interpolation: str | None = None,
    title: str | None = None,
) -> Callable[[np.ndarray], Image.Image]:
    """Return a function that draws an image with `imshow`, and returns what `savefig` writes.

    With a title there is a colour bar too.
    """

    def save(pixels: np.ndarray) -> Image.Image:
        figure = Figure(dpi=dpi, facecolor=facecolor)
        axes = figure.subplots()
        shown = axes.imshow(pixels, cmap=cmap, interpolation=interpolation)
        if title:
            axes.set_title(title)
            figure.colorbar(shown)
        file = io.BytesIO()
        figure.savefig(file)
        return Image.open(file)

    return save


# More of the kind than the study measures.
FRAMES = {
    **study.make_savers(),
    "reversed colours, with axes": as_figure(cmap="gray_r"),
    "reversed colours, without axes": by_savefig("gray_r", axes=False),
    "a title and a colour bar": as_figure(title="Ankle boot"),
    "300 dots per inch": as_figure(cmap="gray", dpi=300),
    "smoothed": as_figure(cmap="magma", interpolation="bilinear"),
    "on a dark figure": as_figure(cmap="gray", facecolor="#222"),
    "a screenshot in its real size": by_screenshot(200, 60, Image.fromarray),
}
UNFRAMED = ("enlarged", "imsave", "reversed colours, without")


@pytest.mark.parametrize("name", FRAMES)
def test_the_picture_in_a_frame_is_prepared_like_the_image_itself(data: FashionMNIST, name: str) -> None:
    differences = []
    for image in data.test_images[:FEW]:
        prepared = prepare_image(FRAMES[name](image))
        assert ("picture inside a frame" in prepared.summary) != name.startswith(UNFRAMED), prepared.summary
        differences.append(np.abs(prepared.pixels.astype(float) - image).mean())
    assert np.mean(differences) < NEAR


def test_with_its_frame_a_picture_is_far_from_the_image(data: FashionMNIST, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "take_from_frame", lambda grey: (grey, 1))
    for name in ("savefig, grey", "savefig, without axes", "screenshot, dark window on light"):
        pairs = [(prepare_image(FRAMES[name](image)).pixels, image) for image in data.test_images[:5]]
        assert np.mean([np.abs(pixels.astype(float) - image).mean() for pixels, image in pairs]) > 2 * NEAR


def test_what_is_taken_is_said_with_its_size(data: FashionMNIST) -> None:
    prepared = prepare_image(by_savefig("gray")(data.test_images[0]))
    assert "made grey, took the 367x366 picture inside a frame, " in prepared.summary
    assert find_oddities(prepared) is None


def test_one_figure_drawn_again_is_what_savefig_writes(data: FashionMNIST) -> None:
    """The study uses one figure for all images."""
    again = by_savefig("gray")
    for image in data.test_images[:3]:
        assert np.array_equal(np.asarray(again(image)), np.asarray(as_figure(cmap="gray")(image)))


def test_a_plain_picture_is_not_taken_apart(data: FashionMNIST) -> None:
    """A frame is seen in one of a thousand enlarged images, so none is in these."""
    for image in data.test_images[:200]:
        large = np.asarray(enlarge(image, 5))
        for grey in (large, 255 - large, np.pad(large, 40)):
            assert take_from_frame(grey)[0] is grey


@pytest.mark.parametrize("edge", [1, 2, 3, 27, 28, 29, 60])
def test_pictures_of_any_size_are_looked_at(edge: int) -> None:
    for grey in (np.zeros((edge, edge), np.uint8), np.pad(np.full((edge, 2 * edge), 255, np.uint8), 1)):
        assert take_from_frame(grey)[0] is grey


@pytest.mark.parametrize("colours", ["viridis", "cividis", "inferno", "magma", "plasma", "gray"])
def test_colours_give_back_the_values(colours: str) -> None:
    assert distance_from_values(colours) < 30  # the worst, inferno: 28


def distance_from_values(colours: str) -> int:
    """Return how far the values that matplotlib has drawn in colours are from those that are read, of 255."""
    values = np.arange(256).reshape(16, 16)
    file = io.BytesIO()
    matplotlib_image.imsave(file, values, cmap=colours)
    grey = decode_picture(Image.open(file)).grey.astype(float)
    stretched = 255 * (grey - grey[0, 0]) / (grey.max() - grey[0, 0])
    return int(np.abs(stretched - values).max())


def test_rainbow_colours_do_not_give_back_the_values() -> None:
    assert distance_from_values("jet") > 100


def test_noise_is_looked_at_in_little_memory_and_time() -> None:
    """The commonest value of its border hardly ever occurs, so all of it stands out as one thing."""
    noise = np.random.default_rng(0).integers(0, 256, (500, 400)).astype(np.uint8)
    assert take_from_frame(noise)[0] is noise


# --- Pictures that must make the network unsure ---


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 1), (2, 3)])
def test_several_pictures_in_one_figure_are_warned_of(data: FashionMNIST, rows: int, columns: int) -> None:
    figure = Figure()
    for axes, image in zip(figure.subplots(rows, columns).flat, data.test_images, strict=False):
        axes.imshow(image)
    file = io.BytesIO()
    figure.savefig(file)
    assert re.search(r"it holds \d pictures|\d things lie on it", str(find_oddities(prepare_image(Image.open(file)))))


def test_the_largest_of_several_pictures_is_taken(data: FashionMNIST) -> None:
    grey = np.full((500, 900), 240, np.uint8)
    for left, size, image in ((40, 280, data.test_images[0]), (400, 364, data.test_images[1])):
        grey[40 : 40 + size, left : left + size] = np.kron(image, np.ones((size // 28, size // 28), np.uint8))
    prepared = prepare_image(Image.fromarray(grey))
    assert "it holds 2 pictures; the largest was taken" in str(find_oddities(prepared))
    assert "took the 358x358 picture inside a frame" in prepared.summary


def test_nine_of_ten_pictures_of_several_garments_are_warned_of(data: FashionMNIST) -> None:
    warnings = [find_oddities(prepare_image(study.place_several(data.test_images, seed))) for seed in range(100)]
    assert sum("things lie on it, apart from one another" in str(warning) for warning in warnings) >= 90


def test_what_nearly_touches_is_apart_unless_it_is_thin_or_only_a_stripe_divides_it() -> None:
    rows, columns = np.ogrid[:620, :320]
    above, below = (np.hypot(rows - middle, columns - 160) for middle in (152, 460))
    near = (above < 150) | (below < 150)
    belt = (below < 150) & (abs(rows - 460) > 4)
    handle = ((above < 150) & (above > 120)) | (below < 150)
    for picture, things in ((near, 2), (belt, 1), (handle, 1), (below < 150, 1), (near & False, 0)):
        assert [count_things(picture), count_things(picture.T)] == [things, things]


def as_in_mnist(digit: Image.Image) -> np.ndarray:
    """Return a digit light on dark, 20 pixels high on 28x28 pixels."""
    pixels = np.asarray(digit)
    light = pixels if pixels[0, 0] == 0 else 255 - pixels
    box = Image.fromarray(light).getbbox()
    assert box
    small = Image.fromarray(light).crop(box).resize((14, 20))
    return np.pad(np.asarray(small), ((4, 4), (7, 7)))


def test_nine_of_ten_drawn_digits_are_warned_of() -> None:
    digits = [study.draw_digit(seed) for seed in range(100)]
    assert sum(find_oddities(prepare_image(digit)) is not None for digit in digits) >= 90
    assert sum(find_oddities(prepare_image(Image.fromarray(as_in_mnist(digit)))) is not None for digit in digits) >= 90


def test_a_garment_is_neither_several_nor_drawn(data: FashionMNIST) -> None:
    warnings = [find_oddities(prepare_image(enlarge(image, 5))) for image in data.test_images[:300]]
    assert sum(warning is not None for warning in warnings) <= 6  # expected: 0.5 %, most of them sandals


# --- The study ---


def test_the_study_counts_answers_warnings_and_what_misleads(
    data: FashionMNIST, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that always says Bag with certainty misleads on all but the bags."""
    labels = data.test_labels[:50]
    certain = np.eye(10, dtype=np.float32)[[8] * 50] * 50
    monkeypatch.setattr(study, "compute_logits", lambda framework, weights, pixels: certain)
    enlarged = [prepare_image(enlarge(image)) for image in data.test_images[:50]]
    enlarged[:5] = [picture._replace(garments=2) for picture in enlarged[:5]]  # none of these has the label 8
    bags, warned = (labels == 8).mean(), sum(find_oddities(picture) is not None for picture in enlarged) / 50
    row = study.judge("jax", {}, enlarged, labels)
    assert row == {"right": bags, "warned": warned, "misleading": pytest.approx(1 - bags - warned)}
    assert study.judge("jax", {}, enlarged, None)["right"] is None
    with pytest.raises(UserError, match=r"--run .*: no finished run is there; train first"):
        study.describe_network(tmp_path)
