"""A module as dicts of arrays, and what the trainer knows of each of them."""

from collections.abc import Callable

import chex
import jax
from flax import nnx

from vqcx_jax.config import schema
from vqcx_jax.nn import Transformer, functional


def test_split_and_merge(make_model: Callable[..., Transformer]) -> None:
    model = make_model()
    graphdef, params, buffers = functional.split(model)
    assert set(params) == {"blocks", "embedding", "final_norm", "head"}
    assert list(buffers) == ["head"] and list(buffers["head"]) == ["assignment"]
    merged = nnx.merge(graphdef, params, buffers)
    assert isinstance(merged, Transformer)
    chex.assert_trees_all_equal(jax.tree.leaves(merged), jax.tree.leaves(model))
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    assert hash(graphdef) == hash(functional.split(model)[0])


def test_decay_mask(
    make_config: Callable[..., schema.Model],
    abstract_transformer: Callable[[schema.Model], Transformer],
    attention: str,
    head: str,
) -> None:
    """Norms, biases and phases are left out; codes, weights and the embedding are not."""
    phases = {"encoding": {"delta": False, "bias": False}} if attention == "complex" else {}
    rows = {"vq": "codes", "full": "weights"}[head]
    expected = {
        "blocks": {
            "attention": dict.fromkeys(("q", "k", "v", "out"), True) | phases,
            "attention_norm": {"scale": False},
            "mlp": {"gate": True, "up": True, "down": True},
            "mlp_norm": {"scale": False},
        },
        "embedding": {"table": True},
        "final_norm": {"scale": False},
        "head": {rows: True, "bias": False},
    }
    model = abstract_transformer(make_config(attention=attention, head=head))
    assert functional.decay_mask(model) == expected
    _, params, _ = functional.split(model)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
