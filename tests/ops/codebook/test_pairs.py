"""The summed loss of two codebooks: plain JAX, and the TPU kernel in Pallas's interpreter."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from versions import newest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops import device, dispatch, soft_cap
from vqcx_jax.ops.codebook import bilinear, loss, multi, pairs
from vqcx_jax.ops.dispatch import NotSupported
from vqcx_jax.ops.tpu_resident import Tile

# Small, so that tiny problems have several steps, row blocks and blocks of columns.
TILE = Tile(32, 16, 128)


class Case(NamedTuple):
    num_codes: tuple[int, int] = (150, 37)
    form: multi.Form = "additive"
    dim: int = 200
    leading: tuple[int, ...] = (7, 11)
    logit_scale: float = 2.0
    z_loss: float = 0.1
    cap: float | None = None


CASES = {
    "ragged": Case(),
    "ragged_product_capped": Case((37, 150), "product", cap=2.0),
    "smallest": Case((3, 2), dim=4, leading=(), z_loss=0.0),
}


class Inputs(NamedTuple):
    h: jax.Array
    codebooks: tuple[jax.Array, jax.Array]
    log_mass: jax.Array
    codes: tuple[jax.Array, jax.Array]
    counts: jax.Array
    z_loss: jax.Array


def make(case: Case, dtype: Any = jnp.float32) -> Inputs:
    """One token for every second cell, so that many are empty."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    vocab_size = max(7, np.prod(case.num_codes) // 2)
    assignment = np.stack([rng.integers(k, size=vocab_size) for k in case.num_codes], axis=1)
    bias = jnp.asarray(normal(vocab_size), jnp.float32)
    width = case.dim if case.form == "additive" else case.dim // 2
    targets = rng.integers(vocab_size, size=case.leading)
    positions = np.arange(np.prod(case.leading, dtype=int)).reshape(case.leading)
    return Inputs(
        h=jnp.asarray(case.logit_scale * normal((*case.leading, case.dim)), dtype),
        codebooks=tuple(
            jnp.asarray(normal((k, width)) / width**0.5, dtype) for k in case.num_codes
        ),
        log_mass=bilinear.cell_log_mass(jnp.asarray(assignment), case.num_codes, bias),
        codes=tuple(jnp.asarray(assignment[targets, m], jnp.int32) for m in (0, 1)),
        counts=jnp.asarray(positions % 3 != 1),
        z_loss=jnp.float32(case.z_loss),
    )


def summed(log_z: Callable[..., Any], case: Case) -> Callable[..., Any]:
    """Of a function that gives log Z of code logits and cells."""

    def sums(h: Any, codebooks: Any, log_mass: Any, codes: Any, counts: Any, z_loss: Any) -> Any:
        halves = jnp.split(h, 2, axis=-1) if case.form == "product" else (h, h)
        l1, l2 = (
            soft_cap.soft_cap(
                jnp.einsum("...d,kd->...k", x, c, preferred_element_type=h.dtype), case.cap
            )
            for x, c in zip(halves, codebooks, strict=True)
        )
        of_targets = multi.pick(l1, codes[0]) + multi.pick(l2, codes[1])
        z = log_z(l1, l2, log_mass)
        total = jnp.sum(jnp.where(counts, z - of_targets, 0.0))
        return total + z_loss * jnp.sum(jnp.where(counts, z**2, 0.0)), total

    return sums


def log_z_of_cells(l1: Any, l2: Any, log_mass: Any) -> Any:
    cells = l1[..., :, None] + l2[..., None, :] + log_mass
    return jax.nn.logsumexp(cells, axis=(-2, -1))


def kernel(case: Case, **options: Any) -> Callable[..., Any]:
    options = {"interpret": pltpu.InterpretParams(), "tile": TILE} | options
    return partial(pairs.tpu.summed_nll, form=case.form, cap=case.cap, **options)


def plain(case: Case) -> Callable[..., Any]:
    return partial(pairs.xla.summed_nll, form=case.form, cap=case.cap)


def values_and_gradients(sums: Callable[..., Any]) -> Callable[[Inputs], Any]:
    """(loss, nll), and the gradients of -1.7 loss by h, codebooks, log_mass and z_loss."""

    def function(x: Inputs) -> Any:
        def of(h: Any, codebooks: Any, log_mass: Any, z_loss: Any) -> Any:
            return sums(h, codebooks, log_mass, x.codes, x.counts, z_loss)

        values, vjp = jax.vjp(of, x.h, x.codebooks, x.log_mass, x.z_loss)
        return values, vjp((jnp.full_like(values[0], -1.7), jnp.zeros_like(values[1])))

    return function


def assert_exact(actual: Any, expected: Any, max_error: Any) -> None:
    (values, gradients), (true_values, true_gradients) = actual, expected
    chex.assert_trees_all_close(values, true_values, rtol=1e-5)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(true_gradients), strict=True)
    for gradient, true in pairs:
        assert gradient.dtype == jnp.float32
        assert max_error(gradient, true) <= 1e-5


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "ragged" else newest_jax) for n in CASES],
)
def test_float32(name: str, in_float64: Any, max_error: Any) -> None:
    case = CASES[name]
    x = make(case)
    expected = in_float64(values_and_gradients(summed(log_z_of_cells, case)), x)
    assert np.any(np.isneginf(x.log_mass))
    for sums in (plain(case), kernel(case)):
        run = jax.jit(values_and_gradients(sums))
        values, gradients = run(x)
        assert_exact((values, gradients), expected, max_error)
        assert not np.any(gradients[0][~x.counts])
        assert not np.any(gradients[2][np.isneginf(x.log_mass)])
        values, _ = run(x._replace(h=x.h.at[(0,) * (x.h.ndim - 1)].set(jnp.nan)))
        assert all(np.isnan(value) for value in values)


@newest_jax
@pytest.mark.parametrize("chip", ["TPU v6 lite", "TPU v5p"])
def test_bfloat16(
    chip: str, in_float64: Any, max_error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice the error of the plain computation, with one core and with two."""
    monkeypatch.setattr(device, "current", lambda: device.Device("tpu", chip))
    case = CASES["ragged"]._replace(leading=(5, 25))  # Four blocks.
    x = make(case, jnp.bfloat16)
    values, gradients = jax.jit(values_and_gradients(kernel(case)))(x)
    true_values, true = in_float64(values_and_gradients(summed(log_z_of_cells, case)), x)
    _, others = jax.jit(values_and_gradients(plain(case)))(x)
    assert [v.dtype for v in values] == [jnp.float32] * 2
    chex.assert_trees_all_close(values, true_values, rtol=1e-5)
    for i in (2, 3):  # Cells and z_loss never meet a bfloat16 number.
        assert max_error(gradients[i], true[i]) <= 1e-5
    of_codes = (jax.tree.leaves(x[:2]) for x in (gradients, others, true))
    for actual, other, exact in zip(*of_codes, strict=True):
        assert actual.dtype == jnp.bfloat16
        assert max_error(actual, exact) <= 2 * max_error(other, exact)


def opposed(depth: float) -> Inputs:
    """Code i meets only code i, whose logits are (-1)^i depth and its opposite at two positions.

    So no token joins two good codes, and Z is exp(-2 depth) of what the maxima promise. The third
    position of four does not count; the first is an ordinary one.
    """
    signs = np.where(np.arange(64) % 2, -1.0, 1.0)
    ramp = np.linspace(0.0, 1.0, 64)
    h = np.asarray([[0.0, 1.0], [depth, 1.0], [2 * depth, 0.0], [-depth, 1.0]])
    diagonal = jnp.eye(64, dtype=bool)
    return Inputs(
        jnp.asarray(h, jnp.float32),
        tuple(jnp.asarray(np.stack([s * signs, ramp], axis=1), jnp.float32) for s in (1, -1)),
        jnp.where(diagonal, jnp.asarray(ramp, jnp.float32), -jnp.inf),
        (jnp.full((4,), 5, jnp.int32),) * 2,
        jnp.asarray([True, True, False, True]),
        jnp.float32(0.1),
    )


def without_guard(l1: Any, l2: Any, log_mass: Any) -> Any:
    """The matrix product with the usual shift by the maxima."""
    peaks = [jnp.max(l, axis=-1, keepdims=True) for l in (l1, l2)]
    z = jnp.sum((jnp.exp(l1 - peaks[0]) @ jnp.exp(log_mass)) * jnp.exp(l2 - peaks[1]), axis=-1)
    return jnp.log(z) + peaks[0][..., 0] + peaks[1][..., 0]


def test_best_codes_without_a_token(in_float64: Any, max_error: Any) -> None:
    """Where Z underflows, the batch is computed again."""
    x, case = opposed(60.0), Case()
    trap, _ = jax.jit(summed(without_guard, case))(*x)
    assert not np.isfinite(trap)  # The plain product finds Z = 0.
    expected = in_float64(values_and_gradients(summed(log_z_of_cells, case)), x)
    assert_exact(jax.jit(values_and_gradients(kernel(case)))(x), expected, max_error)
    # Without gradients, another program.
    chex.assert_trees_all_close(jax.jit(kernel(case))(*x), expected[0], rtol=1e-5)


def test_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each core has a group of positions, and neither reads what the other writes."""
    monkeypatch.setattr(device, "current", lambda: device.Device("tpu", "TPU v5p"))
    case = CASES["ragged"]._replace(leading=(128,))
    x = make(case)
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    actual = values_and_gradients(kernel(case, interpret=params))(x)
    expected = jax.jit(values_and_gradients(plain(case)))(x)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


@newest_jax
def test_shard_map_over_positions() -> None:
    """Each device sums its own positions; gradients by what they share are summed."""
    case = CASES["ragged"]._replace(leading=(64,))
    x = make(case)
    row, whole = PartitionSpec("data"), PartitionSpec()
    specs = Inputs(row, (whole, whole), whole, (row, row), row, whole)

    def on_mesh(*args: Any) -> Any:
        def sums(*args: Any) -> Any:
            return jax.lax.psum(kernel(case)(*args), "data")

        return jax.shard_map(sums, in_specs=tuple(specs), out_specs=(whole, whole))(*args)

    expected = jax.jit(values_and_gradients(plain(case)))(x)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        actual = jax.jit(values_and_gradients(on_mesh))(jax.device_put(x, specs))
    actual = jax.tree.map(np.asarray, actual)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_bias", [True, False])
def test_loss_of_tokens(has_bias: bool) -> None:
    """With the biases of targets and cells; on a TPU by the kernel."""
    rng = np.random.default_rng(0)
    codebooks = tuple(jnp.asarray(rng.standard_normal((k, 6)), jnp.float32) for k in (5, 4))
    assignment = jnp.asarray(np.stack([np.arange(30) % 5, np.arange(30) % 4], axis=1))
    h = jnp.asarray(rng.standard_normal((2, 3, 6)), jnp.float32)
    targets = jnp.asarray(rng.integers(30, size=(2, 3)))
    counts = jnp.arange(3) != jnp.asarray([[0], [1]])
    bias = jnp.asarray(rng.standard_normal(30), jnp.float32) if has_bias else None

    def each(h: Any, codebooks: Any, bias: Any) -> Any:
        code_logits = multi.additive_code_logits(h, codebooks)
        nll, log_z = loss.nll(code_logits, assignment, targets, bias)
        return jnp.sum(jnp.where(counts, nll + 0.1 * log_z**2, 0.0))

    def sums(h: Any, codebooks: Any, bias: Any) -> Any:
        return loss.summed_nll(h, codebooks, assignment, targets, counts, bias, 0.1)[0]

    by = (0, 1, 2) if has_bias else (0, 1)
    with dispatch.record() as traced:
        actual = jax.jit(jax.value_and_grad(sums, by))(h, codebooks, bias)
    assert traced == [("codebook.pairs.summed_nll", "xla")]
    expected = jax.jit(jax.value_and_grad(each, by))(h, codebooks, bias)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_do() -> None:
    x = make(CASES["smallest"])
    many = (jnp.zeros((4096, 4096)),) * 2
    with pytest.raises(NotSupported, match="4096 and 4096 codes of 4096 do not fit vector memory"):
        pairs.tpu.summed_nll(jnp.zeros((1, 4096)), many, jnp.zeros((4096, 4096)), *x[3:])
    half = x._replace(h=x.h.astype(jnp.float16))
    with pytest.raises(NotSupported, match="float16"):
        pairs.tpu.summed_nll(*half)
    unequal = (jnp.zeros((3, 3)), jnp.zeros((2, 1)))
    with pytest.raises(NotSupported, match="widths 3 and 1"):
        pairs.tpu.summed_nll(x.h, unequal, *x[2:], form="product")
    with pytest.raises(UserError, match="needs a tpu"):
        pairs.summed_nll(*x, implementation="pallas_tpu")
    with pytest.raises(UserError, match="codebooks: are 3, must be 2"):
        codes = jnp.zeros((7, 3), jnp.int32)
        loss.summed_nll(x.h, (x.codebooks[0],) * 3, codes, jnp.int32(0), x.counts)
