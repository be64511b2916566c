"""Positions in blocks of one group: each once, and never more blocks than were made."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqcx_jax.ops.hierarchical.grouping import block_size, make_blocks

make = jax.jit(make_blocks, static_argnums=(1, 2))


def check(group: np.ndarray, num_groups: int, size: int) -> None:
    slot, group_of_block = (np.asarray(x) for x in make(group, num_groups, size))
    assert len(set(slot)) == len(group)
    assert slot.min() >= 0 and slot.max() < len(group_of_block) * size
    np.testing.assert_array_equal(group_of_block[slot // size], group)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(1, 1), (5, 3), (20, 3), (20, 50)]), st.sampled_from([1, 4, 7]), st.data())
def test_every_position_has_a_slot_in_a_block_of_its_group(
    shape: tuple[int, int], size: int, data: st.DataObject
) -> None:
    n, num_groups = shape
    group = data.draw(st.lists(st.integers(0, num_groups - 1), min_size=n, max_size=n))
    check(np.asarray(group), num_groups, size)


@pytest.mark.parametrize(("n", "num_groups"), [(1, 1), (7, 3), (1000, 33), (33, 1000)])
def test_blocks_hold_at_most_twice_the_positions(n: int, num_groups: int) -> None:
    size = block_size(n, num_groups)
    assert size >= 1
    blocks = make(np.arange(n) % num_groups, num_groups, size)
    assert len(blocks.group) * size <= 2 * n


@pytest.mark.parametrize("size", [1, 4])
def test_one_group_and_all_groups(size: int) -> None:
    check(np.full(20, 2), 5, size)
    check(np.arange(20), 20, size)
