"""VQ-Logits with M codebooks: from hidden states to code logits, and from those to token logits.

Token v has one code in each codebook, assignment[v, m], and the logit
    z_v = scale[v] sum_m l^(m)[assignment[v, m]] + bias[v],   l^(m) = codebooks[m] . h,
the code logits; scale and bias are optional.
Additive codebooks see all of h, product codebooks a slice each; from the code logits on there is
no difference. `loss` turns code logits into losses without an array of V columns. Code logits are a
tuple of M float32 arrays (..., K_m); K_m may differ.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from vqcx_jax.errors import UserError
from vqcx_jax.ops.checks import check_per_token
from vqcx_jax.ops.codebook import closed_form
from vqcx_jax.ops.product import product

CodeLogits = tuple[jax.Array, ...]
Form = Literal["additive", "product"]


def code_logits(h: jax.Array, codebooks: Sequence[jax.Array], form: Form) -> CodeLogits:
    """`additive_code_logits` or `product_code_logits`."""
    check_form(form)
    of_form = product_code_logits if form == "product" else additive_code_logits
    return of_form(h, codebooks)


def check_form(form: str) -> None:
    """Raises UserError unless it is one of `Form`."""
    if form not in get_args(Form):
        raise UserError(f"form={form!r}: must be one of {get_args(Form)}")


def additive_code_logits(h: jax.Array, codebooks: Sequence[jax.Array]) -> CodeLogits:
    """Code logits of full-width codebooks.

    Args:
        h: (..., D). codebooks: M arrays (K_m, D) of the same dtype.

    Returns:
        M arrays, float32 (..., K_m).
    """
    # One product, so that the gradient by a bfloat16 h is rounded once and not M times.
    joined = closed_form.code_logits(h, jnp.concatenate(codebooks))
    ends = list(itertools.accumulate(len(codes) for codes in codebooks))
    return tuple(jnp.split(joined, ends[:-1], axis=-1))


def product_code_logits(h: jax.Array, codebooks: Sequence[jax.Array]) -> CodeLogits:
    """Code logits of codebooks that see consecutive slices of h.

    Args:
        h: (..., D). codebooks: M arrays (K_m, D_m) of the same dtype, the D_m adding up to D.

    Returns:
        M arrays, float32 (..., K_m).

    Raises:
        UserError: the widths do not add up to D.
    """
    widths = [codes.shape[1] for codes in codebooks]
    if sum(widths) != h.shape[-1]:
        raise UserError(f"codebooks have widths {widths}; they must add up to {h.shape[-1]}")
    if len({codes.shape for codes in codebooks}) == 1:  # One batched product instead of M.
        h_xMxD = h.reshape(*h.shape[:-1], len(widths), widths[0])
        stacked = product(h_xMxD, jnp.stack(codebooks), "...md,mkd->m...k")
        # Not tuple(stacked): the gradient of M slices is a sum of M arrays as large as the whole.
        return tuple(jnp.unstack(stacked))
    slices = jnp.split(h, list(itertools.accumulate(widths))[:-1], axis=-1)
    return tuple(map(closed_form.code_logits, slices, codebooks))


def additive_vectors(codebooks: Sequence[jax.Array], codes: jax.Array) -> jax.Array:
    """Token vectors, of which `additive_code_logits` are the products with h.

    Args:
        codebooks: M arrays (K_m, D). codes: int (..., M), those of the tokens.

    Returns:
        (..., D).
    """
    return functools.reduce(jnp.add, (c[codes[..., m]] for m, c in enumerate(codebooks)))


def product_vectors(codebooks: Sequence[jax.Array], codes: jax.Array) -> jax.Array:
    """As `additive_vectors`, for `product_code_logits`."""
    return jnp.concatenate([c[codes[..., m]] for m, c in enumerate(codebooks)], axis=-1)


def logits(
    code_logits: CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
) -> jax.Array:
    """V logits, for when somebody asks for them.

    Args:
        code_logits: M arrays (..., K_m). assignment: int (V, M), column m in [0, K_m).
        bias, scale: (V,) or None.

    Returns:
        float32 (..., V).
    """
    check_assignment(code_logits, assignment)
    check_per_token("bias", bias, assignment.shape[0])
    check_per_token("scale", scale, assignment.shape[0])
    columns = enumerate(code_logits)
    z = sum((l[..., assignment[:, m]] for m, l in columns), start=jnp.float32(0))
    if scale is not None:
        z = z * scale.astype(jnp.float32)
    return z if bias is None else z + bias.astype(jnp.float32)


def listed_logits(
    code_logits: CodeLogits,
    assignment: jax.Array,
    tokens: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
) -> jax.Array:
    """Z of I listed tokens of each position: float32 (..., I), for int (..., I) in [0, V)."""
    codes = assignment[tokens]
    picked = (jnp.take_along_axis(l, codes[..., m], axis=-1) for m, l in enumerate(code_logits))
    z = sum(picked, start=jnp.float32(0))
    if scale is not None:
        z = z * scale.astype(jnp.float32)[tokens]
    return z if bias is None else z + bias.astype(jnp.float32)[tokens]


def target_logits(
    code_logits: CodeLogits,
    assignment: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
) -> jax.Array:
    """Z of the targets alone: float32 (...), for targets int (...). Others as in `logits`."""
    check_assignment(code_logits, assignment)
    check_per_token("bias", bias, assignment.shape[0])
    check_per_token("scale", scale, assignment.shape[0])
    codes = assignment[targets]
    z = jnp.zeros(targets.shape, jnp.float32)
    for m, l in enumerate(code_logits):
        z = z + pick(l, codes[..., m])
    if scale is not None:
        z = z * scale.astype(jnp.float32)[targets]
    return z if bias is None else z + bias.astype(jnp.float32)[targets]


@jax.custom_vjp
def pick(l: jax.Array, code: jax.Array) -> jax.Array:
    """l[..., code], for l (..., K) and code (...). Its gradient is dense, and not a scatter."""
    return jnp.take_along_axis(l, code[..., None], axis=-1)[..., 0]


def _pick_forward(l: jax.Array, code: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return pick(l, code), (l, code)


def _pick_backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    l, code = residuals
    return jnp.where(jnp.arange(l.shape[-1]) == code[..., None], g[..., None], 0.0), None


pick.defvjp(_pick_forward, _pick_backward)


def check_assignment(code_logits: CodeLogits, assignment: jax.Array) -> None:
    """Raises UserError unless assignment is (V, M)."""
    if assignment.ndim != 2 or assignment.shape[1] != len(code_logits):
        raise UserError(
            f"assignment has shape {assignment.shape}; for {len(code_logits)} codebooks it must "
            f"be (vocab_size, {len(code_logits)})"
        )
