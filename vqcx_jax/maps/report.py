"""What a token map costs and what it can reach, known before the first step."""

import math

import numpy as np

from vqcx_jax.maps.token_map import TokenMap

_BFLOAT16_BYTES = 2


def describe(
    token_map: TokenMap,
    *,
    embed_dim: int,
    counts: np.ndarray,
    form: str,
    token_bias: bool,
    token_scale: bool,
) -> str:
    """A few lines about a head of codes: size, codes, use of the codes, and the cost of ties.

    Args:
        token_map: the map.
        embed_dim: D, width of the hidden state.
        counts: int (V,) occurrences in the training text, not all 0.
        form: "additive" or "product", see `schema.VQHead`.
        token_bias: whether each token has a trained bias.
        token_scale: whether each token has a trained scale.
    """
    vocab_size, own = token_map.vocab_size, len(token_map.own_tokens)
    full = vocab_size * embed_dim
    vectors = vector_parameters(token_map, embed_dim, form)
    num_classes = 0 if token_map.classes is None else len(token_map.classes.codes)
    scalars = (vocab_size + num_classes) * (token_bias + token_scale)
    of_codes = code_bytes(token_map)
    of_parameters = _BFLOAT16_BYTES * (vectors + scalars)
    share_of_bytes = (of_codes + of_parameters) / (_BFLOAT16_BYTES * full)
    share = (vectors + scalars) / full
    with_scalars = f"; {share:.2%} with {scalars:,} biases and scales" if scalars else ""
    usage = code_usage(token_map, counts)
    lines = [
        f"codes    {_sizes(token_map)} a token, {code_bits(token_map)} bits: "
        f"{distinct_tuples(token_map):,} different ones for {vocab_size - own:,} tokens; "
        f"{own:,} have a vector of their own",
        f"vectors  {vectors:,} parameters, {vectors / full:.2%} of a full head's {full:,}"
        + with_scalars,
        f"bytes    {of_codes:,} of codes and {of_parameters:,} of bfloat16 parameters, "
        f"{share_of_bytes:.2%} of a full head's",
        f"usage    perplexity of codes in the text "
        f"{_range([perplexity for perplexity, _ in usage])}, {sum(n for _, n in usage)} unused",
    ]
    if token_map.classes is not None:
        sizes = np.bincount(token_map.classes.of_token + 1)
        lines.append(
            f"classes  {num_classes:,} of at most {sizes[1:].max():,} tokens, beside "
            f"{sizes[0]:,} frequent ones"
        )
    floor = perplexity_floor(token_map, counts)
    tied = "would be tied without biases and scales" if scalars else "are tied"
    lines.append(f"floor    tokens with equal codes {tied}: perplexity x {floor:.3f}")
    return "\n".join(lines)


def vector_parameters(token_map: TokenMap, embed_dim: int, form: str) -> int:
    """Numbers in code vectors and own vectors."""
    width = embed_dim // token_map.num_codebooks if form == "product" else embed_dim
    return sum(token_map.num_codes) * width + len(token_map.own_tokens) * embed_dim


def code_bits(token_map: TokenMap) -> int:
    """Bits that hold one token's codes."""
    return sum(math.ceil(math.log2(k)) for k in token_map.num_codes)


def code_bytes(token_map: TokenMap) -> int:
    """Bytes that hold the codes of all tokens (and the classes, and theirs), packed to the bit."""
    bits = token_map.vocab_size * code_bits(token_map)
    if token_map.classes is not None:
        num_classes = len(token_map.classes.codes)
        bits += num_classes * code_bits(token_map)
        bits += token_map.vocab_size * math.ceil(math.log2(num_classes + 1))
    return math.ceil(bits / 8)


def distinct_tuples(token_map: TokenMap) -> int:
    """Tuples of codes (and class) that some token has."""
    return len(np.unique(_tuples(token_map), axis=0))


def tuple_sizes(token_map: TokenMap) -> np.ndarray:
    """Tokens that have all the codes of a token, itself included. int64 (V,); own tokens: 1.

    Tokens of different classes are told apart by these.
    """
    _, tuples, sizes = np.unique(
        _tuples(token_map), axis=0, return_inverse=True, return_counts=True
    )
    of_tokens = np.ones(token_map.vocab_size, np.int64)
    of_tokens[token_map.coded_tokens()] = sizes[tuples]
    return of_tokens


def perplexity_floor(token_map: TokenMap, counts: np.ndarray) -> float:
    """The factor on perplexity that no training removes if equal codes mean equal logits.

    A token's probability is that of its tuple of codes over the n tokens that share it, so the
    factor is exp(E[log n]), the expectation over `counts`. 1.0 if all tuples are different.
    """
    return math.exp(np.average(np.log(tuple_sizes(token_map)), weights=counts))


def code_usage(token_map: TokenMap, counts: np.ndarray) -> list[tuple[float, int]]:
    """Of each codebook: perplexity of its codes in the text, and codes that no token has.

    K if the text uses all codes equally often. Own tokens do not count.
    """
    coded = token_map.coded_tokens()
    usage = []
    for column, k in zip(token_map.codes[coded].T, token_map.num_codes, strict=True):
        mass = np.bincount(column, counts[coded], minlength=k)
        shares = mass[mass > 0] / max(
            1.0, float(np.sum(mass))
        )  # Own tokens may be all of the text.
        perplexity = math.exp(-np.sum(shares * np.log(shares)))
        usage.append((perplexity, k - len(np.unique(column))))
    return usage


def _tuples(token_map: TokenMap) -> np.ndarray:
    coded = token_map.coded_tokens()
    if token_map.classes is None:
        return token_map.codes[coded]
    return np.column_stack([token_map.codes[coded], token_map.classes.of_token[coded]])


def _sizes(token_map: TokenMap) -> str:
    """The sizes of the codebooks, "3 x 256" or "256 + 128"."""
    sizes = token_map.num_codes
    if len(set(sizes)) > 1:
        return " + ".join(map(str, sizes))
    return f"{len(sizes)} x {sizes[0]}"


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} .. {high}"
