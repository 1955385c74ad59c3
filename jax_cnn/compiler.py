"""Options for `jax.jit(..., compiler_options=...)` that make XLA's CPU programs faster; empty on any other platform."""

import functools

import jax

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
