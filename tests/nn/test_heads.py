"""Every head offers the same functions, and they agree with its logits."""

from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import nnx
from head_kinds import (
    ASSIGNMENT,
    CAP,
    CAPPED,
    COUNTS,
    KINDS,
    KINDS_AND_CAPS,
    KINDS_AND_SEVERAL,
    NORMALIZED,
    WITH_EVERY_JAX,
    codes_of,
    make_head,
    new_head,
    nll_and_gradient,
    with_cap,
)
from jax.experimental import checkify
from versions import oldest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.nn import (
    AdaptiveHead,
    FullHead,
    Head,
    HuffmanHead,
    LowRankHead,
    MultiVQHead,
    TwoLevelHead,
    VQHead,
    functional,
)
from vqcx_jax.ops.hierarchical import huffman_paths
from vqcx_jax.ops.labels import IGNORE_ID


@pytest.fixture(scope="module")
def h() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, 5, 8))


@pytest.fixture(scope="module")
def targets() -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).integers(11, size=(2, 5)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("token_bias", [True, False])
@pytest.mark.parametrize(("kind", "cap"), KINDS_AND_CAPS)
def test_nll_is_log_softmax_of_logits(
    kind: str, cap: float | None, token_bias: bool, dtype: Any, h: jax.Array, targets: jax.Array
) -> None:
    head = make_head(kind, token_bias, dtype, **with_cap(kind, cap))

    @jax.jit
    def outputs(head: Head, h: jax.Array) -> tuple[jax.Array, ...]:
        return *head.nll(h, targets), head.logits(h)

    nll, log_z, logits = outputs(head, h.astype(dtype))
    chex.assert_shape((nll, log_z, logits), [(2, 5), (2, 5), (2, 5, 11)])
    chex.assert_type((nll, log_z, logits), jnp.float32)
    logits = np.asarray(logits, np.float64)
    log_p = scipy.special.log_softmax(logits, axis=-1)
    expected = -np.take_along_axis(log_p, np.asarray(targets)[..., None], axis=-1)[..., 0]
    # Both are float32 from the products on, in either dtype. nll is a difference of two numbers up
    # to 16, rounded to 5e-7 each.
    chex.assert_trees_all_close(nll, expected, rtol=1e-5, atol=2e-6)
    chex.assert_trees_all_close(log_z, scipy.special.logsumexp(logits, -1), rtol=1e-5, atol=2e-6)
    if kind in NORMALIZED:
        np.testing.assert_array_equal(log_z, 0.0)


@pytest.mark.parametrize("kind", CAPPED)
def test_logits_are_the_formula(kind: str, h: jax.Array) -> None:
    head: Any = make_head(kind, token_bias=True)
    if kind == "low_rank":
        rows = head.up[...] @ head.down[...]
    else:
        rows = head.codes[...][ASSIGNMENT] if kind == "vq" else head.weights[...]
    expected = np.asarray(h, np.float64) @ np.asarray(rows, np.float64).T + np.asarray(head.bias)
    chex.assert_trees_all_close(head.logits(h), expected, rtol=0, atol=1e-5)


@oldest_jax
@pytest.mark.parametrize("kind", CAPPED)
def test_soft_cap_is_on_the_product_and_not_on_the_bias(kind: str, h: jax.Array) -> None:
    head: Any = make_head(kind, token_bias=True)
    products = np.float64(head.logits(h)) - np.asarray(head.bias)
    assert np.abs(products).max() > 2 * CAP
    head.logit_soft_cap = CAP
    expected = CAP * np.tanh(products / CAP) + np.asarray(head.bias)
    chex.assert_trees_all_close(head.logits(h), expected, rtol=0, atol=1e-5)


@oldest_jax
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("token_bias", [True, False])
@pytest.mark.parametrize(("kind", "cap"), KINDS_AND_CAPS)
def test_top_k_is_that_of_the_logits(
    kind: str, token_bias: bool, cap: float | None, dtype: Any, h: jax.Array
) -> None:
    """Without a bias, tokens of a code are ties."""
    head = make_head(kind, token_bias, dtype, **with_cap(kind, cap))

    @jax.jit
    def outputs(head: Head, h: jax.Array) -> Any:
        return head.top_k(h, 6), head.logits(h)

    (log_probs, tokens), logits = outputs(head, h.astype(dtype))
    chex.assert_type((log_probs, tokens), (jnp.float32, jnp.int32))
    np.testing.assert_array_equal(tokens, jax.lax.top_k(logits, 6)[1])
    log_p = scipy.special.log_softmax(np.float64(logits), axis=-1)
    expected = np.take_along_axis(log_p, np.asarray(tokens), axis=-1)
    chex.assert_trees_all_close(log_probs, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [0, 12])
@pytest.mark.parametrize("kind", KINDS_AND_SEVERAL)
def test_top_k_out_of_range(kind: str, k: int, h: jax.Array) -> None:
    with pytest.raises(UserError, match=f"top_k={k}: must be in 1 .. 11"):
        make_head(kind, token_bias=True).top_k(h, k)


@cache
def sampled_head(kind: str) -> Head:
    return make_head(kind, token_bias=True, **with_cap(kind, CAP if kind in CAPPED else None))


def expected_probabilities(
    logits: jax.Array, temperature: float, top_k: int | None, top_p: float | None
) -> np.ndarray:
    """The three options as a user reads them, one after the other; no ties."""
    p = scipy.special.softmax(np.float64(logits) / temperature)
    order = np.argsort(-p)
    p[order[len(p) if top_k is None else top_k :]] = 0
    p /= p.sum()
    mass_before = np.cumsum(p[order]) - p[order]
    p[order[mass_before >= (top_p or 1.0)]] = 0
    return p / p.sum()


SAMPLING = [
    (0.5, None, None),
    (1.0, None, None),
    (2.0, None, None),
    (1.0, 4, None),
    (2.0, 4, None),
    (1.0, None, 0.7),
    (2.0, None, 0.7),
    (1.0, 5, 0.7),
    (0.5, 5, 0.9),
    (1.0, 100, 1.0),
]
# Heads that sample from V logits as "full" does are drawn from once.
OTHERS = [kind for kind in KINDS if kind not in ("vq", "full")]


@pytest.mark.parametrize(
    ("kind", "temperature", "top_k", "top_p"),
    [(kind, *options) for kind in ("vq", "full") for options in SAMPLING]
    + [(kind, 2.0, 8, 0.9) for kind in OTHERS],
)
def test_samples(
    kind: str, temperature: float, top_k: int | None, top_p: float | None, h: jax.Array
) -> None:
    head = sampled_head(kind)
    row = h[:1, :1]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    @jax.jit
    def draw(head: Head, h: jax.Array, key: jax.Array) -> jax.Array:
        return head.sample(h, key, **options)

    tokens = draw(head, jnp.broadcast_to(row, (20, 500, 8)), jax.random.key(0))
    chex.assert_shape(tokens, (20, 500))
    chex.assert_type(tokens, jnp.int32)
    counts = np.bincount(tokens.ravel(), minlength=11)
    p = expected_probabilities(head.logits(row)[0, 0], **options)
    assert not counts[p == 0].any()
    # A right sampler fails once in 10^4.
    assert scipy.stats.chisquare(counts[p > 0], 10_000 * p[p > 0]).pvalue > 1e-4


@oldest_jax
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_temperature_0_is_the_argmax_of_the_logits(
    kind: str, options: dict[str, Any], h: jax.Array
) -> None:
    for token_bias in (True, False):
        head = make_head(kind, token_bias)
        tokens = head.sample(h, jax.random.key(0), temperature=0.0, **options)
        np.testing.assert_array_equal(tokens, jnp.argmax(head.logits(h), axis=-1))


@oldest_jax
@pytest.mark.parametrize("kind", KINDS)
def test_sampler_is_sample(kind: str, h: jax.Array) -> None:
    head = sampled_head(kind)
    sampler = head.sampler(temperature=1.5, top_k=7)
    first, second = (sampler(h, jax.random.key(seed)) for seed in (0, 1))
    assert not np.array_equal(first, second)
    again = head.sample(h, jax.random.key(1), temperature=1.5, top_k=7)
    np.testing.assert_array_equal(second, again)


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_labels(kind: str, h: jax.Array, targets: jax.Array) -> None:
    """No loss, and no influence on any gradient, whatever the hidden state."""
    head = make_head(kind, token_bias=True)
    ignored = targets.at[:, 3:].set(IGNORE_ID)
    (nll, log_z), (d_params, d_h) = nll_and_gradient(head, h, ignored)
    assert not np.any(nll[:, 3:]) and not np.any(log_z[:, 3:]) and not np.any(d_h[:, 3:])
    _, (expected_params, expected_h) = nll_and_gradient(head, h[:, :3], targets[:, :3])
    chex.assert_trees_all_close(d_params, expected_params, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(d_h[:, :3], expected_h, rtol=1e-5, atol=1e-5)


@oldest_jax
@pytest.mark.parametrize("label", [-1, 11])
@pytest.mark.parametrize("kind", KINDS_AND_SEVERAL)
def test_invalid_labels(kind: str, label: int, h: jax.Array, targets: jax.Array) -> None:
    """An error at once; NaN under jit; an error again under checkify."""
    head = make_head(kind, token_bias=True)
    wrong = targets.at[1, 2].set(label)
    message = f"labels must be in 0 .. 10, or {IGNORE_ID} to be ignored"
    with pytest.raises(UserError, match=f"labels hold {label}: {message}"):
        head.nll(h, wrong)
    (nll, _), _ = nll_and_gradient(head, h, wrong)
    np.testing.assert_array_equal(np.isnan(nll), np.arange(10).reshape(2, 5) == 7)
    error, _ = jax.jit(checkify.checkify(lambda h, t: head.nll(h, t)))(h, wrong)
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        error.throw()


@jax.jit
def sums_and_gradient(head: Head, h: jax.Array, targets: jax.Array, is_token: jax.Array) -> Any:
    graphdef, params, buffers = functional.split(head)

    def loss(params: Any, h: jax.Array, z_loss: jax.Array) -> tuple[jax.Array, jax.Array]:
        return nnx.merge(graphdef, params, buffers).summed_nll(h, targets, is_token, z_loss)

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    return gradient(params, h, jnp.float32(0.1))


@pytest.mark.parametrize("kind", KINDS)
def test_summed_nll(kind: str, h: jax.Array, targets: jax.Array) -> None:
    """The sum over tokens with a label: as if nothing else were there."""
    head = make_head(kind, token_bias=True)
    targets = targets.at[:, 4].set(IGNORE_ID)
    is_token = jnp.arange(5) != jnp.asarray([[3], [2]])
    counts = is_token & (targets != IGNORE_ID)
    each_nll, each_log_z = jax.jit(lambda head, h: head.nll(h, targets))(head, h)
    (loss, nll), (d_params, d_h, d_z_loss) = sums_and_gradient(head, h, targets, is_token)
    chex.assert_type((loss, nll), jnp.float32)
    squares = np.sum(np.asarray(each_log_z)[counts] ** 2)
    chex.assert_trees_all_close(nll, np.sum(np.asarray(each_nll)[counts]), rtol=1e-5)
    chex.assert_trees_all_close(loss, nll + 0.1 * squares, rtol=1e-5)
    chex.assert_trees_all_close(d_z_loss, squares, rtol=1e-5)
    plainly = jax.jit(lambda head: head.summed_nll(h, targets, is_token, 0.1))(head)
    chex.assert_trees_all_close(plainly, (loss, nll), rtol=1e-5)

    others = targets.at[~is_token].set(IGNORE_ID)
    _, (expected_params, expected_h) = nll_and_gradient(head, h, others)
    chex.assert_trees_all_close(d_params, expected_params, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(d_h, expected_h, rtol=1e-5, atol=1e-5)


@oldest_jax
@pytest.mark.parametrize("kind", KINDS_AND_SEVERAL)
def test_summed_nll_of_invalid_labels(kind: str, h: jax.Array, targets: jax.Array) -> None:
    """As `nll`: an error at once, NaN under jit, nothing where no token is."""
    head = make_head(kind, token_bias=True)
    everywhere = jnp.ones((2, 5), bool)
    wrong = targets.at[1, 2].set(11)
    with pytest.raises(UserError, match="labels hold 11"):
        head.summed_nll(h, wrong, everywhere)
    sums, gradients = sums_and_gradient(head, h, wrong, everywhere)
    assert all(np.isnan(x) for x in sums)
    ignored = targets.at[1, 2].set(IGNORE_ID)
    expected_sums, expected = sums_and_gradient(head, h, ignored, everywhere)
    chex.assert_trees_all_equal(gradients[:2], expected[:2])
    elsewhere = everywhere.at[1, 2].set(False)
    sums, _ = sums_and_gradient(head, h, wrong, elsewhere)
    chex.assert_trees_all_close(sums, expected_sums, rtol=1e-6)


@oldest_jax
@pytest.mark.parametrize("kind", KINDS)
def test_nll_of_summed_nll_has_no_gradient(kind: str, h: jax.Array, targets: jax.Array) -> None:
    head = make_head(kind, token_bias=True)
    nll = jax.grad(lambda h: head.summed_nll(h, targets, jnp.ones((2, 5), bool))[1])
    assert not np.any(nll(h))


@oldest_jax
@pytest.mark.parametrize("kind", KINDS_AND_SEVERAL)
def test_nan_hidden_states_are_nan_losses(kind: str, h: jax.Array, targets: jax.Array) -> None:
    head, h = make_head(kind, True), h.at[1, 2, 0].set(jnp.nan)
    (nll, _), _ = nll_and_gradient(head, h, targets)
    np.testing.assert_array_equal(np.isnan(nll), np.arange(10).reshape(2, 5) == 7)
    sums, _ = sums_and_gradient(head, h, targets, jnp.ones((2, 5), bool))
    assert all(np.isnan(x) for x in sums)


def test_tokens_in_order_of_frequency() -> None:
    """Frequent tokens are in the head of an adaptive softmax, and have the shortest paths."""
    adaptive: Any = new_head("adaptive")
    two_level: Any = new_head("two_level")
    huffman: Any = new_head("huffman")
    frequent = np.argsort(-COUNTS, kind="stable")
    assert list(np.flatnonzero(adaptive.frequency_rank[...] < 3)) == sorted(frequent[:3])
    assert two_level.classes.shape == (3, 8) and two_level.tokens.shape == (3, 4, 8)
    lengths = np.sum(huffman.paths[...] > 0, axis=1)
    seen = np.maximum(COUNTS, 1)
    for token, count in enumerate(seen):
        assert np.all(lengths[count < seen] <= lengths[token])
    assert lengths[frequent[0]] == 1
    assert adaptive.clusters["0"].up.shape == (4, 4)
    assert adaptive.clusters["1"].down.shape == (2, 8)


@pytest.mark.parametrize("ranks", [[0, 1], [0, 1, 1], [1, 2, 3], [[0, 1, 2]]])
def test_ranks_must_be_a_permutation(ranks: Any) -> None:
    with pytest.raises(
        UserError, match="frequency_rank of shape .*: must hold each of 0 .. 2 once"
    ):
        TwoLevelHead(3, 8, frequency_rank=np.asarray(ranks), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("cutoffs", [(), (0, 3), (3, 3), (5, 3), (3, 11)])
def test_cutoffs_must_rise(cutoffs: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"cutoffs=\(.*: must rise within 1 .. 10"):
        AdaptiveHead(11, 8, cutoffs, rngs=nnx.Rngs(0))


def test_clusters_must_have_a_width() -> None:
    with pytest.raises(UserError, match="div_value=4.0: leaves the last of 2 clusters none of 8"):
        AdaptiveHead(11, 8, (3, 5), rngs=nnx.Rngs(0))


def test_initial_values() -> None:
    vq = VQHead(jnp.arange(200) % 100, 100, 64, rngs=nnx.Rngs(0))
    full = FullHead(100, 64, token_bias=True, rngs=nnx.Rngs(0))
    for rows, head in ((vq.codes, vq), (full.weights, full)):
        assert rows.shape == (100, 64)
        # 6400 samples: their deviation is known to 1/sqrt(2 * 6400) = 1%, four of which are 4%.
        assert np.std(rows[...]) == pytest.approx(0.02, rel=0.04)
        assert not np.any(head.bias[...])
    assert vq.bias.shape == (200,)
    assert not hasattr(VQHead(jnp.arange(5), 5, 4, token_bias=False, rngs=nnx.Rngs(0)), "bias")


def test_codes_to_start_from() -> None:
    codes = jnp.arange(40.0).reshape(5, 8)
    head = VQHead(ASSIGNMENT, 5, 8, codes=codes, rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(head.codes[...], codes)


@oldest_jax
@pytest.mark.parametrize("kind", KINDS_AND_SEVERAL)
def test_log_probs_of_listed_tokens(kind: str, h: jax.Array) -> None:
    head = make_head(kind, True)
    head.eval()
    tokens = jnp.arange(h.shape[0] * h.shape[1] * 3).reshape(*h.shape[:2], 3) % 11
    log_p = scipy.special.log_softmax(np.float64(head.logits(h)), axis=-1)
    expected = np.take_along_axis(log_p, np.asarray(tokens), axis=-1)
    actual = jax.jit(lambda head, h: head.log_probs(h, tokens))(head, h)
    chex.assert_trees_all_close(np.float64(actual), expected, rtol=1e-5, atol=2e-6)
    assert head.log_probs(h, tokens[..., :0]).shape == (*h.shape[:2], 0)


@oldest_jax
@pytest.mark.parametrize(
    ("dtype", "label"), [(np.uint8, 156), (np.int8, 120), (np.uint16, 5000), (np.int16, 5000)]
)
def test_labels_of_narrow_integers(dtype: Any, label: int) -> None:
    """156 of uint8 is no -100; 70,000 is 112 of 8 bits and 4,464 of 16, which others are above."""
    head = new_head("full", 70_000)
    h = jnp.ones((1, 2, 8))
    labels = np.array([[3, label]], dtype)
    expected = jax.jit(head.nll)(h, jnp.asarray(labels, jnp.int32))
    for nll in (head.nll, jax.jit(head.nll)):
        chex.assert_trees_all_equal(nll(h, jnp.asarray(labels)), expected)


def test_labels_are_integers(h: jax.Array) -> None:
    with pytest.raises(UserError, match="labels have dtype float32; they must be integers"):
        new_head("full").nll(h, jnp.zeros(h.shape[:2]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(VQHead, jnp.full(9, 4), 4, 8), "assignment holds code 4; codes must be in 0 .. 3"),
        (partial(VQHead, jnp.zeros(3, int), 4, 8), "num_codes=4: must be at most the 3 tokens"),
        (partial(VQHead, jnp.zeros((9, 1), int), 4, 8), r"assignment has shape \(9, 1\)"),
        (
            partial(VQHead, jnp.zeros(9, int), 4, 8, codes=jnp.zeros((2, 8))),
            r"codes has shape \(2, 8\); it must be \(4, 8\)",
        ),
        (
            partial(FullHead, 9, 8, weights=jnp.zeros((8, 8))),
            r"weights has shape \(8, 8\); it must be \(9, 8\)",
        ),
        (
            partial(FullHead, 9, 8, implementation="xla"),
            r"implementation='xla': must be one of \('plain', 'streamed'\)",
        ),
        (
            partial(HuffmanHead, jnp.full((3, 2), 9), 8),
            "paths hold 9: must be in 0 .. 4",
        ),
        (partial(HuffmanHead, jnp.zeros(3, int), 8), r"paths have shape \(3,\)"),
        (
            partial(HuffmanHead, jnp.asarray([[1, 0], [1, 0], [2, 0]]), 8),
            "paths: are of no tree, the probabilities of all 3 tokens add up to",
        ),
        (partial(HuffmanHead, huffman_paths(COUNTS), 0), "dim=0: must be at least 1"),
        (partial(FullHead, 0, 8), "vocab_size=0: must be at least 1"),
        (partial(TwoLevelHead, 0, 8), "vocab_size=0: must be at least 1"),
        (partial(TwoLevelHead, 9, 0), "dim=0: must be at least 1"),
        (partial(AdaptiveHead, 11, 0, (3,)), "dim=0: must be at least 1"),
        *(
            (partial(AdaptiveHead, 11, 8, (3,), div_value=value), f"div_value={value}: must be at")
            for value in (0, 0.5, float("inf"), float("nan"))
        ),
        (partial(VQHead, jnp.zeros(9, int), 4, 0), "dim=0: must be at least 1"),
        (partial(VQHead, jnp.zeros(9, int), 0, 8), "num_codes=0: must be at least 1"),
        (partial(MultiVQHead, jnp.zeros((9, 0), int), 4, 8), "num_codebooks=0: must be at least 1"),
        (partial(LowRankHead, 9, 8, 0), "rank=0: must be at least 1"),
        (
            partial(FullHead, 9, 8, logit_soft_cap=float("inf")),
            "logit_soft_cap=inf: must be positive and finite, or None",
        ),
        *(
            (
                partial(make, logit_soft_cap=0.0),
                "logit_soft_cap=0.0: must be positive and finite, or None",
            )
            for make in (
                partial(FullHead, 9, 8),
                partial(LowRankHead, 9, 8, 2),
                partial(VQHead, jnp.arange(9) % 4, 4, 8),
                partial(MultiVQHead, jnp.zeros((9, 2), int), 4, 8),
            )
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(rngs=nnx.Rngs(0))


@oldest_jax
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_some_token_when_greedy(kind: str, h: jax.Array) -> None:
    """And not one that the vocabulary lacks."""
    head = make_head(kind, True)
    tokens = head.sample(h.at[0, 0].set(jnp.nan), jax.random.key(0), temperature=0.0)
    assert 0 <= tokens[0, 0] < head.vocab_size
    chex.assert_trees_all_equal(tokens[1:], head.top_k(h[1:], 1)[1][..., 0])


@oldest_jax
@pytest.mark.parametrize("kind", ["vq", "class_vq", "full"])
def test_a_nucleus_of_no_mass_under_jit(kind: str, h: jax.Array) -> None:
    """Where top_p is not known it can be below what is accepted, and the best token is left."""
    head = make_head(kind, True)
    draw = jax.jit(lambda head, top_p: head.sample(h, jax.random.key(0), top_p=top_p))
    for top_p in (0.0, -1.0):
        np.testing.assert_array_equal(draw(head, top_p), head.top_k(h, 1)[1][..., 0])


@pytest.mark.parametrize("kind", ["vq", "full", "class_vq"])
def test_temperature_below_0_is_refused(kind: str, h: jax.Array) -> None:
    with pytest.raises(UserError, match="temperature=-1.0: must be at least 0"):
        new_head(kind).sample(h, jax.random.key(0), temperature=-1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_another_shape_are_refused(kind: str, h: jax.Array) -> None:
    """They would be broadcast."""
    head, (b, t, _) = new_head(kind), h.shape
    ids, counts = jnp.zeros((b, t), jnp.int32), jnp.ones((b, t), bool)
    shape = rf"\({b}, 1\); it must be \({b}, {t}\)"
    with pytest.raises(UserError, match=f"targets has shape {shape}"):
        head.nll(h, ids[:, :1])
    with pytest.raises(UserError, match=f"targets has shape {shape}"):
        head.summed_nll(h, ids[:, :1], counts)
    with pytest.raises(UserError, match=f"is_token has shape {shape}"):
        head.summed_nll(h, ids, counts[:, :1])


def test_masks_and_options_of_another_kind(h: jax.Array, targets: jax.Array) -> None:
    """They would be taken for something else, or broadcast."""
    for kind in WITH_EVERY_JAX:
        head = new_head(kind)
        with pytest.raises(UserError, match="is_token has dtype float32; it must be bool"):
            head.summed_nll(h, targets, jnp.ones(targets.shape))
        with pytest.raises(UserError, match=r"temperature has shape \(2, 1\); it must be a scalar"):
            head.sample(h, jax.random.key(0), temperature=jnp.ones((2, 1)))
        with pytest.raises(UserError, match=r"top_p has shape \(2,\); it must be a scalar"):
            head.sample(h, jax.random.key(0), top_p=jnp.ones(2))
        for k in (2.0, jnp.asarray(2)):
            with pytest.raises(UserError, match="top_k=2.*: must be an integer, known before"):
                head.sample(h, jax.random.key(0), top_k=k)
        with pytest.raises(UserError, match=r"h has shape \(5, 8\); it must be \(B, T, D\)"):
            head.log_probs(h[0], targets[0][:, None])


@oldest_jax
@pytest.mark.parametrize("kind", KINDS_AND_SEVERAL)
def test_no_positions(kind: str, h: jax.Array, targets: jax.Array) -> None:
    nll, log_z = new_head(kind).nll(h[:0], targets[:0])
    chex.assert_shape([nll, log_z], (0, 5))


@pytest.mark.parametrize(
    ("own_tokens", "message"),
    [
        (np.zeros(0, int), r"have shape \(0,\)"),
        (np.asarray([[1, 2]]), r"have shape \(1, 2\)"),
        (np.asarray([1.2, 1.7]), "have dtype float64"),
    ],
)
def test_own_tokens_are_a_list_of_integers(own_tokens: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=f"own_tokens {message}"):
        MultiVQHead(codes_of(11, 2), 5, 8, own_tokens=own_tokens, rngs=nnx.Rngs(0))


@oldest_jax
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_have_the_dtype_of_weights(kind: str, h: jax.Array, targets: jax.Array) -> None:
    head = new_head(kind)
    is_token = jnp.ones(targets.shape, bool)

    @nnx.grad
    def gradient(head: Head) -> jax.Array:
        return head.summed_nll(h.astype(jnp.bfloat16), targets, is_token)[0]

    assert {x.dtype for x in jax.tree.leaves(gradient(head))} == {np.dtype(np.float32)}


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_of_another_width(kind: str, h: jax.Array, targets: jax.Array) -> None:
    with pytest.raises(UserError, match="h has width 16; it must be 8"):
        new_head(kind).nll(jnp.concatenate([h, h], axis=-1), targets)
