"""The picture inside a frame is found, nothing else is taken for one, and what is not one garment is warned of."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as matplotlib_image
from matplotlib.figure import Figure
from PIL import Image

from experiments.studies import pictures as study
from experiments.studies.pictures import by_savefig, by_screenshot, enlarge
from jax_cnn.config import UserError
from jax_cnn.data import FashionMNIST
from jax_cnn.pictures import prepare as prepare_module
from jax_cnn.pictures.frame import take_from_frame
from jax_cnn.pictures.likeness import find_oddities
from jax_cnn.pictures.prepare import Prepared, count_things, prepare_picture
from jax_cnn.pictures.read import decode_picture

FEW = 8  # test images
# The mean difference from the image itself, of 255. The worst kind below has 27.8 in the mean over these images;
# with its frame, a picture has 106 or more.
NEAR = 30.0


def prepare(image: Image.Image) -> Prepared:
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
        prepared = prepare(FRAMES[name](image))
        assert ("picture inside a frame" in prepared.summary) != name.startswith(UNFRAMED), prepared.summary
        differences.append(np.abs(prepared.pixels.astype(float) - image).mean())
    assert np.mean(differences) < NEAR


def test_with_its_frame_a_picture_is_far_from_the_image(data: FashionMNIST, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "take_from_frame", lambda grey: (grey, 1))
    for name in ("savefig, grey", "savefig, without axes", "screenshot, dark window on light"):
        pairs = [(prepare(FRAMES[name](image)).pixels, image) for image in data.test_images[:5]]
        assert np.mean([np.abs(pixels.astype(float) - image).mean() for pixels, image in pairs]) > 2 * NEAR


def test_what_is_taken_is_said_with_its_size(data: FashionMNIST) -> None:
    prepared = prepare(by_savefig("gray")(data.test_images[0]))
    assert "made grey, took the 367x366 picture inside a frame, " in prepared.summary
    assert find_oddities(prepared) is None


def test_one_figure_drawn_again_is_what_savefig_writes(data: FashionMNIST) -> None:
    """So the study may use one figure for all images."""
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


# Pictures that must make the network unsure


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 1), (2, 3)])
def test_several_pictures_in_one_figure_are_warned_of(data: FashionMNIST, rows: int, columns: int) -> None:
    figure = Figure()
    for axes, image in zip(figure.subplots(rows, columns).flat, data.test_images, strict=False):
        axes.imshow(image)
    file = io.BytesIO()
    figure.savefig(file)
    assert re.search(r"it holds \d pictures|\d things lie on it", str(find_oddities(prepare(Image.open(file)))))


def test_the_largest_of_several_pictures_is_taken(data: FashionMNIST) -> None:
    grey = np.full((500, 900), 240, np.uint8)
    for left, size, image in ((40, 280, data.test_images[0]), (400, 364, data.test_images[1])):
        grey[40 : 40 + size, left : left + size] = np.kron(image, np.ones((size // 28, size // 28), np.uint8))
    prepared = prepare(Image.fromarray(grey))
    assert "it holds 2 pictures; the largest was taken" in str(find_oddities(prepared))
    assert "took the 358x358 picture inside a frame" in prepared.summary


def test_nine_of_ten_pictures_of_several_garments_are_warned_of(data: FashionMNIST) -> None:
    warnings = [find_oddities(prepare(study.place_several(data.test_images, seed))) for seed in range(100)]
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
    assert sum(find_oddities(prepare(digit)) is not None for digit in digits) >= 90
    assert sum(find_oddities(prepare(Image.fromarray(as_in_mnist(digit)))) is not None for digit in digits) >= 90


def test_a_garment_is_neither_several_nor_drawn(data: FashionMNIST) -> None:
    warnings = [find_oddities(prepare(enlarge(image, 5))) for image in data.test_images[:300]]
    assert sum(warning is not None for warning in warnings) <= 6  # expected: 0.5 %, most of them sandals


# The study


def test_the_study_counts_answers_warnings_and_what_misleads(
    data: FashionMNIST, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that always says Bag with certainty misleads on all but the bags."""
    labels = data.test_labels[:50]
    certain = np.eye(10, dtype=np.float32)[[8] * 50] * 50
    monkeypatch.setattr(study, "compute_logits", lambda framework, weights, pixels: certain)
    enlarged = [prepare(enlarge(image)) for image in data.test_images[:50]]
    enlarged[:5] = [picture._replace(garments=2) for picture in enlarged[:5]]  # of which no label is 8
    bags, warned = (labels == 8).mean(), sum(find_oddities(picture) is not None for picture in enlarged) / 50
    row = study.judge("jax", {}, enlarged, labels)
    assert row == {"right": bags, "warned": warned, "misleading": pytest.approx(1 - bags - warned)}
    assert study.judge("jax", {}, enlarged, None)["right"] is None
    with pytest.raises(UserError, match=r"--run .*: no finished run is there; train first"):
        study.describe_network(tmp_path)
