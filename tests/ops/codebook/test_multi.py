"""Code logits of several codebooks, the token logits they add up to, and what is refused."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from multi_cases import CASES, FORMS, Case, make, nll_of

from vqcx_jax.errors import UserError
from vqcx_jax.ops.codebook import bilinear, multi, streaming

LOGITS_CASES = {
    **{name: CASES[name] for name in ("smallest", "ragged", "one_token_a_cell")},
    "one_codebook": Case(300, (37,)),
    "five_codebooks": Case(300, (7, 20, 13, 2, 1)),
    "four_codebooks_product": Case(300, (7, 20, 13, 2), "product"),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", LOGITS_CASES.values(), ids=LOGITS_CASES.keys())
def test_logits_equal_definition(case: Case, dtype: Any, in_float64: Any) -> None:
    x = make(case, dtype)
    code_logits, definition = FORMS[case.form]
    expected = in_float64(definition, x.h, x.codebooks, x.assignment, x.bias)
    l = code_logits(x.h, x.codebooks)
    assert [y.shape for y in l] == [(*case.leading, k) for k in case.num_codes]
    actual = jax.jit(multi.logits)(l, x.assignment, x.bias)
    assert actual.dtype == jnp.float32
    chex.assert_trees_all_close(actual, expected.astype(np.float32), rtol=0, atol=1e-5)
    of_targets = multi.target_logits(l, x.assignment, x.targets, x.bias)
    expected = np.take_along_axis(expected, np.asarray(x.targets)[..., None], axis=-1)[..., 0]
    chex.assert_trees_all_close(of_targets, expected.astype(np.float32), rtol=0, atol=1e-5)


def test_product_codebooks_may_differ_in_width() -> None:
    h = jnp.arange(5.0)
    l1, l2 = multi.product_code_logits(h, [jnp.ones((2, 2)), jnp.ones((3, 3))])
    np.testing.assert_array_equal(l1, [1.0] * 2)
    np.testing.assert_array_equal(l2, [9.0] * 3)


def test_product_codebooks_must_cover_h() -> None:
    with pytest.raises(UserError, match=r"codebooks have widths \[2, 2\]; they must add up to 5"):
        multi.product_code_logits(jnp.zeros(5), [jnp.zeros((3, 2)), jnp.zeros((3, 2))])


@pytest.mark.parametrize("shape", [(7,), (7, 3), (2, 7, 2)])
def test_assignment_must_have_a_column_for_each_codebook(shape: tuple[int, ...]) -> None:
    l = (jnp.zeros((4, 3)), jnp.zeros((4, 2)))
    assignment, targets = jnp.zeros(shape, jnp.int32), jnp.zeros((4,), jnp.int32)
    with pytest.raises(UserError, match=r"assignment has shape .* must be \(vocab_size, 2\)"):
        multi.logits(l, assignment)
    for nll in (bilinear.nll, nll_of(streaming.log_z)):
        with pytest.raises(UserError, match=r"assignment has shape .* must be \(vocab_size, 2\)"):
            nll(l, assignment, targets)


def test_bilinear_takes_two_codebooks() -> None:
    l = (jnp.zeros((4, 3)),) * 3
    with pytest.raises(UserError, match="code_logits has 3 codebooks; the bilinear form takes 2"):
        bilinear.nll(l, jnp.zeros((7, 3), jnp.int32), jnp.zeros((4,), jnp.int32))
