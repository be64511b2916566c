"""Tiles of packed rows in which no query meets a key of its document."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from versions import newest_jax

from vqcx_jax.ops.flash_attention.block_sizes import BlockSizes
from vqcx_jax.ops.flash_attention.tiles import make_plan, visible
from vqcx_jax.ops.flash_attention.tpu import attend
from vqcx_jax.ops.flash_attention.tpu_common import meeting_tiles


def exact(ids: np.ndarray, plan: Any, block_q: int, block_kv: int, first: int) -> np.ndarray:
    found = np.zeros((len(ids), plan.num_steps), bool)
    for row, of_row in enumerate(ids):
        for step, (q, k) in enumerate(zip(plan.q_block, plan.k_block + first, strict=True)):
            queries = of_row[q * block_q : (q + 1) * block_q]
            found[row, step] = np.isin(queries, of_row[k * block_kv : (k + 1) * block_kv]).any()
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("is_packed", [True, False])
def test_none_is_left_out(is_packed: bool, causal: bool) -> None:
    """Of any ids; and of documents cut at multiples of 128, with padding, none is taken in vain."""
    length, block_q, block_kv, first = 1024, 256, 128, 2
    rng = np.random.default_rng(0)
    ids = rng.integers(50, size=(3, length))
    if is_packed:
        ids = np.sort(rng.integers(1, 5, size=(3, length // 128)), axis=1).repeat(128, axis=1)
        ids[0, -300:] = 0
    plan = make_plan(visible(causal, None, length), length, block_q, block_kv, range(first, 8))
    tables = meeting_tiles(jnp.asarray(ids[:, None]), plan, block_q, block_kv, first)
    expected = exact(ids, plan, block_q, block_kv, first)
    assert np.all(np.asarray(tables, bool) >= expected)
    if is_packed:
        assert not expected.all()
        np.testing.assert_array_equal(np.asarray(tables, bool)[1:], expected[1:])


@newest_jax
@pytest.mark.parametrize("causal", [True, False])
def test_other_documents_are_not_read(causal: bool) -> None:
    """Masked weights are 0, and 0 times NaN is NaN: tiles without a pair are not computed."""
    length, half = 256, 128
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, length, 1, 16)) for key in keys)
    v = v.at[:, :half].set(jnp.nan)
    positions = jnp.arange(length)[None]
    segment_ids = 1 + positions // half

    def outputs(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(
            q,
            k,
            v,
            frequencies=jnp.ones(8),
            delta=None,
            bias=None,
            positions=positions,
            segment_ids=segment_ids,
            scale=0.25,
            causal=causal,
            block_sizes=BlockSizes(128, 128, 128, 128, sub_q=128, sub_kv_backward=128),
            interpret=pltpu.InterpretParams(),
        )

    y, pull_back = jax.vjp(outputs, q, k, v)
    assert np.isnan(y[:, :half]).all() and np.isfinite(y[:, half:]).all()
    gradients = pull_back(jnp.ones_like(y).at[:, :half].set(0))
    for gradient in gradients:
        assert np.isfinite(gradient[:, half:]).all() and np.any(gradient[:, half:] != 0)
