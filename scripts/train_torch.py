"""Train SimpleCNN, or a network without convolution, on FashionMNIST with PyTorch."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from jax_cnn.config import TrainConfig, UserError
from jax_cnn.data import epoch_order, prepare_fashion_mnist
from jax_cnn.data.files import Say
from jax_cnn.files import check_out_dir
from jax_cnn.run import command_line
from jax_cnn.run.loop import Trainer, fit
from jax_cnn.run.provenance import warn_of_two_cudas
from jax_cnn.run.resume import find_checkpoint
from jax_cnn.torch_layout import TorchDict
from jax_cnn.weights import load_weights
from torch_ref.weights import read_tensors


def main() -> None:
    """Read the command line, get the data, and train."""
    config = command_line.parse(TrainConfig(out_dir=Path("runs/torch")), __doc__)
    if config.precision == "bfloat16":
        raise UserError("--precision bfloat16 needs train_jax.py; use that, or --precision float32 or float64")
    initial = (
        load_weights(config.init_weights, config.weights_dtype, config.network, read_tensors, print)
        if config.init_weights
        else None
    )
    check_out_dir(config.out_dir)
    checkpoint = find_checkpoint(config, "torch", print)
    warn_of_two_cudas(config.device, print)

    console = Console()
    fit(config, make_trainer(config, initial, console.print), console, checkpoint)


def make_trainer(config: TrainConfig, initial: TorchDict | None, say: Say) -> Trainer:
    """Pick the device, and get the data."""
    from torch_ref.trainer import TorchTrainer, pick_device  # only now: an error should not wait for PyTorch

    try:
        device = pick_device(config.device)
    except ValueError as error:
        raise UserError(f"--device {config.device}: {error}") from None
    root = prepare_fashion_mnist(config.data_dir, say, any_data=config.any_data)
    return TorchTrainer(
        replace(config, data_dir=root), epoch_order=partial(epoch_order, config.seed), device=device, initial=initial
    )


if __name__ == "__main__":
    command_line.run(main)
