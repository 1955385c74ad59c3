"""How XLA compiles here: options that make its CPU programs faster, and where compiled programs are kept."""

import functools
import os
import warnings
from pathlib import Path

import jax
from platformdirs import user_cache_path

CPU_OPTIONS: dict[str, str | bool] = {
    # Matrix products by YNNPACK, convolutions by Eigen: jaxlib 0.10 gives both to YNNPACK, which is slower here (5 ms).
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    # Updates the weights in place in the loop, without copying each first (0.6 ms).
    "xla_cpu_copy_insertion_use_region_analysis": True,
}


def compiler_options(platform: str) -> dict[str, str | bool]:
    """Those of `CPU_OPTIONS` that this jaxlib knows: unlike a name in XLA_FLAGS, an unknown option can be left out."""
    return {name: value for name, value in CPU_OPTIONS.items() if accepted(name)} if platform == "cpu" else {}


@functools.cache
def accepted(name: str) -> bool:
    """Whether XLA takes this option, found by compiling nothing with it."""
    try:
        jax.jit(lambda: 0, compiler_options={name: CPU_OPTIONS[name]}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def keep_compiled_programs() -> None:
    """Let JAX keep compiled programs between runs, in the user's cache folder; a second run then starts faster.

    JAX finds a program again by its code, its options, the versions of jaxlib and XLA, and the devices; of a CPU, its
    name and every instruction that it knows, so that machines of different kinds may share a home folder. Whoever sets
    JAX_COMPILATION_CACHE_DIR chooses another folder. Where nothing can be kept or read, all is compiled as before.

    A jaxlib before 0.10.2 loads what it kept on a CPU with AVX-512 under protest, in many lines on stderr
    (jax-ml/jax#38445): there nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = programs_folder()
        if jax.__version_info__ < (0, 10, 2) or folder is None:
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def programs_folder() -> Path | None:
    """In the user's cache folder; None for a user without a home."""
    try:
        folder = user_cache_path("jax-cnn-parity") / "programs"
    except RuntimeError:  # as later versions of platformdirs say it
        return None
    return folder if folder.is_absolute() else None  # and earlier ones: "~"
