"""Train SimpleCNN, or a network without convolution, on FashionMNIST with PyTorch."""

from pathlib import Path

from rich.console import Console

from jax_cnn.config import TrainConfig, UserError
from jax_cnn.data import epoch_order, prepare_fashion_mnist
from jax_cnn.run import command_line
from jax_cnn.run.folder import check_out_dir
from jax_cnn.run.loop import fit
from jax_cnn.run.resume import check_resumable
from jax_cnn.torch_layout import load_weights


def main() -> None:
    """Read the command line, get the data, train."""
    config = command_line.parse(TrainConfig(out_dir=Path("runs/torch")), __doc__)
    if config.precision == "bfloat16":
        raise UserError(
            "--precision bfloat16 is the JAX version's: use train_jax.py, or --precision float32 or float64"
        )
    initial = load_weights(config.init_weights, config.weights_dtype, config.network) if config.init_weights else None
    check_out_dir(config.out_dir)
    check_resumable(config, "torch", print)

    import torch  # only now: a slip should not wait for PyTorch to load

    from torch_ref.trainer import TorchTrainer, pick_device

    try:
        device = pick_device(config.device)
    except ValueError as error:
        raise UserError(f"--device {config.device}: {error}") from None
    console = Console()
    prepare_fashion_mnist(config.data_dir, console.print)
    trainer = TorchTrainer(
        data_dir=config.data_dir,
        epoch_order=lambda epoch, size: epoch_order(config.seed, epoch, size).tolist(),
        batch_size=config.batch_size,
        learning_rate=config.adam.learning_rate,
        betas=(config.adam.b1, config.adam.b2),
        eps=config.adam.eps,
        seed=config.seed,
        device=device,
        model=config.model,
        hidden=config.hidden,
        dtype=getattr(torch, config.precision),
        initial=initial,
        limit_train=config.limit_train,
        limit_test=config.limit_test,
    )
    fit(config, trainer, console)


if __name__ == "__main__":
    command_line.run(main)
