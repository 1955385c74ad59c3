"""Compare the two trained networks on the test images: their answers, and their stages on one image."""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, Shaped, UInt8
from PIL import Image

from experiments.answers import FRAMEWORKS, Framework, Logits, compute_logits, compute_stages, softmax
from experiments.comparison.config import CompareConfig
from experiments.comparison.runs import Run
from experiments.records import Json, check_accuracy
from jax_cnn.data import load_fashion_mnist
from jax_cnn.run.folder import WEIGHTS
from jax_cnn.torch_layout import load_weights

Labels = Int[np.ndarray, " size"]

CLASSES = 10
MAPS = 8  # feature maps to show of each stage
INSIDE = 0  # number of the test image whose feature maps are shown


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
        "classes": [describe_class(label, confusion) for label in range(CLASSES)],
    }


def describe_class(label: int, confusion: Mapping[Framework, Int[np.ndarray, "10 10"]]) -> Json:
    """Return the number of images of a class, and which share of them each network recognises."""
    images = int(confusion["jax"][label].sum())
    shares = {side: int(counts[label, label]) / images if images else None for side, counts in confusion.items()}
    return {"label": label, "images": images} | {side: {"accuracy": share} for side, share in shares.items()}


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
