"""Output layers side by side: python benchmarks/output_layer.py [--tokens=512] [--vocab 50257].

Training: forward + backward of the mean loss, by the hidden states and all parameters. As
in a training loop, calls follow each other without a pause and only the last one is waited for: as
many as fill 0.2 s, a number found in a warm-up. A time is that of all of them over their number.
V logits (--logits): those of all positions, for whoever asks for them; timed like training.
Decoding: one sequence, in a loop within one program, as in `vqcx_jax.evaluation`. A step is from a
hidden state to a sampled token, which picks the next hidden state of 256, so that no step can begin
before the one before it ends. Its time is that of a long loop less that of a short one, over the
steps between: the call of the program and what `Head.sampler` does once, such as sorting the
vocabulary, are not in it, and stand in a column of their own ("once").
All rows of a table run in one process, and each repetition runs every row once, so that a drift of
the machine hits all alike. Temporary memory is what the compiled program needs beside its arguments
and results. "Speed" is the median time of the fastest full softmax over that of the row.

Several sizes make several tables: --vocab 8192 50257 262144, or --codes 64 512 4096. Rows whose V
logits or V vectors would need more than --max_gb are left out. --plot=FILE.svg draws times by size.
"""

import argparse
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from timing import Step, compile_step, measure, number_that_fills

from vqcx_jax.config import schema
from vqcx_jax.nn import functional, heads
from vqcx_jax.ops import codebook
from vqcx_jax.ops.codebook import classes
from vqcx_jax.ops.hierarchical import huffman_paths


@dataclasses.dataclass(frozen=True)
class Sizes:
    """N positions, width D, V tokens, K codes; hidden states and products in `dtype`."""

    tokens: int
    dim: int
    vocab: int
    codes: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"N={self.tokens} D={self.dim} V={self.vocab} K={self.codes} {self.dtype}"


def common(sizes: Sizes) -> dict[str, Any]:
    """Options that all heads have."""
    return {"dtype": jnp.dtype(sizes.dtype), "rngs": nnx.Rngs(0)}


def vq(
    sizes: Sizes, token_bias: bool = True, kind: type[heads.VQHead] = heads.VQHead
) -> heads.Head:
    assignment = np.random.default_rng(0).permutation(np.arange(sizes.vocab) % sizes.codes)
    options = {"token_bias": token_bias, **common(sizes)}
    return kind(assignment, sizes.codes, sizes.dim, **options)


class VQInBlocks(heads.VQHead):
    """Holds the code logits of 64 positions at a time."""

    def summed_nll(
        self, h_BxTxD: jax.Array, targets: jax.Array, counts: jax.Array, z_loss: Any = 0.0
    ) -> tuple[jax.Array, jax.Array]:
        """See `Head.summed_nll`; on one device."""
        codes, assignment, bias = self.codes[...], self.assignment[...], self.bias[...]
        return codebook.summed_nll(
            h_BxTxD,
            codes.astype(h_BxTxD.dtype),
            assignment,
            targets,
            counts,
            bias,
            z_loss,
            token_block=64,
        )


def two_codebooks(sizes: Sizes) -> heads.Head:
    side = math.ceil(sizes.vocab**0.5)
    cells = np.random.default_rng(0).permutation(side * side)[: sizes.vocab]
    assignment = np.stack([cells // side, cells % side], axis=1)
    return heads.MultiVQHead(assignment, side, sizes.dim, **common(sizes))


def own_and_two_codebooks(sizes: Sizes) -> heads.Head:
    """K vectors in all, as in benchmarks/campaigns/heads.py: half of them for tokens alone."""
    half, quarter = sizes.codes // 2, sizes.codes // 4
    assignment = np.random.default_rng(0).integers(quarter, size=(sizes.vocab, 2))
    options = {"own_tokens": jnp.arange(half), **common(sizes)}
    return heads.MultiVQHead(assignment, quarter, sizes.dim, **options)


def product_16(sizes: Sizes, expand: bool) -> heads.Head:
    codes = min(256, sizes.vocab)
    assignment = np.random.default_rng(0).integers(codes, size=(sizes.vocab, 16))
    options = {"form": "product", "expand_vectors": expand, **common(sizes)}
    return heads.MultiVQHead(assignment, codes, sizes.dim, **options)


def product_in_classes(sizes: Sizes, num_codebooks: int, num_codes: int) -> heads.Head:
    """With as many classes as `schema.ClassVQHead` has by default."""
    rng, codes = np.random.default_rng(0), min(num_codes, sizes.vocab)
    num_classes, num_frequent, _ = schema.ClassVQHead().sizes(sizes.vocab)
    rest = rng.permutation(np.arange(sizes.vocab - num_frequent) % num_classes)
    class_of = np.append(np.full(num_frequent, -1), rest).astype(np.int32)
    assignment = jnp.asarray(rng.integers(codes, size=(sizes.vocab + num_classes, num_codebooks)))
    tokens = classes.arrange(class_of, num_classes)
    options = {"token_scale": True, **common(sizes)}
    return heads.ClassVQHead(tokens, assignment, codes, sizes.dim, **options)


def full(sizes: Sizes, implementation: Any) -> heads.Head:
    options = {"implementation": implementation, **common(sizes)}
    return heads.FullHead(sizes.vocab, sizes.dim, **options)


def adaptive(sizes: Sizes) -> heads.Head:
    cutoffs = [sizes.vocab // 25, sizes.vocab // 5]
    return heads.AdaptiveHead(sizes.vocab, sizes.dim, cutoffs, **common(sizes))


def huffman(sizes: Sizes) -> heads.Head:
    paths = huffman_paths(1_000_000 // np.arange(1, sizes.vocab + 1))
    return heads.HuffmanHead(jnp.asarray(paths), sizes.dim, rngs=nnx.Rngs(0))


# A full softmax is named so; "needs V" marks what makes V vectors or V logits.
HEADS: dict[str, tuple[Callable[[Sizes], heads.Head], bool]] = {
    "full (plain jax)": (lambda s: full(s, "plain"), True),
    "full (streamed)": (lambda s: full(s, "streamed"), True),
    "low rank, R = 64": (
        lambda s: heads.LowRankHead(s.vocab, s.dim, 64, **common(s)),
        True,
    ),
    "adaptive softmax": (adaptive, True),
    "hierarchical, classes": (
        lambda s: heads.TwoLevelHead(s.vocab, s.dim, rngs=nnx.Rngs(0)),
        True,
    ),
    "hierarchical, Huffman": (huffman, True),
    "VQ M=1, no bias": (lambda s: vq(s, token_bias=False), False),
    "VQ M=1": (vq, False),
    "VQ M=1, 64 positions at a time": (lambda s: vq(s, kind=VQInBlocks), False),
    "VQ M=2, sqrt(V) codes each": (two_codebooks, False),
    "VQ M=2 and own vectors, K in all": (own_and_two_codebooks, False),
    "VQ product M=16 in classes": (lambda s: product_in_classes(s, 16, 256), False),
    "VQ product M=64 in classes": (lambda s: product_in_classes(s, 64, 64), False),
    "VQ product M=16, vectors": (lambda s: product_16(s, expand=True), True),
    "VQ product M=16, codes": (lambda s: product_16(s, expand=False), False),
}
DECODERS = (
    "full (plain jax)",
    "VQ M=1",
    "VQ M=2, sqrt(V) codes each",
    "VQ M=2 and own vectors, K in all",
    "VQ product M=16 in classes",
    "VQ product M=64 in classes",
)


def random_head(make: Callable[[Sizes], heads.Head], sizes: Sizes) -> heads.Head:
    """With parameters that make logits of deviation one or so."""
    graphdef, params, buffers = functional.split(make(sizes))
    rng = np.random.default_rng(1)

    def randomise(x: jax.Array) -> jax.Array:
        scale = 1.0 if x.ndim == 1 else x.shape[-1] ** -0.5
        return jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32)

    return nnx.merge(graphdef, jax.tree.map(randomise, params), buffers)


def without_favourites(head: heads.Head) -> heads.Head:
    """For hidden states of 0 all tokens are as probable as each other."""
    graphdef, params, buffers = functional.split(head)
    head = nnx.merge(graphdef, params, buffers)
    if hasattr(head, "scale"):
        head.scale[...] = jnp.ones_like(head.scale[...])
    if hasattr(head, "bias"):
        bias = jnp.zeros_like(head.bias[...])
        if isinstance(head, heads.ClassVQHead):
            sizes_C = jnp.sum(head.members[...] >= 0, axis=1)
            bias = bias.at[head.vocab_size :].set(jnp.log(sizes_C))
        head.bias[...] = bias
    return head


# ---------------------------------------------------------------- peers


def optax_nll(h: jax.Array, weights: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(h @ weights.T, targets)


def optax_chunked_nll(h: jax.Array, weights: jax.Array, targets: jax.Array) -> jax.Array:
    def position(x: tuple[jax.Array, jax.Array]) -> jax.Array:
        return optax_nll(x[0], weights, x[1])

    return jax.lax.map(jax.checkpoint(position), (h, targets), batch_size=64)


def cce_loss(h: jax.Array, weights: jax.Array, targets: jax.Array) -> jax.Array:
    from jax_cce import linear_cross_entropy

    return linear_cross_entropy(h, weights, targets)


PEERS = {
    "optax": ("full (optax)", optax_nll),
    "lax.map": ("full (optax, lax.map + remat)", optax_chunked_nll),
    "jax-cce": ("full (jax-cce)", cce_loss),
}
MODULES = {"optax": "optax", "lax.map": "optax", "jax-cce": "jax_cce", "torch": "torch"}


def torch_steps(h: np.ndarray, targets: np.ndarray, sizes: Sizes) -> dict[str, "Step"]:
    import torch

    functional = torch.nn.functional
    h_t = torch.from_numpy(h.copy()).requires_grad_()
    targets_t = torch.from_numpy(targets.astype(np.int64))
    weights = (torch.randn(sizes.vocab, sizes.dim) / sizes.dim**0.5).requires_grad_()
    cutoffs = [sizes.vocab // 25, sizes.vocab // 5]
    adaptive = torch.nn.AdaptiveLogSoftmaxWithLoss(sizes.dim, sizes.vocab, cutoffs)
    losses = {
        "full (torch cross_entropy)": lambda: functional.cross_entropy(h_t @ weights.T, targets_t),
        "adaptive softmax (torch)": lambda: adaptive(h_t, targets_t).loss,
    }
    if hasattr(functional, "linear_cross_entropy"):
        losses["full (torch linear_cross_entropy)"] = lambda: functional.linear_cross_entropy(
            h_t, weights, targets_t
        )

    def step(loss: Callable[[], Any]) -> Step:
        def call() -> None:
            h_t.grad = weights.grad = None
            adaptive.zero_grad()
            loss().backward()

        return Step(call=call)

    return {name: step(loss) for name, loss in losses.items()}


# ---------------------------------------------------------------- measuring


def training_step(head: heads.Head, h: Any, targets: np.ndarray) -> Step:
    graphdef, params, buffers = functional.split(head)

    def loss(params: Any, h_BxTxD: jax.Array, buffers: Any, targets_BxT: jax.Array) -> jax.Array:
        head = nnx.merge(graphdef, params, buffers)
        is_token_BxT = jnp.ones_like(targets_BxT, bool)
        return head.summed_nll(h_BxTxD, targets_BxT, is_token_BxT)[0] / targets_BxT.size

    step = jax.value_and_grad(loss, (0, 1))
    return compile_step(step, params, h[None], buffers, targets[None])


def logits_step(head: heads.Head, h: Any) -> Step:
    graphdef, params, buffers = functional.split(head)

    def logits(params: Any, h_BxTxD: jax.Array, buffers: Any) -> jax.Array:
        return nnx.merge(graphdef, params, buffers).logits(h_BxTxD)

    return compile_step(logits, params, h[None], buffers)


def peer_step(nll: Callable[..., jax.Array], *args: Any) -> Step:
    return compile_step(jax.value_and_grad(lambda *x: jnp.mean(nll(*x)), (0, 1)), *args)


def decoding_loop(
    head: heads.Head, sizes: Sizes, args: argparse.Namespace
) -> Callable[[int], float]:
    """A function that decodes so many tokens and returns the seconds it took."""
    states = np.random.default_rng(3).standard_normal((256, sizes.dim))
    if args.spread is not None:
        head, states = without_favourites(head), args.spread * states
    graphdef, params, buffers = functional.split(head)
    states_SxD = jnp.asarray(states, sizes.dtype)

    def decode(
        num_tokens: Any, temperature: Any, params: Any, buffers: Any, states_SxD: Any, key: Any
    ) -> jax.Array:
        head = nnx.merge(graphdef, params, buffers)
        sample = head.sampler(temperature=temperature, top_p=args.top_p)

        def step(index: Any, token_1x1: jax.Array) -> jax.Array:
            h_1x1xD = states_SxD[token_1x1 % len(states_SxD)]
            return sample(h_1x1xD, jax.random.fold_in(key, index))

        return jax.lax.fori_loop(0, num_tokens, step, jnp.zeros((1, 1), jnp.int32))

    inputs = jnp.float32(args.temperature), params, buffers, states_SxD, jax.random.key(0)
    compiled = jax.jit(decode).lower(jnp.int32(0), *inputs).compile()

    def seconds(num_tokens: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled(jnp.int32(num_tokens), *inputs))
        return time.perf_counter() - start

    return seconds


@dataclasses.dataclass
class Decoding:
    """Seconds a token, and those of what is done once."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    once: list[float] = dataclasses.field(default_factory=list)


def measure_decoding(loops: dict[str, Callable[[int], float]], repeats: int) -> dict[str, Decoding]:
    lengths = {name: number_that_fills(seconds) for name, seconds in loops.items()}
    rows = {name: Decoding() for name in loops}
    for _ in range(repeats):
        for name, seconds in loops.items():
            short = seconds(1)
            rows[name].seconds.append((seconds(1 + lengths[name]) - short) / lengths[name])
            rows[name].once.append(short - rows[name].seconds[-1])
    return rows


def print_table(title: str, last: str, rows: Mapping[str, tuple[list[float], str]]) -> None:
    """Rows of seconds and the text of the last column."""
    medians = {name: statistics.median(seconds) for name, (seconds, _) in rows.items()}
    full_rows = [median for name, median in medians.items() if name.startswith("full")]
    fastest = min(full_rows, default=math.nan)
    print(f"\n| {title} | ms, median | min - max | speed | {last} |")
    print("|---|---|---|---|---|")
    for name, (seconds, text) in rows.items():
        print(
            f"| {name} | {1e3 * medians[name]:.3g} | {1e3 * min(seconds):.3g} - "
            f"{1e3 * max(seconds):.3g} | {fastest / medians[name]:.2f} | {text} |",
            flush=True,
        )


def print_steps(title: str, rows: dict[str, Step]) -> None:
    megabytes = {n: f"{r.temporary / 1e6:.2f}" if r.temporary else "" for n, r in rows.items()}
    print_table(title, "temporary MB", {n: (rows[n].seconds, megabytes[n]) for n in rows})


def measure_sizes(sizes: Sizes, args: argparse.Namespace) -> dict[str, Step]:
    rng = np.random.default_rng(2)
    h = rng.standard_normal((sizes.tokens, sizes.dim), np.float32)
    targets = rng.integers(sizes.vocab, size=sizes.tokens).astype(np.int32)
    # Weights, their gradients and logits, and two of each where XLA keeps a copy.
    fits = 16 * sizes.vocab * (sizes.tokens + sizes.dim) < 1e9 * args.max_gb
    asked = {name: HEADS[name] for name in args.rows}
    chosen = {name: make for name, (make, needs_v) in asked.items() if fits or not needs_v}
    made = {name: random_head(make, sizes) for name, make in chosen.items()}
    h_in_dtype = jnp.asarray(h, sizes.dtype)
    rows = {name: training_step(head, h_in_dtype, targets) for name, head in made.items()}
    if fits:
        weights = jnp.asarray(rng.standard_normal((sizes.vocab, sizes.dim), np.float32))
        weights = weights / sizes.dim**0.5
        for name, nll in (PEERS[peer] for peer in args.peers if peer in PEERS):
            rows[name] = peer_step(nll, h, weights, targets)
        if "torch" in args.peers:
            rows |= torch_steps(h, targets, sizes)
    measure(rows, args.repeats)
    print(f"\n{sizes}, jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print_steps("training step", rows)
    if args.logits:
        of_logits = {n: logits_step(made[n], h_in_dtype) for n in DECODERS if n in made and fits}
        measure(of_logits, args.repeats)
        print_steps("V logits", of_logits)
    loops = {n: decoding_loop(made[n], sizes, args) for n in DECODERS if n in made}
    decoding = measure_decoding(loops, args.repeats)
    once = {name: f"{1e3 * statistics.median(row.once):.3g}" for name, row in decoding.items()}
    print_table("decoding step", "once, ms", {n: (decoding[n].seconds, once[n]) for n in decoding})
    return rows


def draw(tables: dict[Sizes, dict[str, Step]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    varied = "vocab" if len({sizes.vocab for sizes in tables}) > 1 else "codes"
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name in dict.fromkeys(itertools.chain.from_iterable(tables.values())):
        points = [
            (getattr(sizes, varied), 1e3 * statistics.median(rows[name].seconds))
            for sizes, rows in tables.items()
            if name in rows
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel=varied, ylabel="training step, ms (median)")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="positions of a batch")
    parser.add_argument("--dim", type=int, nargs="+", default=[256])
    parser.add_argument("--vocab", type=int, nargs="+", default=[50257])
    parser.add_argument("--codes", type=int, nargs="+", default=[503])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--spread", type=float, help="of logits in decoding, from all alike on")
    parser.add_argument("--temperature", type=float, default=1.0, help="of decoding")
    parser.add_argument("--top_p", type=float, help="of decoding; all tokens without it")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--max_gb", type=float, default=8.0)
    parser.add_argument("--rows", nargs="+", choices=[*HEADS], default=[*HEADS], metavar="NAME")
    parser.add_argument("--logits", action="store_true", help="time V logits of the batch, too")
    parser.add_argument("--plot", type=Path, help="needs matplotlib")
    installed = [peer for peer, module in MODULES.items() if find_spec(module)]
    parser.add_argument("--peers", nargs="*", choices=installed, help="in float32")
    args = parser.parse_args()
    if args.peers is None:
        args.peers = installed if args.dtype == "float32" else []
    if args.peers and args.dtype != "float32":
        parser.error(f"--peers {args.peers} --dtype={args.dtype}: peers run in float32")
    tables = {}
    for dim, vocab, codes in itertools.product(args.dim, args.vocab, args.codes):
        sizes = Sizes(args.tokens, dim, vocab, codes, args.dtype)
        tables[sizes] = measure_sizes(sizes, args)
    if args.plot is not None:
        draw(tables, args.plot)


if __name__ == "__main__":
    main()
