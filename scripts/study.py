"""Run a study: over many seeds of both frameworks, or over pictures as people save them.

Started again after an interruption, a study over seeds goes on where it stopped.
"""

import os
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console

from experiments.records import ENVIRONMENT
from experiments.studies import accuracy, convolution, pictures
from experiments.studies.accuracy import AccuracyConfig
from experiments.studies.convolution import ConvolutionConfig
from experiments.studies.pictures import PicturesConfig
from jax_cnn.config import UserError
from jax_cnn.files import check_out_dir
from jax_cnn.run import command_line


@dataclass(frozen=True)
class Command:
    """The command line: one of the three studies, with its flags."""

    study: (
        Annotated[AccuracyConfig, tyro.conf.subcommand("accuracy", prefix_name=False)]
        | Annotated[ConvolutionConfig, tyro.conf.subcommand("convolution", prefix_name=False)]
        | Annotated[PicturesConfig, tyro.conf.subcommand("pictures", prefix_name=False)]
    )


def main() -> None:
    """Read the command line and run the study."""
    if not {"accuracy", "convolution", "pictures", "-h", "--help"} & set(sys.argv[1:2]):
        raise UserError("give the study first: study.py accuracy, convolution or pictures (each with --help)")
    study = command_line.parse(Command(tyro.MISSING), __doc__).study
    check_out_dir(study.out_dir)
    os.environ |= ENVIRONMENT  # before PyTorch is loaded to score the networks
    if isinstance(study, ConvolutionConfig):
        convolution.run_study(study, Console())
    elif isinstance(study, PicturesConfig):
        pictures.run_study(study, Console())
    elif not accuracy.run_study(study, Console()):
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)
