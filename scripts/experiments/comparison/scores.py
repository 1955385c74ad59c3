"""What two networks' logits say: who is right, where they disagree, and how sure they are. NumPy alone."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

Json = dict[str, Any]
Logits = Float[np.ndarray, "size 10"]
Labels = Int[np.ndarray, " size"]

CLASSES = 10


def softmax(logits: Logits) -> Float[np.ndarray, "size 10"]:
    """Probabilities, in float64."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def confusion(predicted: Labels, labels: Labels) -> Int[np.ndarray, "10 10"]:
    """How many images of each class (row) were taken for each class (column)."""
    counts = np.zeros((CLASSES, CLASSES), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts


def compare(logits: dict[str, Logits], labels: Labels) -> Json:
    """Everything that the page tells of the test set, from the logits of `jax` and `torch`."""
    probabilities = {side: softmax(each) for side, each in logits.items()}
    predicted = {side: each.argmax(axis=1) for side, each in logits.items()}
    right = {side: each == labels for side, each in predicted.items()}
    apart = np.flatnonzero(predicted["jax"] != predicted["torch"])
    counts = {side: confusion(each, labels) for side, each in predicted.items()}
    return {
        "images": len(labels),
        "accuracy": {side: float(each.mean()) for side, each in right.items()},
        "both_right": int((right["jax"] & right["torch"]).sum()),
        "only_jax_right": int((right["jax"] & ~right["torch"]).sum()),
        "only_torch_right": int((right["torch"] & ~right["jax"]).sum()),
        "neither_right": int((~right["jax"] & ~right["torch"]).sum()),
        "disagreements": apart.tolist(),
        "median_confidence": {
            "all": median_confidence(probabilities, np.arange(len(labels))),
            "disagreements": median_confidence(probabilities, apart),
        },
        "furthest_probability": float(np.abs(probabilities["jax"] - probabilities["torch"]).max()),
        "confusion": {side: each.tolist() for side, each in counts.items()},
        "classes": [by_class(label, counts) for label in range(CLASSES)],
    }


def median_confidence(probabilities: dict[str, Logits], images: Labels) -> float | None:
    """How sure the networks are of what they say of these images; None if there are none."""
    surest = [each[images].max(axis=1) for each in probabilities.values()]
    return float(np.median(surest)) if len(images) else None


def by_class(label: int, counts: dict[str, np.ndarray]) -> Json:
    """One class: how many images, which share of them each network recognises, and what each takes it for most."""
    images = int(counts["jax"][label].sum())
    row: Json = {"label": label, "images": images}
    for side, matrix in counts.items():
        wrong = np.where(np.arange(CLASSES) == label, 0, matrix[label])
        row[side] = {
            "right": int(matrix[label, label]),
            "accuracy": int(matrix[label, label]) / images if images else None,
            "mistaken_for": int(wrong.argmax()) if wrong.any() else None,
            "mistaken": int(wrong.max()),
        }
    return row


def predictions(indices: list[int], logits: dict[str, Logits], labels: Labels) -> list[Json]:
    """What each network says of these images, and how sure it is."""
    probabilities = {side: softmax(each[indices]) for side, each in logits.items()}
    return [
        {"image": image, "label": int(labels[image])}
        | {
            side: {"predicted": int(each[at].argmax()), "confidence": float(each[at].max())}
            for side, each in probabilities.items()
        }
        for at, image in enumerate(indices)
    ]
