"""Weights files: safetensors under PyTorch's names and layouts. `load_weights` reads other files too."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

from jax_cnn.config import CNN, HIDDEN, Model, Network, UserError
from jax_cnn.files import write_atomically
from jax_cnn.torch_layout import TorchDict, check_shapes, layout_of

MOMENTS = ("first_moment", "second_moment")  # a checkpoint has Adam's moments under these names and the tensor's
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, and a module in a module
FOREIGN = {  # files that people take for weights, by how they begin
    b"\x89HDF": "an HDF5 file, as Keras writes it",
    b"\x93NUMPY": "an array of NumPy's",
    b"\x1f\x8b": "packed (gzip): unpack it first",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself (git lfs pull)",
    b"<": "a web page",
}


def save_weights(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a weights file, whole or not at all.

    Raises:
        OSError: the disk is full or the folder cannot be written to.
    """
    write_atomically(path, save(dict(tensors)))


def load_weights(
    path: Path,
    dtype: str,
    network: Network | None = CNN,
    read_torch: Callable[[Path], TorchDict] | None = None,
    say: Callable[[str], None] | None = None,
) -> TorchDict:
    """Read weights and convert them to `dtype`.

    Args:
        path: a safetensors file, also a checkpoint, or the folder of a run, or a file of PyTorch's.
        dtype: float32 or float64.
        network: the weights have to be this network's; with None they may be any network's (see `recognise`).
        read_torch: reads the tensors of a PyTorch file (`torch_ref.weights.read_tensors`), which this package cannot.
        say: shows a line to the user if tensors of the file were renamed.

    Raises:
        UserError: the file is missing or cannot be read, or holds another network, or a tensor is missing or unknown,
            has another shape or no floating dtype, or is not finite.
    """
    try:
        path = find_file(path)
        kind, tensors = read_file(path, read_torch)
        tensors, remarks = rename(tensors, network)
        recognised = recognise(tensors)
        if network not in (None, recognised) and fits(tensors, recognised):
            raise ValueError(f"it is of {recognised}, not of {network}")
        layout = layout_of(network or recognised)
        try:
            check_shapes(tensors, layout)
        except ValueError as error:
            wanted = {name: leaf.shape for name, leaf in layout.items()}
            given = {name: tensors[name].shape for name in sorted(tensors)}
            raise ValueError(
                f"{error} ({kind} with {listing(given)}; {network or recognised} has {listing(wanted)})"
            ) from None
        for name, array in tensors.items():
            if not np.issubdtype(array.dtype, np.floating):
                raise ValueError(f"tensor {name} has dtype {array.dtype}, not a floating one")
        with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused below
            converted = {name: array.astype(dtype) for name, array in tensors.items()}
        for name, array in converted.items():
            if not np.isfinite(array).all():
                raise ValueError(f"tensor {name} holds NaN, infinity or a number beyond {dtype}")
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise UserError(
            f"weights file {path}: {problem}; give the folder or a file of a run, or a state dict of this network that "
            "PyTorch saved"
        ) from None
    if remarks and say:
        say(f"weights file {path}: {'; '.join(remarks)}")
    return converted


def find_file(path: Path) -> Path:
    """Return the weights file that is asked for: of a run's folder its weights, or else its newest checkpoint.

    Raises:
        ValueError: a folder holds neither.
    """
    if not path.is_dir():
        return path
    checkpoints = sorted(path.glob("checkpoint-*.safetensors"), key=lambda file: (len(file.name), file.name))
    files = [*checkpoints, *path.glob("weights.safetensors")]
    if not files:
        raise ValueError("it is a folder without weights.safetensors or a checkpoint")
    return files[-1]


def read_file(path: Path, read_torch: Callable[[Path], TorchDict] | None) -> tuple[str, TorchDict]:
    """Return the kind of a file, in words, and its tensors by name, without the moments of a checkpoint.

    Raises:
        OSError: it cannot be read.
        ValueError: its kind is not known, or it is damaged.
    """
    with path.open("rb") as file:
        start = file.read(24)
    is_safetensors = start[8:9] == b"{"  # after eight bytes with the length of its JSON, which may be any bytes
    foreign = next((kind for first, kind in FOREIGN.items() if start.startswith(first)), None)
    if not start or (foreign and not is_safetensors):
        raise ValueError(f"it is {foreign or 'empty'}")
    # PyTorch writes a zip archive, and once wrote a pickle.
    if start.startswith(b"PK\3\4") or (start.startswith(b"\x80") and not is_safetensors):
        if read_torch is None:
            raise ValueError("it is a file of PyTorch's, which is not read here")
        try:
            return "a PyTorch file", read_torch(path)
        except ValueError as error:
            raise ValueError(f"not a readable PyTorch file ({error})") from None
    try:
        entries = dict(deserialize(path.read_bytes()))
    except SafetensorError as error:
        raise ValueError(f"not a readable safetensors file ({error})") from None
    tensors = {name: decode(name, entry) for name, entry in entries.items()}
    weights = {name: array for name, array in tensors.items() if not name.startswith(tuple(f"{m}." for m in MOMENTS))}
    if len(weights) == len(tensors):
        return "a safetensors file", weights
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    if metadata.get("sha256") != checksum(metadata.get("checkpoint", ""), tensors):
        raise ValueError("it is a checkpoint whose contents do not match its checksum")
    return "a checkpoint", weights


def checksum(text: str, tensors: Mapping[str, np.ndarray]) -> str:
    """Return a checkpoint's SHA-256: of the JSON text in its metadata, and of every tensor's name and contents."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def decode(name: str, entry: Mapping[str, Any]) -> np.ndarray:
    """Return a tensor of a safetensors file. bfloat16 becomes float32: its bits are the upper half of those.

    Raises:
        ValueError: NumPy has no such dtype.
    """
    if entry["dtype"] == "BF16":
        bits = np.frombuffer(entry["data"], "<u2").astype("<u4") << 16
        return bits.view("<f4").reshape(entry["shape"])
    dtypes = {"F16": "<f2", "F32": "<f4", "F64": "<f8"} | {
        f"{kind}{8 * n}": f"<{kind.lower()}{n}" for kind in "IU" for n in (1, 2, 4, 8)
    }
    if entry["dtype"] not in dtypes:
        raise ValueError(f"tensor {name} has dtype {entry['dtype']}, which NumPy lacks")
    return np.frombuffer(entry["data"], dtypes[entry["dtype"]]).reshape(entry["shape"])


def rename(tensors: TorchDict, network: Network | None) -> tuple[TorchDict, list[str]]:
    """Return the tensors under the names of a network, and what was done for that, in words.

    Prefixes that wrappers add are taken off. Names of another program are replaced where the shapes leave one way only;
    SimpleCNN's eight tensors have eight shapes. Otherwise the names stay as they are.
    """
    remarks = []
    while prefix := next(
        (prefix for prefix in PREFIXES if tensors and all(name.startswith(prefix) for name in tensors)), None
    ):
        tensors = {name.removeprefix(prefix): array for name, array in tensors.items()}
        remarks.append(f"took the prefix {prefix} off its names")
    widths = {array.shape[0] for array in tensors.values() if array.shape[1:] == (28 * 28,)}
    networks = (
        [network] if network else [CNN, Network("linear"), *(Network("mlp", hidden) for hidden in sorted(widths))]
    )
    if any(fits(tensors, candidate) for candidate in networks):
        return tensors, remarks
    for candidate in networks:
        names = {leaf.shape: name for name, leaf in layout_of(candidate).items()}
        shapes = [array.shape for array in tensors.values()]
        if len(names) == len(layout_of(candidate)) and len(shapes) == len(names) and set(shapes) == names.keys():
            renamed = {name: names[array.shape] for name, array in sorted(tensors.items())}
            pairs = ", ".join(f"{name} as {own}" for name, own in renamed.items() if own.endswith("weight"))
            remarks.append(
                f"took {pairs}, by their shapes; images are scaled to 0 … 1 here, as its training must have done"
            )
            return {renamed[name]: array for name, array in tensors.items()}, remarks
    return tensors, remarks


def listing(shapes: Mapping[str, tuple[int, ...]], most: int = 4) -> str:
    """Return the first names with their shapes, and how many more there are."""
    first = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:most])
    return (first or "no tensor") + (f" and {len(shapes) - most} more" if len(shapes) > most else "")


def recognise(tensors: Mapping[str, np.ndarray]) -> Network:
    """Return the network whose tensors' names are most like these; the cnn if several are equally like them."""

    def similarity(model: Model) -> float:
        names = layout_of(Network(model)).keys()
        return len(names & tensors.keys()) / len(names | tensors.keys())

    models: tuple[Model, ...] = ("cnn", "mlp", "linear")  # max takes the first of equals
    model = max(models, key=similarity)
    shape = tensors["fc1.weight"].shape if model == "mlp" and "fc1.weight" in tensors else ()
    return Network(model, shape[0] if shape and shape[0] else HIDDEN)


def fits(tensors: Mapping[str, np.ndarray], network: Network) -> bool:
    """Return whether these are the tensors of this network, in names and shapes."""
    try:
        check_shapes(tensors, layout_of(network))
    except ValueError:
        return False
    return True
