"""From a token map to the output layer that it is for, without a config."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqcx_jax.config import schema
from vqcx_jax.config.schema.types import HeadImplementation
from vqcx_jax.errors import DataError, UserError
from vqcx_jax.maps import TokenMap, log_shares
from vqcx_jax.nn.heads.base import named
from vqcx_jax.nn.heads.class_vq import ClassVQHead
from vqcx_jax.nn.heads.make import make_head
from vqcx_jax.nn.heads.multi_vq import MultiVQHead
from vqcx_jax.nn.heads.vq import VQHead
from vqcx_jax.ops.checks import check_positive
from vqcx_jax.ops.codebook.multi import Form, check_form


def head_from_map(
    token_map: TokenMap,
    dim: int,
    *,
    form: Form = "product",
    counts: np.ndarray | None = None,
    token_bias: bool = True,
    implementation: HeadImplementation = "auto",
    dtype: jnp.dtype = jnp.float32,
    rules: schema.ShardingRules | None = None,
    rngs: nnx.Rngs,
) -> VQHead | MultiVQHead | ClassVQHead:
    """The output layer that a token map is for, for models of your own.

    A `ClassVQHead` if the map has classes; else a `MultiVQHead`, or a `VQHead` of one codebook.
    It starts from the map's vectors and scales, and has scales if the map has.

    Args:
        token_map: from `maps.make_map`, or a file: `TokenMap.load(path)`.
        dim: D.
        form: of several codebooks without classes, see `MultiVQHead`.
        counts: int (V,), occurrences in the training text: where biases start, at the logarithms
            of shares. None: at 0.
        token_bias, implementation, dtype, rules, rngs: as of those heads.

    Raises:
        UserError: sizes that do not fit, or counts without biases.

    Example:
        head = head_from_map(TokenMap.load(Path("map.npz")), 512, rngs=nnx.Rngs(0))
        loss, nll = head.summed_nll(h_BxTxD, targets_BxT, is_token_BxT)
    """
    if counts is not None and (not token_bias or counts.shape != (token_map.vocab_size,)):
        raise DataError(
            f"counts of shape {counts.shape}: must be ({token_map.vocab_size},), with token_bias"
        )
    if token_map.classes is not None and form != "product":
        raise UserError(f"form={form!r}: must be 'product' for a map with classes")
    check_positive(dim=dim)
    check_form(form)
    named(implementation)
    dtype_name: Any = jnp.dtype(dtype).name
    if dtype_name not in ("float32", "bfloat16"):
        raise UserError(f"dtype={dtype_name!r}: must be 'float32' or 'bfloat16'")
    options: dict[str, Any] = {
        "num_codes": token_map.num_codes[0],
        "num_codebooks": token_map.num_codebooks,
        "token_scale": token_map.scale is not None,
        "token_bias": token_bias,
        "implementation": implementation,
    }
    head: schema.VQHead | schema.ClassVQHead
    if token_map.classes is None:
        head = schema.VQHead(form=form, num_own_tokens=len(token_map.own_tokens), **options)
    else:
        sizes = len(token_map.classes.codes), int(np.sum(token_map.classes.of_token < 0))
        head = schema.ClassVQHead(num_classes=sizes[0], num_frequent=sizes[1], **options)
    bias = None if counts is None else log_shares(counts)
    made = make_head(
        schema.Model(vocab_size=token_map.vocab_size, embed_dim=dim, dtype=dtype_name, head=head),
        dataclasses.replace(token_map, bias=bias),
        rules=rules or schema.ShardingRules(),
        rngs=rngs,
    )
    assert isinstance(made, VQHead | MultiVQHead | ClassVQHead)
    return made
