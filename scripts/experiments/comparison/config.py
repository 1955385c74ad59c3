"""The command line of scripts/compare.py."""

from dataclasses import dataclass
from pathlib import Path

from experiments.answers import Framework
from experiments.processes import ROOT
from jax_cnn.config import Device, FolderConfig, LimitConfig, SeedConfig, TrainConfig, UserError, check_limits

COMMITTED_BENCHMARK = ROOT / "docs" / "results" / "benchmark" / "benchmark.json"
MOST_PICTURES = 200  # in each of the two grids, because the page holds every picture


@dataclass(frozen=True)
class CompareConfig(FolderConfig, SeedConfig, LimitConfig):
    """The settings of a comparison: what to train, which finished runs to take, and how much to show."""

    any_data: bool = False
    """Train on files of the same format with other contents: own labels, MNIST, KMNIST. The page has their SHA-256."""
    layers: bool = False
    """Train nothing: only print the layers of both networks, with the shapes of their outputs and their parameters."""
    device: Device = "cpu"
    """Device to train on."""
    jax_run: Path | None = None
    """Take this finished run of train_jax.py instead of training. It must fit the other flags."""
    torch_run: Path | None = None
    """Take this finished run of train_torch.py instead of training. It must fit the other flags."""
    retrain: bool = False
    """Train again even if the output folder holds finished runs with the same configuration."""
    drift_steps: int = 300
    """Number of training steps in the drift figure."""
    parity_report: Path | None = None
    """Take the parity table and the drift from this report.json of scripts/parity_report.py instead of measuring."""
    benchmark: Path | None = None
    """The benchmark.json for the speed table. Without this flag it is the one that comes with the project."""
    run_benchmark: bool = False
    """Measure the speed table now with scripts/benchmark.py --quick, which takes minutes."""
    images: int = 24
    """Number of test images in the grid of predictions."""
    disagreements: int = 24
    """Show at most this number of the test images on which the two frameworks disagree."""
    out_dir: Path = Path("runs/compare")
    """Folder for the page, its figures and the two runs. An earlier page in it is moved aside, not overwritten."""

    def __post_init__(self) -> None:
        pictures = (1, MOST_PICTURES)
        check_limits(self, {"drift_steps": (1, 1_000), "images": pictures, "disagreements": pictures})
        if self.run_benchmark and self.benchmark is not None:
            raise UserError(
                "--run-benchmark measures again and --benchmark FILE takes earlier results: give one of them"
            )
        if self.retrain and (self.jax_run or self.torch_run):
            raise UserError("--retrain trains both and --jax-run or --torch-run takes a finished run: give one of them")
        self.training("jax")  # which checks the other fields

    @property
    def initial_weights(self) -> Path:
        """The file of the weights from which both frameworks start."""
        return self.out_dir / f"initial-{self.seed}.safetensors"

    def training(self, framework: Framework) -> TrainConfig:
        """Return the configuration of one framework's training run."""
        return TrainConfig(
            epochs=self.epochs,
            seed=self.seed,
            data_dir=self.data_dir,
            out_dir=self.out_dir / framework,
            any_data=self.any_data,
            device=self.device,
            init_weights=self.initial_weights,
            limit_train=self.limit_train,
            limit_test=self.limit_test,
        )

    def named_run(self, framework: Framework) -> Path | None:
        """Return the folder of the finished run that the command line names for this framework."""
        return self.jax_run if framework == "jax" else self.torch_run
