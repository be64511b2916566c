"""What is tested with the newest jax alone."""

import jax
import pytest

# For what takes long: most cases of kernels, which are interpreted, and some whole runs. What users
# of the oldest jax meet first (scripts, loop, heads, sharding) is tested with every version.
newest_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="long, and runs with the newest jax alone"
)
