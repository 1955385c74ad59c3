"""PyTorch's trainer, made in this process as `scripts/train_torch.py` makes it in its own."""

from typing import Any

import torch

from jax_cnn.config import TrainConfig
from jax_cnn.data import epoch_order


def torch_options(config: TrainConfig) -> dict[str, Any]:
    """What `TorchTrainer` is called with for this configuration, in float32 on the CPU, drawing its own weights."""
    return {
        "data_dir": config.data_dir,
        "epoch_order": lambda epoch, size: epoch_order(config.seed, epoch, size).tolist(),
        "batch_size": config.batch_size,
        "learning_rate": config.adam.learning_rate,
        "betas": (config.adam.b1, config.adam.b2),
        "eps": config.adam.eps,
        "seed": config.seed,
        "device": torch.device("cpu"),
        "model": config.model,
        "hidden": config.hidden,
        "limit_train": config.limit_train,
        "limit_test": config.limit_test,
    }
