"""The work of PyTorch's workers: the fastest training loop, the loop of a course, and a large matrix product."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.speed.config import CHECKPOINTS, Task, Unavailable
from experiments.speed.workers import DOTS_PER_ROUND, Point, Work, checkpointing, dot_factors, sweep, training
from jax_cnn.data import epoch_order, load_fashion_mnist
from torch_ref.model import SimpleCNN
from torch_ref.train import criterion
from torch_ref.trainer import TorchTrainer

CHANNELS_LAST = (
    "torch-channels-last",
    "torch-default-waiting",
    "torch-compile",
    "gpu-torch-channels-last",
    "gpu-torch-graph-channels-last",
)


def make(task: Task) -> Work:
    """Build the work of a task.

    Raises:
        Unavailable: torch.compile does not work here, or a CUDA graph is asked for and there is no GPU.
    """
    torch.set_num_threads(task.threads)
    if task.contender == "torch-dot":
        return dot(task.seed)
    if task.batch_sizes:
        return make_sweep(task)
    if task.contender in ("torch-course", CHECKPOINTS["torch"]):
        order = partial(epoch_order, task.config.seed)
        trainer = TorchTrainer(task.config, epoch_order=order, device=torch.device("cpu"))
        return checkpointing(trainer) if task.contender == CHECKPOINTS["torch"] else training(trainer.train_epoch)
    loop = Loop(task, *load_images(task, torch.device("cpu")), task.batch_size)
    return training(loop.train_epoch, loop.compile() if task.contender == "torch-compile" else 0.0)


def make_sweep(task: Task) -> Work:
    """Build a loop for every precision and batch size, all fed from the same images in the device's memory."""
    device = torch.device("cuda" if task.device == "gpu" else task.device)
    if device.type == "cpu" and "graph" in task.contender:
        raise Unavailable("a CUDA graph needs a GPU")
    images, labels = load_images(task, device)
    started = time.perf_counter()
    points = {}
    for precision, size in task.points:
        try:
            loop = Loop(task, images, labels, size, precision)
            loop.prepare()
            loop.train()  # which compiles
        except RuntimeError as error:
            raise Unavailable(f"{precision}, {size}: {str(error).strip().splitlines()[0]}") from error
        points[f"{precision}, {size}"] = Point(task.images // size, loop.train)
    return sweep(points, time.perf_counter() - started)


def load_images(task: Task, device: torch.device) -> tuple[Tensor, Tensor]:
    """Load the images and the labels of a round onto a device.

    The images are kept as float32: to fetch a batch of uint8 and convert it takes about twice as long.
    """
    data = load_fashion_mnist(task.config.data_dir)
    images = torch.from_numpy(data.train_images[: task.images].astype("float32"))[:, None].to(device) / 255
    return images, torch.from_numpy(data.train_labels[: task.images].astype("int64")).to(device)


class Loop:
    """The course's loop without its DataLoader. No image and no loss leaves the device before the end of an epoch."""

    def __init__(self, task: Task, images: Tensor, labels: Tensor, size: int, precision: str = "float32") -> None:
        """Draw the same weights as the course's loop. `size` is that of a batch."""
        name, adam = task.contender, task.config.adam
        self._name = name
        self._layout = torch.channels_last if name in CHANNELS_LAST else torch.contiguous_format
        self._seed, self._size, self._precision, self._device = task.seed, size, precision, images.device.type
        self._images, self._labels = images.to(memory_format=self._layout), labels
        torch.manual_seed(task.seed)
        self._model = SimpleCNN().to(images.device).to(memory_format=self._layout)
        self._optimizer = torch.optim.Adam(
            self._model.parameters(),
            lr=adam.learning_rate,
            betas=(adam.b1, adam.b2),
            eps=adam.eps,
            fused=not name.endswith("adam"),
            capturable="graph" in name,
        )
        full = len(images) - len(images) % size
        self._batches = list(zip(self._images[:full].split(size), labels[:full].split(size), strict=True))
        self._step: Callable[[Tensor, Tensor], Tensor] = self._eager_step
        self._loss: Callable[[Tensor, Tensor], Tensor] = self._compute_loss

    def prepare(self) -> None:
        """Compile the loss, or record a step, if the contender does."""
        if self._name.endswith(("compile", "autotune")):
            mode = "max-autotune" if self._name.endswith("autotune") else None
            self._loss = torch.compile(self._compute_loss, dynamic=False, mode=mode)
        elif "graph" in self._name:
            self._step = self._record()

    def train_epoch(self, epoch: int) -> Iterator[tuple[int, Tensor]]:
        """Train on every image once. After each step yield the number of its images and their mean loss."""
        order = torch.from_numpy(epoch_order(self._seed, epoch, len(self._images)))
        for batch in order.split(self._size):
            yield len(batch), self._step(self._images[batch], self._labels[batch])

    def train(self) -> float:
        """Train on all full batches in the order of the images, and return the last loss, which waits for the GPU."""
        self._allow_tf32()
        for images, labels in self._batches:
            loss = self._step(images, labels)
        return loss.item()

    def compile(self) -> float:
        """Compile the forward and backward pass for full batches and for a smaller last one; return the seconds.

        Raises:
            Unavailable: there is no C++ compiler, or it fails.
        """
        started = time.perf_counter()
        self.prepare()
        for size in {min(self._size, len(self._images)), len(self._images) % self._size} - {0}:
            try:
                self._loss(self._images[torch.arange(size)], self._labels[:size]).backward()
            except RuntimeError as error:  # all errors of torch.compile are subclasses of it
                raise Unavailable(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error
        return time.perf_counter() - started

    def _allow_tf32(self) -> None:
        """Let products and convolutions round to TensorFloat-32, or not. It is a setting of the process."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self._precision == "tf32"

    def _compute_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self._device, torch.bfloat16, self._precision == "bfloat16", cache_enabled=False):
            logits = self._model(images.to(memory_format=self._layout))
        return criterion(logits.float(), labels)

    def _eager_step(self, images: Tensor, labels: Tensor) -> Tensor:
        self._optimizer.zero_grad()
        loss = self._loss(images, labels)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def _record(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Record a step as a CUDA graph, after three steps on a stream of their own, as PyTorch's documentation says.

        The graph reads its batch from always the same memory, and writes its loss there.
        """
        self._allow_tf32()
        inputs = [tensor.clone() for tensor in self._batches[0]]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._eager_step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._eager_step(*inputs)

        def step(images: Tensor, labels: Tensor) -> Tensor:
            inputs[0].copy_(images)
            inputs[1].copy_(labels)
            graph.replay()
            return loss

        return step


def dot(seed: int) -> Work:
    """Return work whose round multiplies large float32 matrices, each with the result of the last.

    No memory is allocated in between.
    """
    first, right = map(torch.from_numpy, dot_factors(seed))
    results = torch.empty_like(first), torch.empty_like(first)  # written in turns

    def multiply_all(number: int) -> dict[str, Any]:
        left = first
        for product in range(DOTS_PER_ROUND):
            left = torch.mm(left, right, out=results[product % 2])
        return {}

    return Work(multiply_all)
