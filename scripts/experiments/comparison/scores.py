"""Compare the two networks: their layers, their answers on the test images, and their stages on one of these."""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, Shaped, UInt8
from PIL import Image
from rich.box import SIMPLE
from rich.table import Table

from experiments.answers import (
    FRAMEWORKS,
    STAGES,
    Framework,
    Logits,
    compute_logits,
    compute_stages,
    softmax,
    trace_simple_cnn,
)
from experiments.comparison.runs import CompareConfig, Run
from experiments.records import Json, check_accuracy
from jax_cnn.data import load_fashion_mnist
from jax_cnn.run.folder import WEIGHTS
from jax_cnn.weights import load_weights

Labels = Int[np.ndarray, " size"]

CLASSES = 10
MAPS = 8  # feature maps to show of each stage
INSIDE = 0  # number of the test image whose feature maps are shown


def list_layers() -> list[Json]:
    """Return each layer of SimpleCNN, with the shape of its output for one image and the number of its parameters.

    A layer of PyTorch without a counterpart that has a name in JAX has None there: JAX flattens by a reshape.
    """
    import torch  # only now: an error in the command line should not wait for a framework

    from torch_ref.model import SimpleCNN

    jax_layers, rows, value = _jax_layers(), [], torch.zeros(1, 1, 28, 28)
    for name, module in SimpleCNN().named_children():  # in the order of the forward pass
        value = module(value)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        layer = {"name": type(module).__name__, "shape": [*value.shape[1:]], "parameters": parameters}
        rows.append({"layer": name, "torch": layer, "jax": jax_layers.get(STAGES.get(name, ""))})
    return rows


def _jax_layers() -> dict[str, Json]:
    """Return the stages that the harness sees in the Linen module. The first of a Flax module has its parameters."""
    import jax

    from jax_cnn.model import init_params

    images = jax.ShapeDtypeStruct((1, 28, 28, 1), "float32")
    params = jax.eval_shape(init_params, jax.random.key(0))
    taps = trace_simple_cnn({"params": params}, images, verify=False).taps
    sizes = {name: sum(leaf.size for leaf in layer.values()) for name, layer in params.items()}
    layers = {}
    for stage in STAGES.values():
        parameters = sizes.pop(stage.partition(".")[0], 0)
        layers[stage] = {"name": stage, "shape": [*taps[stage].shape[1:]], "parameters": parameters}
    return layers


def layer_table(layers: list[Json]) -> Table:
    """Return the table for a terminal of 80 columns."""
    table = Table(box=SIMPLE, show_edge=False, padding=0, show_footer=True)
    table.add_column("layer", "all", no_wrap=True)
    for side, name in FRAMEWORKS.items():
        total = sum(row[side]["parameters"] for row in layers if row[side])
        table.add_column(name, no_wrap=True)
        table.add_column("output", justify="right", no_wrap=True)
        table.add_column("parameters", f"{total:,}", justify="right", no_wrap=True)
    for row in layers:
        cells = [
            cell
            for side in FRAMEWORKS
            for cell in (
                (row[side]["name"], "×".join(map(str, row[side]["shape"])), f"{row[side]['parameters']:,}")
                if row[side]
                else ("", "", "")
            )
        ]
        table.add_row(row["layer"], *cells)
    return table


def count_confusion(predicted: Labels, labels: Labels) -> Int[np.ndarray, "10 10"]:
    """Return how many images of each class (row) the network takes for each class (column)."""
    counts = np.zeros((CLASSES, CLASSES), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def compare(logits: Mapping[Framework, Logits], labels: Labels) -> Json:
    """Compare what the two networks say of the test set, from the logits of `jax` and of `torch`."""
    confidence = np.array([softmax(logits[side]).max(axis=1) for side in FRAMEWORKS])
    predicted = {side: logits[side].argmax(axis=1) for side in FRAMEWORKS}
    jax, torch = (predicted[side] == labels for side in FRAMEWORKS)
    disagreements = np.flatnonzero(predicted["jax"] != predicted["torch"])
    confusion = {side: count_confusion(predicted[side], labels) for side in FRAMEWORKS}
    classes: list[Json] = []
    for label, images in enumerate(np.bincount(labels, minlength=CLASSES).tolist()):
        right = {side: int(counts[label, label]) for side, counts in confusion.items()}
        shares = {side: {"accuracy": count / images if images else None} for side, count in right.items()}
        classes.append({"label": label, "images": images} | shares)
    return {
        "images": len(labels),
        "accuracy": {"jax": float(jax.mean()), "torch": float(torch.mean())},
        "both_right": int((jax & torch).sum()),
        "only_jax_right": int((jax & ~torch).sum()),
        "only_torch_right": int((torch & ~jax).sum()),
        "neither_right": int((~jax & ~torch).sum()),
        "disagreements": disagreements.tolist(),
        "median_confidence": {
            "all": float(np.median(confidence)),
            "disagreements": float(np.median(confidence[:, disagreements])) if len(disagreements) else None,
        },
        "confusion": {side: counts.tolist() for side, counts in confusion.items()},
        "classes": classes,
    }


def describe_images(images: Sequence[int], logits: Mapping[Framework, Logits], labels: Labels) -> list[Json]:
    """Return what each network says of these images, and its confidence."""
    rows: list[Json] = [{"image": image, "label": int(labels[image])} for image in images]
    for side in FRAMEWORKS:
        for row, probabilities in zip(rows, softmax(logits[side][list(images)]), strict=True):
            row[side] = {"predicted": int(probabilities.argmax()), "confidence": float(probabilities.max())}
    return rows


def measure_networks(config: CompareConfig, runs: Mapping[Framework, Run]) -> Json:
    """Ask both trained networks about the test images, and look inside them."""
    data = load_fashion_mnist(config.data_dir, any_data=config.any_data)
    pixels = data.test_images[: config.limit_test]
    labels = data.test_labels[: config.limit_test].astype(np.int64)
    weights = {framework: load_weights(run.folder / WEIGHTS, "float32") for framework, run in runs.items()}
    logits = {framework: compute_logits(framework, weights[framework], pixels) for framework in runs}
    for framework, run in runs.items():
        check_accuracy(run.folder, logits[framework].argmax(axis=1) == labels)
    result = compare(logits, labels)
    predictions = describe_images(range(min(config.images, len(labels))), logits, labels)
    disagreements = describe_images(result["disagreements"][: config.disagreements], logits, labels)
    shown = sorted({INSIDE, *(row["image"] for row in (*predictions, *disagreements))})
    stages = {framework: compute_stages(framework, weights[framework], pixels[INSIDE]) for framework in runs}
    rows = [compare_stage(stage, stages["jax"][stage], expected) for stage, expected in stages["torch"].items()]
    return {
        "scores": result,
        "predictions": predictions,
        "disagreements": disagreements,
        "inside": {"image": INSIDE, "label": int(labels[INSIDE]), "stages": rows},
        "pictures": {
            "test_images": {str(image): encode_png(pixels[image]) for image in shown},
            "filters": {framework: encode(tensors["conv1.weight"][:, 0]) for framework, tensors in weights.items()},
            "features": {
                framework: {
                    row["stage"]: encode(outputs[row["stage"]][row["channels"]]) for row in rows if row["channels"]
                }
                for framework, outputs in stages.items()
            },
        },
    }


def compare_stage(stage: str, actual: np.ndarray, expected: np.ndarray) -> Json:
    """Compare one stage of the trained networks, and choose the channels that vary most in PyTorch."""
    distance = np.abs(actual - expected)
    channels = None
    if expected.ndim == 3:
        channels = sorted(np.argsort(-expected.std(axis=(1, 2)), kind="stable")[:MAPS].tolist())
    return {
        "stage": stage,
        "shape": list(expected.shape),
        "channels": channels,
        "furthest": float(distance.max()),
        "median": float(np.median(distance)),
        "largest": float(np.abs(expected).max()),
    }


def encode(array: Shaped[np.ndarray, "..."]) -> Json:
    """Return an array for JSON, exact and on one line: its dtype, its shape, and its bytes in row-major order."""
    content = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "base64": content}


def decode(encoded: Json) -> Shaped[np.ndarray, "..."]:
    """Return the array that `encode` took."""
    return np.frombuffer(base64.b64decode(encoded["base64"]), encoded["dtype"]).reshape(encoded["shape"])


def encode_png(pixels: UInt8[np.ndarray, "row column"]) -> str:
    """Return a grey picture as a PNG in base64."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
