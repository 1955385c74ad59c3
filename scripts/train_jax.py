"""Train SimpleCNN on FashionMNIST with JAX."""

from pathlib import Path

from rich.console import Console

from jax_cnn import fashion_mnist
from jax_cnn.config import TrainConfig
from jax_cnn.shell import command_line
from jax_cnn.shell.fit import fit
from jax_cnn.shell.run_folder import check_out_dir
from jax_cnn.weights import load_weights


def main() -> None:
    """Read the command line, get the data, train."""
    config = command_line.parse(TrainConfig(out_dir=Path("runs/jax")), __doc__)
    initial = load_weights(config.init_weights, config.precision) if config.init_weights else None
    check_out_dir(config.out_dir)

    from jax_cnn.trainer import JaxTrainer, pick_device  # only now: a slip should not wait for JAX to load

    device = pick_device(config.device)
    console = Console()
    data = fashion_mnist.load(config.data_dir, console.print)
    console.print(f"jax: compiling for {device.platform}")
    fit(config, JaxTrainer(config, data, device, initial), console)


if __name__ == "__main__":
    command_line.run(main)
