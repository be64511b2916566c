"""What a run is, in a few lines, before its first step."""

import jax

from vqcx_jax.config import schema
from vqcx_jax.maps import describe
from vqcx_jax.training.setup import Setup
from vqcx_jax.training.state import TrainState


def run_summary(setup: Setup, state: TrainState, mesh: jax.sharding.Mesh) -> str:
    """Text, model and devices of a run, and of a new one its token map.

    The output layer's share is its trained arrays over the V x D of a full softmax; a token bias
    counts, a token map (integers, not trained) does not.
    """
    config = setup.config
    vocab_size, devices = config.model.known_vocab_size(), mesh.devices.flatten()
    head = _size(state.params["head"])
    full = vocab_size * config.model.embed_dim
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return "\n".join(
        [
            f"text     {setup.corpus.name}, vocabulary of {vocab_size:,} tokens",
            f"model    {_size(state.params):,} parameters, {head:,} of them in the output layer: "
            f"{head / full:.1%} of a full softmax's {full:,}",
            *_token_map_lines(setup),
            f"devices  {len(devices)} x {devices[0].device_kind} ({shape})",
            f"steps    {int(state.step):,} done of {config.train.steps:,}, "
            f"{config.data.batch_size * config.data.seq_len:,} tokens each",
        ]
    )


def _token_map_lines(setup: Setup) -> list[str]:
    head, dim = setup.config.model.head, setup.config.model.embed_dim
    if not isinstance(head, schema.VQHead | schema.ClassVQHead) or setup.token_map is None:
        return []  # Another head, or a run that goes on: its map is in the checkpoint.
    assert setup.token_counts is not None
    return [
        describe(
            setup.token_map,
            embed_dim=dim,
            counts=setup.token_counts,
            form=head.form,
            token_bias=head.token_bias,
            token_scale=head.token_scale,
        )
    ]


def _size(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
