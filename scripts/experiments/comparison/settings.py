"""What the comparison trains and shows: its command line."""

from dataclasses import dataclass
from pathlib import Path

from experiments.speed.config import check_range
from jax_cnn.config import Device, TrainConfig, UserError

ROOT = Path(__file__).parents[3]
COMMITTED_BENCHMARK = ROOT / "docs" / "results" / "benchmark" / "benchmark.json"
MOST_PICTURES = 200  # of each grid: the page holds every one of them


@dataclass(frozen=True)
class CompareConfig:
    """What to train, or which finished runs to take, and how much to show."""

    epochs: int = TrainConfig.epochs
    """Passes over the training set."""
    seed: int = TrainConfig.seed
    """Seeds the initial weights, which PyTorch draws for both, and the order of the images."""
    limit_train: int | None = None
    """Train on the first N images only."""
    limit_test: int | None = None
    """Score the first N test images only."""
    device: Device = "cpu"
    """Where to train."""
    jax_run: Path | None = None
    """Take this finished run of train_jax.py instead of training; one that does not fit is refused."""
    torch_run: Path | None = None
    """Likewise of train_torch.py."""
    retrain: bool = False
    """Train anew even where the output folder holds finished runs with the same configuration."""
    drift_steps: int = 300
    """Training steps of the drift figure."""
    parity_report: Path | None = None
    """Take the parity table and the drift from this report.json of scripts/parity_report.py instead of measuring."""
    benchmark: Path | None = None
    """The benchmark.json of the speed table; the one that comes with the project if not given."""
    run_benchmark: bool = False
    """Measure the speed table here and now (scripts/benchmark.py --quick, which takes minutes)."""
    images: int = 24
    """Test images in the grid of predictions."""
    disagreements: int = 24
    """At most so many of the test images on which the two disagree."""
    data_dir: Path = TrainConfig.data_dir
    """Where the data set is, or is put."""
    out_dir: Path = Path("runs/compare")
    """Where the page, its figures and the two runs are written. An earlier page is moved aside, not overwritten."""

    def __post_init__(self) -> None:
        check_range("--drift-steps", self.drift_steps, 1, 1_000)
        check_range("--images", self.images, 1, MOST_PICTURES)
        check_range("--disagreements", self.disagreements, 1, MOST_PICTURES)
        if self.run_benchmark and self.benchmark is not None:
            raise UserError("--run-benchmark measures anew and --benchmark FILE takes what was measured: give one")
        if self.retrain and (self.jax_run or self.torch_run):
            raise UserError("--retrain trains both and --jax-run or --torch-run takes a finished run: give one")
        self.training("jax")  # which checks the rest

    def training(self, framework: str) -> TrainConfig:
        """The run that one framework is to do."""
        return TrainConfig(
            epochs=self.epochs,
            seed=self.seed,
            data_dir=self.data_dir,
            out_dir=self.out_dir / framework,
            device=self.device,
            init_weights=self.initial_weights,
            limit_train=self.limit_train,
            limit_test=self.limit_test,
        )

    @property
    def initial_weights(self) -> Path:
        """Where the weights are kept from which both start."""
        return self.out_dir / f"initial-{self.seed}.safetensors"
