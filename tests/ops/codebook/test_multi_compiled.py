"""What the losses of several codebooks compile to: small memory, and the same on a mesh."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from multi_cases import Case, Inputs, definition, loss_from_h, make, nll_of, values_and_gradients
from versions import oldest_jax

from vqcx_jax.ops.codebook import bilinear, multi, streaming

# As users compile it.
pytestmark = [oldest_jax, pytest.mark.usefixtures("fully_optimized")]

PATHS = {"bilinear": bilinear.nll, "streaming": nll_of(streaming.log_z)}


@pytest.mark.parametrize("path", PATHS)
def test_no_large_temporaries(path: str) -> None:
    """Neither N V, nor for two codebooks N K1 K2, numbers are ever held."""
    case = Case(20_000, (150, 140), leading=(512,))
    inputs = make(case)

    def temporary_bytes(loss: Callable[..., Any]) -> int:
        compiled = jax.jit(values_and_gradients(loss)).lower(inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    dense = 4 * 512 * 20_000
    assert temporary_bytes(definition("additive")) >= dense
    assert temporary_bytes(loss_from_h(PATHS[path], "additive")) < dense / 5


def test_product_codes_are_held_a_few_times() -> None:
    """Code logits and their gradients, and not as often as there are codebooks."""
    n, num_codebooks, num_codes = 128, 16, 64

    def loss(h: jax.Array, codebooks: jax.Array, assignment: Any, targets: Any) -> jax.Array:
        code_logits = multi.product_code_logits(h, codebooks)
        return jnp.sum(PATHS["streaming"](code_logits, assignment, targets)[0])

    arguments = (
        jnp.zeros((n, 64)),
        jnp.zeros((num_codebooks, num_codes, 4)),
        jnp.zeros((2000, num_codebooks), jnp.int32),
        jnp.zeros((n,), jnp.int32),
    )
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
    of_code_logits = 4 * n * num_codebooks * num_codes
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * of_code_logits


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("path", PATHS)
def test_shard_map_over_positions(path: str, scale: float) -> None:
    """Each device its own positions; gradients by what they share are summed."""
    inputs = make(Case(300, (64, 50), leading=(16,), logit_scale=scale))
    loss = loss_from_h(PATHS[path], "additive")
    row = PartitionSpec("data")
    whole = PartitionSpec()

    def on_mesh(*args: Any) -> Any:
        in_specs = (row, whole, whole, whole, row)
        return jax.shard_map(loss, in_specs=in_specs, out_specs=(row, row))(*args)

    expected = jax.jit(values_and_gradients(loss))(inputs)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        specs = Inputs(row, whole, whole, whole, row, (row, row))
        actual = jax.jit(values_and_gradients(on_mesh))(jax.device_put(inputs, specs))
    chex.assert_trees_all_close(
        jax.tree.map(np.asarray, actual), expected, rtol=1e-5, atol=1e-5 * scale
    )
