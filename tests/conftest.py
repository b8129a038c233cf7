"""Every test runs strictly: float64 on, strict promotion, four CPU devices, checked shapes."""

import os
from importlib.metadata import version

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=4"
    # Most of the time goes into compiling, for small arrays: optimise less, in one thread.
    " --xla_backend_optimization_level=0"
    " --xla_cpu_parallel_codegen_split_count=1"
    " --xla_cpu_multi_thread_eigen=false"
)
if version("jaxlib").startswith("0.10."):  # others refuse the flag, which saves two thirds
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

with install_import_hook("hullgeo", "beartype.beartype"):
    import hullgeo  # noqa: F401

import hypothesis
import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, max_examples=25, database=None
)
hypothesis.settings.load_profile("fixed")


@pytest.fixture
def plain_types():
    """Without the runtime shape checks, so that the library's own messages are seen."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)
