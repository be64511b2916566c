"""Which implementation runs, and what happens to one that cannot."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

from vqcx_jax.errors import UserError
from vqcx_jax.ops import device, dispatch
from vqcx_jax.ops.codebook import streaming


def refuse() -> str:
    raise dispatch.NotSupported("it is too wide")


@pytest.fixture(params=["cpu", "tpu", "gpu"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(device, "current", lambda: device.Device(request.param, "a model"))
    return request.param


def test_default_is_the_kernel_where_there_is_one(platform: str) -> None:
    names = ("xla", "pallas_tpu", "mosaic_gpu", "cudnn")
    implementations = {name: functools.partial(str, name) for name in names}
    first = {"tpu": "pallas_tpu", "gpu": "cudnn", "cpu": "xla"}[platform]
    with dispatch.record() as traced:
        assert dispatch.run("an operation", implementations, None) == first
    assert traced == [("an operation", first)]


def test_named_implementation_runs_or_is_an_error(platform: str) -> None:
    implementations = {"xla": lambda: "xla", "pallas_tpu": lambda: "pallas_tpu"}
    assert dispatch.run("an operation", implementations, "xla") == "xla"
    if platform == "tpu":
        assert dispatch.run("an operation", implementations, "pallas_tpu") == "pallas_tpu"
        refusing = implementations | {"pallas_tpu": refuse}
        with pytest.raises(UserError, match="implementation='pallas_tpu': it is too wide"):
            dispatch.run("an operation", refusing, "pallas_tpu")
    else:
        message = f"implementation='pallas_tpu': needs a tpu, and this is a {platform}"
        with pytest.raises(UserError, match=message):
            dispatch.run("an operation", implementations, "pallas_tpu")
    with pytest.raises(UserError, match="implementation='cuda': an operation has pallas_tpu, xla"):
        dispatch.run("an operation", implementations, "cuda")


def test_default_tries_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "a model"))
    monkeypatch.setattr(dispatch, "_warned", set())
    implementations = {"xla": lambda: "xla", "cudnn": refuse, "mosaic_gpu": lambda: "mosaic_gpu"}
    with pytest.warns(UserWarning, match="an operation: not by cudnn: it is too wide"):
        assert dispatch.run("an operation", implementations, None) == "mosaic_gpu"


def test_default_falls_back_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "current", lambda: device.Device("tpu", "TPU v5"))
    monkeypatch.setattr(dispatch, "_warned", set())
    implementations = {"pallas_tpu": refuse, "xla": lambda: "xla"}
    with pytest.warns(UserWarning, match="an operation: not by pallas_tpu: it is too wide"):
        assert dispatch.run("an operation", implementations, None) == "xla"
    with warnings.catch_warnings(), dispatch.record() as traced:
        warnings.simplefilter("error")
        assert dispatch.run("an operation", implementations, None) == "xla"
    assert traced == [("an operation", "xla")]


def test_streamed_loss_takes_plain_jax_on_a_cpu() -> None:
    l, codes = jnp.zeros((4, 5)), jnp.zeros((7, 1), jnp.int32)
    with dispatch.record() as traced:
        streaming.log_z((l,), codes)
    assert traced == [("codebook.streaming.log_z", "xla")]
    with pytest.raises(UserError, match="implementation='pallas_tpu': needs a tpu"):
        streaming.log_z((l,), codes, implementation="pallas_tpu")


def test_device_is_that_of_the_mesh() -> None:
    assert device.current() == device.Device("cpu", "cpu")
    with jax.set_mesh(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])):
        assert device.current() == device.Device("cpu", "cpu")
