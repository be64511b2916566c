"""Host batches (this process's rows) to global device arrays."""

import jax
import numpy as np

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.sharding import named_sharding


def to_microbatches(
    batch: dict[str, np.ndarray],
    num_microbatches: int,
    mesh: jax.sharding.Mesh,
    rules: ShardingRules,
) -> dict[str, jax.Array]:
    """(b, T) arrays of this process -> global (A, B/A, T) arrays, rows sharded as "batch".

    Args:
        batch: int32 (b, T) each, b = B / number of processes.
        num_microbatches: A.
    """
    sharding = named_sharding(mesh, (None, "batch", None), rules)
    return {
        name: jax.make_array_from_process_local_data(
            sharding, rows.reshape(num_microbatches, -1, rows.shape[-1])
        )
        for name, rows in batch.items()
    }
