"""The training state: the same whatever the mesh, laid out as declared, movable between meshes."""

import jax
import numpy as np
import pytest
from tiny_run import FinishedRun, tiny_optimizer

from vqcx_jax.config import schema
from vqcx_jax.nn import functional
from vqcx_jax.nn.build import abstract_model
from vqcx_jax.sharding import make_mesh
from vqcx_jax.training.checkpointing import Checkpoints
from vqcx_jax.training.state import abstract_state, init_state, state_shardings


def test_first_weights_do_not_depend_on_the_mesh(
    one_device: FinishedRun, eight_devices: FinishedRun
) -> None:
    # The random bits are the same; compiled for other shapes, the last bit of a product may differ.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
        one_device.initial,
        eight_devices.initial,
    )


def test_weights_and_moments_lie_as_the_rules_say(eight_devices: FinishedRun) -> None:
    state = eight_devices.run.state
    adam = next(
        part
        for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    )
    for params in (state.params, adam.mu, adam.nu):
        assert params["embedding"]["table"].sharding.spec == jax.P("tensor", "fsdp")
        assert params["blocks"]["mlp"]["down"].sharding.spec == jax.P(None, "tensor", "fsdp")
        assert params["head"]["codes"].sharding.spec == jax.P(None, "fsdp")
        table = params["embedding"]["table"]
        assert table.addressable_shards[0].data.shape == (264 // 2, 16 // 2)
    assert state.step.sharding.is_fully_replicated
    assert state.buffers["head"]["assignment"].sharding.is_fully_replicated


@pytest.mark.parametrize("saved_on", ["one", "eight"])
def test_checkpoint_moves_to_another_mesh(
    one_device: FinishedRun, eight_devices: FinishedRun, saved_on: str
) -> None:
    saved, here = (one_device, eight_devices)[:: 1 if saved_on == "one" else -1]
    mesh, config = here.run.mesh, here.config
    optimizer = tiny_optimizer(config)
    shardings = state_shardings(abstract_model(config), optimizer, mesh, config.sharding)
    with (
        jax.set_mesh(mesh),
        Checkpoints(saved.workdir / "checkpoints", config.train) as checkpoints,
    ):
        abstract = abstract_state(config, optimizer, shardings)
        state = checkpoints.restore(13, abstract, here.run.batches)
    jax.tree.map(np.testing.assert_array_equal, state, saved.run.state)
    wrong = jax.tree.map(lambda x, s: not x.sharding.is_equivalent_to(s, x.ndim), state, shardings)
    assert not any(jax.tree.leaves(wrong))
    assert {d for x in jax.tree.leaves(state) for d in x.devices()} == set(mesh.devices.flat)


@pytest.mark.parametrize("axis_type", ["explicit", "auto"])
def test_no_device_ever_holds_the_whole_model(axis_type: str) -> None:
    config = schema.Config(
        model=schema.Model(vocab_size=4096, embed_dim=256, num_layers=4, head=schema.FullHead())
    )
    mesh = make_mesh({"data": 1, "fsdp": 8, "tensor": 1}, axis_type)
    model, optimizer = abstract_model(config), tiny_optimizer(config)
    shardings = state_shardings(model, optimizer, mesh, config.sharding)
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda: init_state(config, None, optimizer, shardings)).lower().compile()
    _, params, _ = functional.split(model)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < whole / 2
