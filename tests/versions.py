"""What is tested with one end of the supported versions of jax alone, as it takes long."""

import jax
import pytest

# Most cases of kernels, which are interpreted. What users of the oldest jax meet first (scripts,
# loop, losses and samples of heads, sharding) is tested with every version.
newest_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="long, and runs with the newest jax alone"
)
# Further cases of what has some with every version, and what is plain JAX: the oldest compiles it
# in a third of the time.
oldest_jax = pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason="long, and runs with the oldest jax alone"
)
