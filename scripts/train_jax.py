"""Train SimpleCNN, or a network without convolution, on FashionMNIST with JAX."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from jax_cnn.config import JaxTrainConfig
from jax_cnn.data import load_fashion_mnist
from jax_cnn.data.files import Say
from jax_cnn.files import check_out_dir
from jax_cnn.run import command_line
from jax_cnn.run.loop import Trainer, fit, follow
from jax_cnn.run.provenance import warn_of_two_cudas
from jax_cnn.run.resume import find_checkpoint
from jax_cnn.torch_layout import TorchDict
from jax_cnn.weights import load_weights
from torch_ref.weights import read_tensors

if TYPE_CHECKING:
    import jax


def main() -> None:
    """Read the command line, get the data, and train."""
    config = command_line.parse(JaxTrainConfig(out_dir=Path("runs/jax")), __doc__)
    initial = (
        load_weights(config.init_weights, config.weights_dtype, config.network, read_tensors, print)
        if config.init_weights
        else None
    )
    check_out_dir(config.out_dir)
    checkpoint = find_checkpoint(config, "jax", print)
    warn_of_two_cudas(config.device, print)

    import jax  # only now: an error should not wait for JAX to load

    from jax_cnn.compiler import keep_compiled_programs
    from jax_cnn.devices import fix_settings, join_processes, pick_devices

    fix_settings()
    keep_compiled_programs()
    join_processes(config)
    devices = pick_devices(config)
    is_first_process = jax.process_index() == 0
    console = Console(quiet=not is_first_process)
    trainer = make_trainer(config, devices, initial, console.print)
    if is_first_process:
        fit(config, trainer, console, checkpoint)
    else:
        follow(config, trainer, checkpoint)


def make_trainer(
    config: JaxTrainConfig, devices: "Sequence[jax.Device]", initial: TorchDict | None, say: Say
) -> Trainer:
    """Get the data, and compile for the devices."""
    from jax_cnn.trainer import JaxTrainer

    data = load_fashion_mnist(config.data_dir, say, any_data=config.any_data)
    say(f"jax: compiling for {devices[0].platform}")
    return JaxTrainer(config, data, devices, initial, config.dialect)


if __name__ == "__main__":
    command_line.run(main)
