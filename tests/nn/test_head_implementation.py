"""Which implementation a head's operations are traced with, on a device that says it is a TPU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from vqcx_jax.config import schema
from vqcx_jax.errors import UserError
from vqcx_jax.nn.heads.make import make_head
from vqcx_jax.nn.heads.vq import VQHead
from vqcx_jax.ops import device, dispatch

HEADS: dict[str, schema.VQHead | schema.ClassVQHead] = {
    "one codebook": schema.VQHead(num_codes=16),
    "two codebooks": schema.VQHead(num_codes=16, num_codebooks=2),
    "own tokens": schema.VQHead(num_codes=16, num_codebooks=2, num_own_tokens=5),
    "streamed": schema.VQHead(num_codes=8, num_codebooks=4, form="product"),
    "expanded": schema.VQHead(num_codes=32, num_codebooks=4, form="product", token_scale=True),
    "classes": schema.ClassVQHead(num_codes=16, num_codebooks=4),
}
SHAPE = (2, 8)


def traced(config: schema.VQHead | schema.ClassVQHead) -> set[tuple[str, str]]:
    """Of losses with gradients, logits, best tokens and samples."""
    model = schema.Model(vocab_size=300, embed_dim=64, head=config, dtype="bfloat16")
    head = make_head(model, None, rules=schema.ShardingRules(), rngs=nnx.Rngs(0))

    def run(h: jax.Array, key: jax.Array) -> Any:
        targets = jnp.zeros(SHAPE, jnp.int32)
        loss = jax.value_and_grad(lambda h: head.summed_nll(h, targets, targets == 0)[0])(h)
        drawn = [head.sample(h, key, **how) for how in ({}, {"top_k": 3}, {"top_p": 0.9})]
        return loss, head.nll(h, targets), head.logits(h), head.top_k(h, 5), drawn

    with dispatch.record() as operations:
        jax.eval_shape(run, jax.ShapeDtypeStruct((*SHAPE, 64), jnp.bfloat16), jax.random.key(0))
    return set(operations)


@pytest.mark.parametrize("kind", HEADS)
def test_plain_jax_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "current", lambda: device.Device("tpu", "TPU v5"))
    kernels = {operation for operation, name in traced(HEADS[kind]) if name == "pallas_tpu"}
    assert kernels
    plain = traced(dataclasses.replace(HEADS[kind], implementation="xla"))
    assert {name for _, name in plain} == {"xla"}


def test_a_kernel_cannot_be_named() -> None:
    """Not every head has one for everything."""
    with pytest.raises(UserError, match="implementation='pallas_tpu': must be one of"):
        VQHead(
            jnp.zeros(9, jnp.int32),
            4,
            8,
            implementation="pallas_tpu",  # type: ignore[arg-type]
            rngs=nnx.Rngs(0),
        )
