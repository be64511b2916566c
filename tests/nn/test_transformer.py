"""The model as a whole: what may influence what, and that every way to run it agrees."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import nnx
from versions import oldest_jax

from vqcx_jax.config import schema
from vqcx_jax.nn import Param, Transformer, functional
from vqcx_jax.nn.loss import summed_nll

Batch = dict[str, jax.Array]

hidden = jax.jit(Transformer.hidden)


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(graphdef: nnx.GraphDef, params: Any, buffers: Any, batch: Batch) -> Any:
    def loss(params: Any) -> jax.Array:
        return summed_nll(graphdef, params, buffers, batch, z_loss=0.1)[0]

    return jax.value_and_grad(loss)(params)


@jax.jit
def influence(model: Transformer, batch: Batch) -> jax.Array:
    """(B, T, T): how much the loss at t depends on the embedded input at s."""
    graphdef, params, buffers = functional.split(model)

    def nll(inputs_BxTxD: jax.Array) -> jax.Array:
        # A table with a row for each input: its gradient is the gradient by that input.
        batch_size, length, dim = inputs_BxTxD.shape
        table = {"embedding": {"table": inputs_BxTxD.reshape(-1, dim)}}
        rows = jnp.arange(batch_size * length).reshape(batch_size, length)
        model = nnx.merge(graphdef, params | table, buffers)
        h_BxTxD = model.hidden(rows, batch["segment_ids"], batch["positions"])
        # Rows of a batch are independent: their sum keeps every derivative.
        return model.head.nll(h_BxTxD, batch["targets"])[0].sum(axis=0)

    jacobian_TxBxTxD = jax.jacrev(nll)(model.embedding(batch["inputs"]))
    return jnp.abs(jacobian_TxBxTxD).sum(axis=-1).swapaxes(0, 1)


@oldest_jax
def test_causal_and_apart(
    make_model: Callable[..., Transformer], batch: Batch, attention: str, head: str
) -> None:
    """Gradients by later tokens and by other documents are zero exactly, all others are not."""
    model = make_model(attention=attention, head=head)
    segments = np.asarray(batch["segment_ids"])
    earlier = np.tril(np.ones((9, 9), bool))
    packed = earlier & (segments[:, :, None] == segments[:, None, :])
    np.testing.assert_array_equal(influence(model, batch) != 0, packed)
    one_document = batch | {"segment_ids": jnp.ones_like(batch["segment_ids"])}
    np.testing.assert_array_equal(influence(model, one_document) != 0, [earlier, earlier])


def test_defaults_are_one_document_from_position_zero(
    make_model: Callable[..., Transformer], batch: Batch
) -> None:
    model = make_model()
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    explicit = hidden(model, batch["inputs"], jnp.full((2, 9), 3), positions)
    chex.assert_trees_all_close(hidden(model, batch["inputs"]), explicit, rtol=0, atol=1e-6)


@oldest_jax
def test_rematerialisation_changes_memory_only(
    make_model: Callable[..., Transformer], batch: Batch
) -> None:
    results, products = [], []
    for remat in ("none", "dots", "full"):
        parts = functional.split(make_model(remat=remat))
        traced = loss_and_gradients.trace(*parts, batch)
        equations = _equations(traced.jaxpr.jaxpr)
        products.append(sum(e.primitive.name == "dot_general" for e in equations))
        results.append(traced.lower().compile()(*parts[1:], batch))
    assert products[0] < products[1] < products[2]
    for other in results[1:]:
        chex.assert_trees_all_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_scan_equals_a_loop_over_layers(
    make_model: Callable[..., Transformer], batch: Batch, attention: str
) -> None:
    model = make_model(attention=attention)

    @jax.jit
    def unrolled(model: Transformer, batch: Batch) -> jax.Array:
        config = model.config
        encoding = model.blocks.attention.encoding
        info = encoding.info(batch["segment_ids"], batch["positions"])
        x = model.embedding(batch["inputs"])
        for i in range(config.num_layers):
            block = jax.tree.map(lambda stacked, i=i: stacked[i], model.blocks)
            x, _ = block(x, info)
        return model.final_norm(x)

    actual = hidden(model, batch["inputs"], batch["segment_ids"], batch["positions"])
    chex.assert_trees_all_close(actual, unrolled(model, batch), rtol=0, atol=1e-5)


def test_program_does_not_grow_with_depth(
    make_config: Callable[..., schema.Model],
    abstract_transformer: Callable[[schema.Model], Transformer],
    batch: Batch,
) -> None:
    def size(num_layers: int) -> int:
        parts = functional.split(abstract_transformer(make_config(num_layers=num_layers)))
        jaxpr = jax.make_jaxpr(loss_and_gradients, static_argnums=0)(*parts, batch)
        return sum(1 for _ in _equations(jaxpr.jaxpr))

    assert size(2) == size(12) > 100


def test_bfloat16_activations_and_float32_parameters(
    make_model: Callable[..., Transformer], batch: Batch, attention: str, head: str
) -> None:
    model = make_model(attention=attention, head=head, dtype="bfloat16")
    parts = functional.split(model)
    params, buffers = parts[1:]
    chex.assert_type(jax.tree.leaves(params), jnp.float32)
    loss, gradients = jax.eval_shape(partial(loss_and_gradients, parts[0]), params, buffers, batch)
    chex.assert_type([loss, *jax.tree.leaves(gradients)], jnp.float32)
    h, cache = jax.eval_shape(
        Transformer.extend, model, batch["inputs"], model.empty_cache(2, 9), 0
    )
    chex.assert_type([h, *cache], jnp.bfloat16)
    nll = jax.eval_shape(lambda m, h: m.head.nll(h, batch["targets"]), model, h)
    logits = jax.eval_shape(lambda m, h: m.head.logits(h), model, h)
    chex.assert_type([*nll, logits], jnp.float32)


@oldest_jax
def test_bfloat16_is_near_float32(make_model: Callable[..., Transformer], batch: Batch) -> None:
    narrow, wide = (
        hidden(make_model(dtype=dtype), batch["inputs"], batch["segment_ids"], batch["positions"])
        for dtype in ("bfloat16", "float32")
    )
    error = np.abs(narrow.astype(jnp.float32) - wide)
    # A few tens of roundings to 2^-8, each of them random: their root is 2^-5 at most.
    assert error.max() <= 2.0**-5 * np.abs(wide).max()
    assert error.max() > 0


def test_number_of_parameters(
    make_config: Callable[..., schema.Model],
    abstract_transformer: Callable[[schema.Model], Transformer],
    attention: str,
    head: str,
) -> None:
    model = abstract_transformer(make_config(attention=attention, head=head, num_layers=3))
    phases = 4 * (2 + 4) if attention == "complex" else 0  # delta of key heads, bias of all heads
    projections = 16 * 8 * (4 + 2 + 2 + 4)
    block = 16 + projections + phases + 16 + 3 * 16 * 24
    output = 7 * 16 + 29 if head == "vq" else 29 * 16 + 29
    expected = 29 * 16 + 3 * block + 16 + output
    sizes = jax.tree.map(lambda p: p.size, nnx.state(model, Param))
    assert sum(jax.tree.leaves(sizes)) == expected


def test_the_module_is_a_pytree(make_model: Callable[..., Transformer], batch: Batch) -> None:
    """jax.jit and jax.grad take it, and what they return is a module again."""
    model = make_model()

    @jax.jit
    @partial(jax.value_and_grad, allow_int=True)  # The assignment of a VQ head is int.
    def loss_and_gradient(model: Transformer) -> jax.Array:
        h = model.hidden(batch["inputs"])
        return model.head.nll(h, batch["targets"])[0].mean()

    before, gradient = loss_and_gradient(model)
    assert isinstance(gradient, Transformer)
    stepped = jax.tree.map(
        lambda p, g: p if g.dtype == jax.dtypes.float0 else p - 0.1 * g, model, gradient
    )
    assert loss_and_gradient(stepped)[0] < before


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _equations(inner)
