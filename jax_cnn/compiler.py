"""How XLA compiles here: options that make its CPU programs faster, and where compiled programs are kept."""

import functools
import os
import warnings

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

    JAX finds a program again by its code, its options, the version of XLA and the devices, for a CPU with the
    instructions that it knows: a home folder may be shared by different machines. Whoever sets
    JAX_COMPILATION_CACHE_DIR chooses another folder. Where nothing can be kept or read, all is compiled as before.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(user_cache_path("jax-cnn-parity") / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
