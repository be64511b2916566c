"""Output layers side by side: python benchmarks/output_layer.py [--tokens=512] [--vocab=50257].

Training: forward + backward of the mean loss, by the hidden states and all parameters, float32.
Decoding: one step of one sequence, from its hidden state to a sampled token.
All rows run in one process, and each repetition runs every row once, so that a drift of the
machine hits all alike. Temporary memory is what the compiled program needs beside its arguments
and results. "Speed" is the median time of the fastest full softmax over that of the row.
"""

import argparse
import dataclasses
import inspect
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqcx_jax.ops import codebook, softmax
from vqcx_jax.ops.codebook import reference

# A row is one function, from the arrays that it names (see `make_arrays`) to the losses of all
# positions. It is differentiated by all its arrays of floats. A full softmax is named so.
ROWS: dict[str, Callable[..., jax.Array]] = {
    "full (plain jax)": lambda h, weights, targets: softmax.nll(h, weights, targets)[0],
    "full (streamed)": lambda h, weights, targets: softmax.streamed_nll(h, weights, targets)[0],
    "VQ M=1": lambda h, codes, assignment, targets: codebook.nll(h, codes, assignment, targets)[0],
    "VQ M=1, token bias": lambda h, codes, assignment, targets, bias: codebook.nll(
        h, codes, assignment, targets, bias
    )[0],
    "VQ M=1, scattered to V logits": lambda h, codes, assignment, targets: reference.nll(
        h, codes, assignment, targets
    )[0],
}


def optax_nll(h: jax.Array, weights: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(h @ weights.T, targets)


def optax_chunked_nll(h: jax.Array, weights: jax.Array, targets: jax.Array) -> jax.Array:
    def position(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        return optax_nll(x[0], weights, x[1])

    return jax.lax.map(jax.checkpoint(position), (h, targets), batch_size=64)


PEERS = {
    "optax": ("full (optax)", optax_nll),
    "lax.map": ("full (optax, lax.map + remat)", optax_chunked_nll),
}


# A decoder is a row whose result is a token. `h` is that of the first position alone.
def sample_full(key: jax.Array, h: jax.Array, weights: jax.Array, bias: jax.Array) -> jax.Array:
    return jax.random.categorical(key, softmax.logits(h, weights, bias))


def sample_code_then_token(
    key: jax.Array,
    h: jax.Array,
    codes: jax.Array,
    code_log_mass: jax.Array,
    tokens_by_code: jax.Array,
    cumulative: jax.Array,
) -> jax.Array:
    code_key, token_key = jax.random.split(key)
    code = jax.random.categorical(code_key, codebook.code_logits(h, codes) + code_log_mass)
    uniform = jax.random.uniform(token_key, code.shape)
    return tokens_by_code[jnp.searchsorted(cumulative, code + uniform, side="right")]


DECODERS: dict[str, Callable[..., jax.Array]] = {
    "full: logits, categorical": sample_full,
    "VQ M=1, token bias: code, then token": sample_code_then_token,
}


def make_arrays(tokens: int, dim: int, vocab: int, codes: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(vocab)
    assignment = rng.permutation(np.arange(vocab) % codes)
    mass = np.bincount(assignment, np.exp(bias))
    order = np.argsort(assignment, kind="stable")
    arrays = {
        "h": rng.standard_normal((tokens, dim)),
        "targets": rng.integers(vocab, size=tokens),
        "weights": rng.standard_normal((vocab, dim)) / dim**0.5,
        "bias": bias,
        "codes": rng.standard_normal((codes, dim)) / dim**0.5,
        "assignment": assignment,
        "code_log_mass": np.log(mass),
        "tokens_by_code": order,
        # Of tokens_by_code: code + p(this token or one before it | code), to float32's digits.
        "cumulative": np.cumsum(np.exp(bias[order]) / mass[assignment[order]]),
    }
    kinds = {"f": jnp.float32, "i": jnp.int32}
    return {name: jnp.asarray(x, kinds[x.dtype.kind]) for name, x in arrays.items()}


@dataclasses.dataclass
class Step:
    """A call that waits for its result, the bytes that it needs meanwhile, and its times."""

    call: Callable[[], Any]
    temporary_bytes: int | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)


def compile_step(function: Callable[..., Any], args: list[jax.Array]) -> Step:
    compiled = jax.jit(function).lower(*args).compile()
    memory = compiled.memory_analysis()
    needed = memory and memory.temp_size_in_bytes
    return Step(lambda: jax.block_until_ready(compiled(*args)), needed)


def named_arrays(function: Callable[..., Any], arrays: dict[str, jax.Array]) -> list[jax.Array]:
    return [arrays[name] for name in inspect.signature(function).parameters]


def training_step(nll: Callable[..., jax.Array], arrays: dict[str, jax.Array]) -> Step:
    args = named_arrays(nll, arrays)
    floats = tuple(i for i, x in enumerate(args) if x.dtype == jnp.float32)
    return compile_step(jax.value_and_grad(lambda *args: jnp.mean(nll(*args)), floats), args)


def torch_step(arrays: dict[str, jax.Array]) -> Step:
    import torch

    names = ("h", "weights", "targets")
    h, weights, targets = (torch.from_numpy(np.array(arrays[name])) for name in names)
    h.requires_grad_(), weights.requires_grad_()

    def call() -> None:
        h.grad = weights.grad = None
        torch.nn.functional.cross_entropy(h @ weights.T, targets.long()).backward()

    return Step(call)


def measure(rows: dict[str, Step], repeats: int) -> None:
    for row in rows.values():
        row.call()
    for _ in range(repeats):
        for row in rows.values():
            start = time.perf_counter()
            row.call()
            row.seconds.append(time.perf_counter() - start)


def print_table(title: str, rows: dict[str, Step]) -> None:
    medians = {name: statistics.median(row.seconds) for name, row in rows.items()}
    fastest = min(median for name, median in medians.items() if name.startswith("full"))
    print(f"\n| {title} | ms, median | min - max | speed | temporary MB |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        low, high = 1e3 * min(row.seconds), 1e3 * max(row.seconds)
        memory = "" if row.temporary_bytes is None else f"{row.temporary_bytes / 1e6:.2f}"
        print(
            f"| {name} | {1e3 * medians[name]:.3g} | {low:.3g} - {high:.3g} "
            f"| {fastest / medians[name]:.2f} | {memory} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="positions of a batch")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--codes", type=int, default=503)
    parser.add_argument("--repeats", type=int, default=15)
    installed = [*PEERS, "torch"] if find_spec("torch") else [*PEERS]
    parser.add_argument("--peers", nargs="*", choices=installed, default=installed)
    args = parser.parse_args()

    arrays = make_arrays(args.tokens, args.dim, args.vocab, args.codes)
    functions = ROWS | dict(PEERS[name] for name in args.peers if name in PEERS)
    rows = {name: training_step(nll, arrays) for name, nll in functions.items()}
    if "torch" in args.peers:
        rows["full (torch)"] = torch_step(arrays)
    measure(rows, args.repeats)

    one = arrays | {"h": arrays["h"][:1], "key": jax.random.key(0)}
    decoders = {name: compile_step(f, named_arrays(f, one)) for name, f in DECODERS.items()}
    measure(decoders, 20 * args.repeats)

    shape = f"N={args.tokens} D={args.dim} V={args.vocab} K={args.codes}"
    print(f"{shape}, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print_table("training step", rows)
    print_table("decoding step", decoders)


if __name__ == "__main__":
    main()
