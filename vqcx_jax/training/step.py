"""One optimizer step: loss, gradients over microbatches, update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from vqcx_jax.nn import functional
from vqcx_jax.nn.loss import Batch, observed_nll
from vqcx_jax.training.state import TrainState


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    z_loss: float,
    shardings: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted (state, batch) -> (state, metrics); the old state's memory is reused.

    The batch has a leading microbatch axis: (A, B/A, T). Gradients are of the loss summed over
    all A, divided once by the number of tokens, so A changes memory and not the result.

    Metrics, float32 (): loss (mean nll per token, nats), grad_norm (before clipping),
    learning_rate, param_norm (after the step), tokens.
    """
    gradient = jax.grad(observed_nll, argnums=1, has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        def accumulate(carry: Any, microbatch: Batch) -> tuple[Any, None]:
            grads, sums = gradient(graphdef, state.params, state.buffers, microbatch, z_loss)
            return jax.tree.map(jnp.add, carry, (grads, *sums)), None

        zero = jnp.zeros((), jnp.float32)
        model = nnx.merge(graphdef, state.params, state.buffers)
        of_params, of_head = jax.tree.map(jnp.zeros_like, (state.params, model.head.statistics()))
        zeros = (of_params, zero, zero, of_head)
        (grads, nll, tokens, observed), _ = jax.lax.scan(accumulate, zeros, batch)
        tokens = jnp.maximum(tokens, 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": nll / tokens,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "param_norm": optax.tree.norm(params),
            "tokens": tokens,
        }
        model.head.adapt(observed, state.step + 1)
        _, _, buffers = functional.split(model)
        return TrainState(state.step + 1, params, buffers, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))
