"""The work of PyTorch's workers: the fastest training loop, the loop of a course, and a large matrix product."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.speed.config import CHECKPOINTS, Task, Unavailable
from experiments.speed.work import DOTS_PER_ROUND, Checkpointing, Point, Sweep, Training, Work, dot_factors
from jax_cnn.data import epoch_order, load_fashion_mnist
from torch_ref.model import SimpleCNN
from torch_ref.train import criterion
from torch_ref.trainer import TorchTrainer


def make(task: Task) -> Work:
    """Build the work of a task.

    Raises:
        Unavailable: there is no compiler for torch.compile.
    """
    torch.set_num_threads(task.threads)
    if task.contender == "torch-dot":
        return Dot(task.seed)
    if task.batch_sizes:
        return make_sweep(task)
    if task.contender in ("torch-course", CHECKPOINTS["torch"]):
        order = partial(epoch_order, task.config.seed)
        trainer = TorchTrainer(task.config, epoch_order=order, device=torch.device("cpu"))
        return Checkpointing(trainer) if task.contender == CHECKPOINTS["torch"] else Training(trainer.train_epoch)
    loop = InMemoryLoop(
        task,
        fused=task.contender != "torch-adam",
        channels_last=task.contender not in ("torch-adam", "torch-fused"),
    )
    return Training(loop.train_epoch, loop.compile() if task.contender == "torch-compile" else 0.0)


class InMemoryLoop:
    """The course's loop without its DataLoader. It reads no number back before the end of an epoch."""

    def __init__(self, task: Task, *, fused: bool, channels_last: bool) -> None:
        """Load the images of a round, and draw the same initial weights as the course's loop."""
        data, adam = load_fashion_mnist(task.config.data_dir), task.config.adam
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        # Kept as float32: to fetch a batch of uint8 and convert it takes about twice as long.
        self._images = torch.from_numpy(data.train_images[: task.images].astype("float32"))[:, None] / 255
        self._labels = torch.from_numpy(data.train_labels[: task.images].astype("int64"))
        self._task = task
        torch.manual_seed(task.seed)
        self._model: nn.Module = SimpleCNN().to(memory_format=self._format)
        self._optimizer = torch.optim.Adam(
            self._model.parameters(), lr=adam.learning_rate, betas=(adam.b1, adam.b2), eps=adam.eps, fused=fused
        )

    def train_epoch(self, epoch: int) -> Iterator[tuple[int, Tensor]]:
        """Train on every image once. After each step yield the number of its images and their mean loss."""
        order = torch.from_numpy(epoch_order(self._task.seed, epoch, len(self._images)))
        for batch in order.split(self._task.batch_size):
            self._optimizer.zero_grad()
            loss = self._loss(batch)
            loss.backward()
            self._optimizer.step()
            yield len(batch), loss.detach()

    def compile(self) -> float:
        """Compile the forward and backward pass for full batches and for a smaller last one; return the seconds.

        Raises:
            Unavailable: there is no C++ compiler, or it fails.
        """
        started = time.perf_counter()
        self._model.compile(dynamic=False)
        sizes = {min(self._task.batch_size, self._task.images), self._task.images % self._task.batch_size} - {0}
        for size in sizes:
            try:
                self._loss(torch.arange(size)).backward()
            except RuntimeError as error:  # all errors of torch.compile are subclasses of it
                raise Unavailable(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error
        return time.perf_counter() - started

    def _loss(self, batch: Tensor) -> Tensor:
        images = self._images[batch].to(memory_format=self._format)
        return criterion(self._model(images), self._labels[batch])


def make_sweep(task: Task) -> Sweep:
    """Build a loop for every precision and batch size, all fed from the same images in the device's memory.

    Raises:
        Unavailable: torch.compile does not work here, or a CUDA graph is asked for and there is no GPU.
    """
    device = torch.device("cuda" if task.device == "gpu" else task.device)
    if device.type == "cpu" and "graph" in task.contender:
        raise Unavailable("a CUDA graph needs a GPU")
    data = load_fashion_mnist(task.config.data_dir)
    images = torch.from_numpy(data.train_images[: task.images].astype("float32"))[:, None].to(device) / 255
    labels = torch.from_numpy(data.train_labels[: task.images].astype("int64")).to(device)
    started = time.perf_counter()
    points = {}
    for precision, size in task.points:
        try:
            loop = DeviceLoop(task, images, labels, precision, size)
            loop.train()  # which compiles
        except RuntimeError as error:
            raise Unavailable(f"{precision}, {size}: {str(error).strip().splitlines()[0]}") from error
        points[f"{precision}, {size}"] = Point(task.images // size, loop.train)
    return Sweep(points, time.perf_counter() - started)


class DeviceLoop:
    """The training loop on a GPU, step by step or as a CUDA graph. No image and no loss leaves the GPU meanwhile."""

    def __init__(self, task: Task, images: Tensor, labels: Tensor, precision: str, size: int) -> None:
        """Draw the weights, and compile or record a step if the contender does."""
        name, adam = task.contender, task.config.adam
        layout = torch.channels_last if "channels-last" in name else torch.contiguous_format
        batches = zip(images.to(memory_format=layout).split(size), labels.split(size), strict=True)
        self._batches = [batch for batch in batches if len(batch[0]) == size]
        self._precision, self._device = precision, images.device.type
        torch.manual_seed(task.seed)
        self._model = SimpleCNN().to(images.device).to(memory_format=layout)
        self._optimizer = torch.optim.Adam(
            self._model.parameters(),
            lr=adam.learning_rate,
            betas=(adam.b1, adam.b2),
            eps=adam.eps,
            fused=not name.endswith("adam"),
            capturable="graph" in name,
        )
        self._step: Callable[[Tensor, Tensor], Tensor] = self._eager_step
        self._loss: Callable[[Tensor, Tensor], Tensor] = self._compute_loss
        if name.endswith(("compile", "autotune")):
            mode = "max-autotune" if name.endswith("autotune") else None
            self._loss = torch.compile(self._compute_loss, dynamic=False, mode=mode)
        elif "graph" in name:
            self._step = self._record()

    def train(self) -> float:
        """Train on all batches, and return the last loss, which waits for the GPU."""
        self._allow_tf32()
        for images, labels in self._batches:
            loss = self._step(images, labels)
        return loss.item()

    def _allow_tf32(self) -> None:
        """Let products and convolutions round to TensorFloat-32, or not. It is a setting of the process."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self._precision == "tf32"

    def _compute_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self._device, torch.bfloat16, self._precision == "bfloat16", cache_enabled=False):
            logits = self._model(images)
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


class Dot(Work):
    """Large float32 matrix products, each with the result of the last. No memory is allocated in between."""

    def __init__(self, seed: int) -> None:
        self._left, self._right = map(torch.from_numpy, dot_factors(seed))
        self._results = torch.empty_like(self._left), torch.empty_like(self._left)  # written in turns

    def round(self, number: int) -> dict[str, Any]:
        """Multiply `DOTS_PER_ROUND` times."""
        left = self._left
        for product in range(DOTS_PER_ROUND):
            left = torch.mm(left, self._right, out=self._results[product % 2])
        return {}
