"""What functions with a custom gradient, and kernels, need inside `jax.shard_map`."""

import jax


def varying_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """x, said to vary over the mesh axes of `shard_map` that `like` varies over.

    A custom gradient must return cotangents that vary as their arguments do, and each device has
    its own part of the gradient by an argument that they share.
    """
    axes = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x
