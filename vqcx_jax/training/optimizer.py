"""AdamW with a schedule, a gradient clip and a decay mask; all of it Optax."""

import optax

from vqcx_jax.config import schema
from vqcx_jax.nn.functional import Tree


def make_schedule(config: schema.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate at each step: linear warm-up, then what `config.schedule` says.

    Args:
        steps: length of the whole run.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = optax.linear_schedule(0.0, peak, max(config.warmup_steps, 1))
    decay_steps = max(steps - config.warmup_steps, 1)
    if config.schedule == "cosine":
        rest = [optax.cosine_decay_schedule(peak, decay_steps, config.final_fraction)]
        boundaries = [config.warmup_steps]
    elif config.schedule == "wsd":
        decay_steps = max(round(steps * config.decay_fraction), 1)
        decay_start = max(steps - decay_steps, config.warmup_steps)
        rest = [
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, final, decay_steps),
        ]
        boundaries = [config.warmup_steps, decay_start]
    else:
        rest, boundaries = [optax.constant_schedule(peak)], [config.warmup_steps]
    return optax.join_schedules([warmup, *rest], boundaries)


def make_optimizer(
    config: schema.Optimizer, schedule: optax.Schedule, decay_mask: Tree
) -> optax.GradientTransformation:
    """The update rule.

    Args:
        decay_mask: same tree as the parameters, True where weight decay applies.
    """
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
