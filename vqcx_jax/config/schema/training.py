"""The optimizer and the loop."""

from typing import Literal

from pydantic.dataclasses import dataclass

from vqcx_jax.config.schema.types import (
    STRICT,
    Beta,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Optimizer:
    """AdamW with warm-up and decay."""

    learning_rate: PositiveFloat = 2e-3
    # "wsd": warm-up, stable, then linear decay over the last `decay_fraction` of the steps.
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegative = 50
    decay_fraction: Fraction = 0.2
    # The learning rate ends at this fraction of its peak.
    final_fraction: Fraction = 0.1
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    epsilon: PositiveFloat = 1e-8
    # Not applied to norms, biases and attention phases.
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: PositiveFloat | None = 1.0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Training:
    """The loop: how long, how often, what to keep."""

    steps: Positive = 300
    seed: NonNegative = 0
    # Microbatches per step: batch_size is split into this many, gradients are summed.
    grad_accumulation: Positive = 1
    # Coefficient of log(Z)^2 in the loss, for heads that have a Z.
    z_loss: NonNegativeFloat = 0.0
    log_every: Positive = 10
    # Periodic evaluation on the validation split; 0: only at the end.
    eval_every: NonNegative = 100
    # Validation batches in a periodic evaluation. None: the whole split.
    eval_batches: Positive | None = 20
    # Validation batches in the evaluation after the last step. None: the whole split.
    final_eval_batches: Positive | None = None
    checkpoint_every: Positive = 100
    keep_checkpoints: Positive = 2
    # Keep for good every checkpoint whose step is a multiple of this. None: none.
    keep_every: Positive | None = None
    # bfloat16 peak of one device, for MFU. None: known TPUs and GPUs only.
    peak_flops: PositiveFloat | None = None
    # A sample printed at the end of training; tokens to generate (0: none).
    sample_tokens: NonNegative = 64
    sample_prompt: str = ""
