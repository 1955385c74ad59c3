"""Train SimpleCNN, or a network without convolution, on FashionMNIST with JAX."""

from pathlib import Path

from rich.console import Console

from jax_cnn.config import JaxTrainConfig
from jax_cnn.data import load_fashion_mnist
from jax_cnn.run import command_line
from jax_cnn.run.folder import check_out_dir
from jax_cnn.run.loop import fit, follow
from jax_cnn.run.resume import find_checkpoint
from jax_cnn.torch_layout import load_weights


def main() -> None:
    """Read the command line, get the data, and train."""
    config = command_line.parse(JaxTrainConfig(out_dir=Path("runs/jax")), __doc__)
    initial = load_weights(config.init_weights, config.weights_dtype, config.network) if config.init_weights else None
    check_out_dir(config.out_dir)
    checkpoint = find_checkpoint(config, "jax", print)

    import jax  # only now: an error should not wait for JAX to load

    from jax_cnn.compiler import keep_compiled_programs
    from jax_cnn.devices import join_processes, pick_devices
    from jax_cnn.trainer import JaxTrainer

    keep_compiled_programs()
    join_processes(config)
    devices = pick_devices(config)
    is_first_process = jax.process_index() == 0
    console = Console(quiet=not is_first_process)
    data = load_fashion_mnist(config.data_dir, console.print)
    console.print(f"jax: compiling for {devices[0].platform}")
    trainer = JaxTrainer(config, data, devices, initial, config.dialect)
    if is_first_process:
        fit(config, trainer, console, checkpoint)
    else:
        follow(config, trainer, checkpoint)


if __name__ == "__main__":
    command_line.run(main)
