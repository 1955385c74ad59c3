"""Provenance of a result: versions, hardware, command. It is stored in the same file as the result."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from jax_cnn.config import Device


def provenance(packages: Iterable[str]) -> dict[str, Any]:
    """Return the command line, the time (UTC, ISO 8601), the machine, and the versions of Python and these packages.

    The variables that JAX and XLA read are in it too, if there are any.
    """
    variables = {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": usable_cores(), "system": f"{platform.system()} {platform.machine()}"},
        "versions": {"python": platform.python_version()} | {name: package_version(name) for name in packages},
        **({"environment": variables} if variables else {}),
    }


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Return the name of the processor, or its architecture where the system does not give a name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def package_version(name: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def cuda_versions(names: Iterable[str]) -> list[str]:
    """Return the major versions of CUDA that packages of these names bring, in order: `nvidia-cudnn-cu13` brings 13."""
    matches = (re.match(r"nvidia[-_].+[-_]cu(\d+)$|jax[-_]cuda(\d+)[-_]", name) for name in names)
    return sorted({match[1] or match[2] for match in matches if match})


def warn_of_two_cudas(device: Device, say: Callable[[str], None]) -> None:
    """Warn of packages of two versions of CUDA before a run on a GPU: their libraries overwrite each other's files.

    With `auto`, a run may be on a GPU if the driver of one is loaded.
    """
    if device == "gpu" or (device == "auto" and Path("/proc/driver/nvidia").exists()):
        versions = cuda_versions(package.name for package in distributions())
        if len(versions) > 1:
            say(
                f"warning: packages of CUDA {' and '.join(versions)} are installed, whose libraries overwrite each "
                "other: a framework may load the wrong ones; install '.[cuda]' or '.[cuda12]' in a new environment"
            )
