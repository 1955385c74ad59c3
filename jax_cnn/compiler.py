"""XLA's options for faster CPU programs, and the folder in which compiled programs are kept."""

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
if jax.__version_info__ < (0, 10):
    # XNNPACK packs weights once and knows them by their address. Training updates them in place, so that from the
    # second epoch on the evaluation used old weights (seen with jaxlib 0.8.1 on an AMD EPYC).
    CPU_OPTIONS["xla_cpu_use_xnnpack"] = False


def compiler_options(platform: str) -> dict[str, str | bool]:
    """Return the options of `CPU_OPTIONS` that this jaxlib knows; none on another platform.

    They are not given in the variable XLA_FLAGS, because an unknown name there would end the process.
    """
    if platform != "cpu":
        return {}
    return {name: value for name, value in CPU_OPTIONS.items() if accepted(name)}


@functools.cache
def accepted(name: str) -> bool:
    """Return whether XLA accepts this option: compile an empty program with it."""
    try:
        jax.jit(lambda: 0, compiler_options={name: CPU_OPTIONS[name]}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def keep_compiled_programs() -> None:
    """Let JAX keep compiled programs in the user's cache folder, so that the next run starts faster.

    JAX finds a program by its code, its options, the versions of jaxlib and XLA, and the devices. For a CPU these
    include its name and instructions, so machines of different kinds can share a home folder. The variable
    JAX_COMPILATION_CACHE_DIR chooses another folder. If the folder cannot be read or written, everything is compiled.

    A jaxlib before 0.10.2 prints many lines on stderr when it loads a program that it kept on a CPU with AVX-512
    (jax-ml/jax#38445). With such a version nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = programs_folder()
        if jax.__version_info__ < (0, 10, 2) or folder is None:
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")


def programs_folder() -> Path | None:
    """Return the folder for compiled programs, or None for a user without a home."""
    try:
        folder = user_cache_path("jax-cnn-parity") / "programs"
    except RuntimeError:  # later versions of platformdirs raise, earlier ones return "~"
        return None
    return folder if folder.is_absolute() else None
