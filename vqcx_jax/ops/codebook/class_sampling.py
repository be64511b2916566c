"""Tokens of product codes in classes: the most probable ones, and one drawn, without V logits.

`top_k`. Frequent tokens are looked at first, then classes from the most to the least probable one,
until no further class is as probable as the least of the k best tokens so far.

`sample`, at a temperature T. p(v)^(1/T) has no product form: the weight of a class is a sum over
its tokens. But that lies below a bound, so that an entry of the first level is drawn by its bound,
and taken with the probability (weight / bound); where it is not, its weight is known now, and the
next draw uses it. With top-p a token is kept if it is in the nucleus. Each draw that is kept has
the right distribution, whatever was drawn before it: so has one from V log-probabilities, which are
made for those that are left after some draws, as low temperatures need many of a model that is
unsure.
"""

import jax
import jax.numpy as jnp

from vqcx_jax.ops import sampling
from vqcx_jax.ops.codebook import class_order
from vqcx_jax.ops.codebook import classes as product_classes
from vqcx_jax.ops.codebook.class_arrays import Classes, Weights, num_frequent
from vqcx_jax.ops.codebook.class_nucleus import in_nucleus
from vqcx_jax.ops.codebook.class_order import FirstLevel, first_level
from vqcx_jax.ops.codebook.members.xla import logits_of_classes
from vqcx_jax.ops.sampling import check_k, check_temperature, check_top_p, first_of_sorted

# Draws of entries before `sample` makes V log-probabilities, which take as long as some dozens.
_NUM_DRAWS = 32
# Log-probabilities are known to 1e-6 or so: a temperature of less would see no more than this one.
_TEMPERATURES = 1e-6, 1e30

_Best = tuple[jax.Array, jax.Array]


def top_k(
    h: jax.Array, vectors: jax.Array, weights: Weights, classes: Classes, k: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and ids of the k most probable tokens; of equals, the lowest id first.

    Args:
        h: (..., D). vectors: from `classes.entry_vectors`.

    Returns:
        log_probs: float32 (..., k), from large to small. tokens: int32 (..., k).

    Raises:
        UserError: k is not in 1 .. V.
    """
    h_NxD = h.reshape(-1, h.shape[-1])
    best = _top_k(first_level(h_NxD, vectors, weights, classes), weights, classes, k)
    log_p, tokens = (x.reshape(*h.shape[:-1], k) for x in best)
    return log_p, tokens


def sample(
    h: jax.Array,
    vectors: jax.Array,
    weights: Weights,
    classes: Classes,
    key: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    top_p: float | jax.Array | None = None,
) -> jax.Array:
    """Draws tokens as `ops.sampling.sample` does from log-probabilities.

    Args:
        h: (..., D). vectors: from `classes.entry_vectors`.
        key: a typed PRNG key. Positions are independent.
        temperature: 0: the first of `top_k`. Others below 1e-6 are taken as that.
        top_p: only of the nucleus. None or 1: of all tokens.

    Returns:
        int32 (...).

    Raises:
        UserError: as `ops.sampling.sample`.
    """
    check_temperature(temperature)
    check_top_p(top_p)
    h_NxD = h.reshape(-1, h.shape[-1])
    level = first_level(h_NxD, vectors, weights, classes)
    temperature = jnp.asarray(temperature, jnp.float32)
    power = 1.0 / jnp.clip(temperature, *_TEMPERATURES)
    first_key, last_key = jax.random.split(key)

    def drawn() -> jax.Array:
        tokens_N, found_N = _draw(level, weights, classes, first_key, power, top_p)

        def others_by_logits() -> jax.Array:
            log_p_NxV = product_classes.log_probs(h_NxD, weights, classes)
            others_N = sampling.sample(log_p_NxV, last_key, temperature=temperature, top_p=top_p)
            return jnp.where(found_N, tokens_N, others_N)

        return jax.lax.cond(jnp.all(found_N), lambda: tokens_N, others_by_logits)

    def best() -> jax.Array:
        return _top_k(level, weights, classes, 1)[1][:, 0]

    return jax.lax.cond(temperature > 0, drawn, best).reshape(h.shape[:-1])


def _top_k(level: FirstLevel, weights: Weights, classes: Classes, k: int) -> _Best:
    """`top_k` of N positions."""
    vocab_size, num_classes = len(classes.entry_of), len(classes.members)
    check_k(k, vocab_size)
    order = class_order.descent(level, classes)
    log_p_NxF = level.log_p_of_frequent

    def better(best: _Best, log_p_NxI: jax.Array, tokens_NxI: jax.Array) -> _Best:
        log_p, tokens = (
            jnp.concatenate(x, axis=1) for x in zip(best, (log_p_NxI, tokens_NxI), strict=True)
        )
        return first_of_sorted(log_p, tokens, k)

    def may_be_better(state: tuple[jax.Array, _Best]) -> jax.Array:
        first, (best_Nxk, _) = state
        next_N = jax.lax.dynamic_index_in_dim(order.log_p, first, axis=1, keepdims=False)
        is_some = jnp.any((next_N >= best_Nxk[:, -1]) & (next_N > -jnp.inf))
        return (first < num_classes) & is_some

    def with_next_classes(state: tuple[jax.Array, _Best]) -> tuple[jax.Array, _Best]:
        first, best = state
        tokens = class_order.tokens(first, order, level, weights, classes)
        return first + order.at_a_time, better(best, *tokens)

    none = (
        jnp.full((len(log_p_NxF), k), -jnp.inf),
        jnp.full((len(log_p_NxF), k), vocab_size),
    )
    frequent = classes.entries[: num_frequent(classes)]
    best = better(none, log_p_NxF, jnp.broadcast_to(frequent, log_p_NxF.shape))
    _, (log_p_Nxk, tokens_Nxk) = jax.lax.while_loop(
        may_be_better, with_next_classes, (jnp.int32(0), best)
    )
    # Of NaN as a selection from V logits has it: NaN, and the first tokens.
    is_nan_Nx1 = jnp.isnan(level.log_p_of_classes[:, :1])
    log_p_Nxk = jnp.where(is_nan_Nx1, jnp.nan, log_p_Nxk)
    return log_p_Nxk, jnp.where(is_nan_Nx1, jnp.arange(k), tokens_Nxk).astype(jnp.int32)


def _draw(
    level: FirstLevel,
    weights: Weights,
    classes: Classes,
    key: jax.Array,
    power: jax.Array,
    top_p: float | jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Tokens of N positions by p(v)^power, and whether they were found: what is not is no draw."""
    frequent = num_frequent(classes)
    log_p_NxE = jnp.concatenate([level.log_p_of_frequent, level.log_p_of_classes], axis=1)
    # Relative to the largest: a high power leaves that one.
    log_weight_NxE = power * (log_p_NxE - jnp.max(log_p_NxE, axis=1, keepdims=True))
    # Probabilities of R tokens, each to that power, add up to at most R^(1 - power), or to 1.
    slack = jnp.maximum(1.0 - power, 0.0) * jnp.log(jnp.float32(classes.members.shape[1]))
    is_class_E = jnp.arange(log_p_NxE.shape[1]) >= frequent
    State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

    def draw(state: State) -> State:
        draws, tokens_N, found_N, bound_NxE = state
        keys = jax.random.split(jax.random.fold_in(key, draws), 3)
        entry_N = sampling.draw(bound_NxE, keys[0])
        is_frequent_N, class_N = entry_N < frequent, jnp.maximum(entry_N - frequent, 0)
        z_NxR = logits_of_classes(level.tables, weights, classes, class_N[:, None])[:, 0]
        log_p_NxR = jnp.minimum(jax.nn.log_softmax(z_NxR), 0.0)
        member_N = sampling.draw(power * log_p_NxR, keys[1])
        summed_N = jax.nn.logsumexp(power * log_p_NxR, axis=1)
        bound_N = _pick(bound_NxE, entry_N)
        weight_N = jnp.minimum(_pick(log_weight_NxE, entry_N) + summed_N, bound_N)
        weight_N = jnp.where(is_frequent_N, bound_N, weight_N)
        # With the probability of weight over bound. Not "<=": NaN is taken.
        taken_N = ~(bound_N - weight_N > jax.random.exponential(keys[2], weight_N.shape))
        token_N = jnp.where(
            is_frequent_N, classes.entries[entry_N], classes.members[class_N, member_N]
        )
        new_N = taken_N & ~found_N
        if top_p is not None:
            of_member_N = jnp.where(is_frequent_N, 0.0, _pick(log_p_NxR, member_N))
            log_p_N = _pick(log_p_NxE, entry_N) + of_member_N
            new_N = in_nucleus(level, weights, classes, token_N, log_p_N, new_N, power, top_p)
        bound_NxE = bound_NxE.at[jnp.arange(len(entry_N)), entry_N].set(weight_N)
        return draws + 1, jnp.where(new_N, token_N, tokens_N), found_N | new_N, bound_NxE

    def is_open(state: State) -> jax.Array:
        return (state[0] < _NUM_DRAWS) & ~jnp.all(state[2])

    none_N = jnp.zeros_like(log_p_NxE[:, 0], jnp.int32)
    bound_NxE = log_weight_NxE + jnp.where(is_class_E, slack, 0.0)
    state = jnp.int32(0), none_N, none_N.astype(bool), bound_NxE
    _, tokens_N, found_N, _ = jax.lax.while_loop(is_open, draw, state)
    return tokens_N, found_N


def _pick(x_NxI: jax.Array, index_N: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_NxI, index_N[:, None], axis=1)[:, 0]
