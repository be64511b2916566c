"""Codebooks with scales, biases and tokens of their own, against the definition in float64."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from versions import oldest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops.codebook import bilinear, loss, multi, reference

pytestmark = oldest_jax

V, D, OWN = 307, 12, (5, 0, 306)
CODEBOOKS = {1: (11,), 2: (13, 7), 3: (5, 8, 6)}
NAMES = ("bias", "scale", "own_vectors")


def make(num_codebooks: int, form: str, dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    sizes = CODEBOOKS[num_codebooks]
    width = D // num_codebooks if form == "product" else D
    normal = rng.standard_normal
    targets = rng.integers(V, size=(4, 3))
    targets[0] = OWN  # A target of every kind, several times.
    return {
        "h": jnp.asarray(normal((4, 3, D)), dtype),
        "codebooks": tuple(jnp.asarray(normal((k, width)), dtype) for k in sizes),
        "bias": jnp.asarray(normal(V), jnp.float32),
        "scale": jnp.asarray(0.5 + rng.random(V), jnp.float32),
        "own_vectors": jnp.asarray(normal((len(OWN), D)), dtype),
        "assignment": jnp.asarray(np.stack([rng.integers(k, size=V) for k in sizes], axis=1)),
        "targets": jnp.asarray(targets),
        "weights": tuple(jnp.asarray(normal((4, 3)), jnp.float32) for _ in range(2)),
    }


def definition(form: str, x: dict[str, Any]) -> Any:
    """Every token's vector written out, then a softmax."""
    if form == "additive":
        z = reference.additive_logits(x["h"], x["codebooks"], x["assignment"])
    else:
        z = reference.product_logits(x["h"], x["codebooks"], x["assignment"])
    if x["scale"] is not None:
        z = z * x["scale"]
    if x["own_vectors"] is not None:
        z = z.at[..., jnp.asarray(OWN)].set(x["h"] @ x["own_vectors"].T)
    if x["bias"] is not None:
        z = z + x["bias"]
    return reference.nll_of_logits(z, x["targets"]), z


def fast(form: str, x: dict[str, Any]) -> Any:
    of_form = multi.additive_code_logits if form == "additive" else multi.product_code_logits
    code_logits = of_form(x["h"], x["codebooks"])
    own = None
    if x["own_vectors"] is not None:
        products = multi.additive_code_logits(x["h"], [x["own_vectors"]])[0]
        own = loss.Own(jnp.asarray(OWN), products)
    rest = (x["assignment"], x["targets"], x["bias"], x["scale"], own)
    z = loss.logits(code_logits, x["assignment"], x["bias"], x["scale"], own)
    return loss.nll(code_logits, *rest), z


def values_and_gradients(function: Any, form: str) -> Any:
    def run(x: dict[str, Any]) -> Any:
        trained = {name: x[name] for name in ("h", "codebooks", *NAMES)}

        def of(trained: dict[str, Any]) -> Any:
            return function(form, x | trained)

        (values, z), vjp = jax.vjp(of, trained)
        weights = tuple(w.astype(v.dtype) for w, v in zip(x["weights"], values, strict=True))
        return values, z, vjp((weights, jnp.zeros_like(z)))[0]

    return run


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        ((), jnp.float32),
        (("own_vectors",), jnp.float32),
        (("bias", "own_vectors"), jnp.bfloat16),
        (NAMES, jnp.float32),
        (NAMES, jnp.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("num_codebooks", "form"), [(1, "additive"), (2, "additive"), (2, "product"), (3, "product")]
)
def test_equals_the_definition(
    num_codebooks: int,
    form: str,
    names: tuple[str, ...],
    dtype: Any,
    in_float64: Any,
    max_error: Any,
) -> None:
    """Logits and values to 1e-5; gradients to 1e-5, and roundings of dtype, of the largest.

    By a bfloat16 h there are two: codes and own vectors each give a rounded part.
    """
    x = make(num_codebooks, form, dtype)
    x |= {name: None for name in NAMES if name not in names}
    values, z, gradients = jax.jit(values_and_gradients(fast, form))(x)
    expected = in_float64(values_and_gradients(definition, form), x)
    chex.assert_trees_all_close((values, z), expected[:2], rtol=1e-5, atol=1e-5)
    actual, true = (jax.tree.leaves(tree) for tree in (gradients, expected[2]))
    for a, t in zip(actual, true, strict=True):
        assert max_error(a, t) <= 1e-5 + (2 * 2.0**-8 if a.dtype == jnp.bfloat16 else 0)


def test_probabilities_add_up() -> None:
    """log Z of the loss is that of all V logits, and probabilities add up to 1."""
    x = make(3, "product", jnp.float32)
    everything = jnp.broadcast_to(x["h"][0, 0], (V, D))
    x |= {"h": everything, "targets": jnp.arange(V)}
    (nll, log_z), z = fast("product", x)
    assert np.sum(np.exp(-np.float64(nll))) == pytest.approx(1, rel=1e-5)
    chex.assert_trees_all_close(log_z, jax.nn.logsumexp(z, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("name", ["bias", "scale"])
def test_wrong_length(name: str) -> None:
    x = make(2, "additive", jnp.float32)
    code_logits = multi.additive_code_logits(x["h"], x["codebooks"])
    with pytest.raises(UserError, match=rf"{name} has shape \(306,\).*\(307,\)"):
        loss.log_z(code_logits, x["assignment"], **{name: jnp.ones(306)})


def test_closed_forms_have_no_kernel() -> None:
    x = make(2, "additive", jnp.float32)
    code_logits = multi.additive_code_logits(x["h"], x["codebooks"])
    with pytest.raises(UserError, match="implementation='pallas_tpu': must be 'xla' or None"):
        loss.log_z(code_logits, x["assignment"], implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": jnp.asarray([30])}, "targets hold 30: must be in 0 .. 29"),
        ({"targets": jnp.asarray(3)}, r"targets has shape \(\); it must be \(1,\)"),
        ({"assignment": jnp.full((30, 2), 4)}, "assignment holds code 4; codes must be in 0 .. 3"),
        ({"assignment": jnp.zeros((4, 2), int)}, "num_codes=5: must be at most the 4 tokens"),
        ({"bias": jnp.zeros(1)}, r"bias has shape \(1,\); it must have one value a token"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, message: str) -> None:
    """Where values are known, by each path; code 4 is of the first codebook alone."""
    given = {
        "assignment": jnp.zeros((30, 2), int),
        "targets": jnp.asarray([3]),
        "bias": None,
    } | change
    code_logits = jnp.ones((1, 5)), jnp.ones((1, 4))
    for nll in (loss.nll, bilinear.nll):
        with pytest.raises(UserError, match=message):
            nll(code_logits, **given)
    codebooks = jnp.ones((5, 6)), jnp.ones((4, 6))
    with pytest.raises(UserError, match=message):
        loss.summed_nll(jnp.ones((1, 6)), codebooks, counts=jnp.ones(1, bool), **given)


def test_counts_of_another_shape_are_refused() -> None:
    codebooks = jnp.ones((5, 6)), jnp.ones((4, 6))
    targets = jnp.asarray([3]), jnp.ones((), bool)
    with pytest.raises(UserError, match=r"counts has shape \(\); it must be \(1,\)"):
        loss.summed_nll(jnp.ones((1, 6)), codebooks, jnp.zeros((30, 2), int), *targets)
