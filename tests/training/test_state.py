"""The training state: made where it belongs."""

import jax
import pytest
from tiny_run import tiny_optimizer

from vqcx_jax.config import schema
from vqcx_jax.nn import functional
from vqcx_jax.nn.build import abstract_model
from vqcx_jax.sharding import make_mesh
from vqcx_jax.training.state import init_state, state_shardings


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
