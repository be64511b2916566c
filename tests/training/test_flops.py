import dataclasses
from typing import Any, cast

import jax
import pytest

from vqcx_jax.config import schema
from vqcx_jax.training.flops import matrix_parameters, peak_flops, train_flops_per_token

MODEL = schema.Model(
    vocab_size=100,
    embed_dim=8,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=20,
    attention=schema.RopeAttention(),
    head=schema.VQHead(num_codes=10),
)


def test_by_hand() -> None:
    # A layer: q and out 8 x 4 x 6, k and v 8 x 2 x 6, three MLP matrices 8 x 20.
    layer = 2 * 192 + 2 * 96 + 3 * 160
    assert matrix_parameters(MODEL) == (3 * layer, 10 * 8)
    # Scores and values of a token: 17 / 2 positions seen on average, 4 heads of 6, twice 2 FLOPs
    # forward and twice that backward.
    attention = 3 * (17 / 2) * 4 * 6 * 4 * 3
    assert train_flops_per_token(MODEL, 16) == 6 * (3 * layer + 80) + attention


@pytest.mark.parametrize(
    ("attention", "keys", "widths"),
    [
        # Of 16 tokens the first 4 see 1 to 4 positions, the others 5.
        (schema.RopeAttention(window=5), (10 + 12 * 5) / 16, 6 + 6),
        (schema.AlibiAttention(window=1), 1, 6 + 6),
        (schema.NopeAttention(window=16), 17 / 2, 6 + 6),
        (schema.SmoothAttention(window=99), 17 / 2, 6 + 6),
        (schema.HarmonicAttention(num_harmonics=3), 17 / 2, 3 * 6 + 6),
        (schema.PopeAttention(window=5), (10 + 12 * 5) / 16, 2 * 6 + 6),
    ],
)
def test_scores_and_values(attention: Any, keys: float, widths: int) -> None:
    """Forward, and twice that backward, 2 FLOPs for each of 4 heads in 3 layers."""
    config = dataclasses.replace(MODEL, attention=attention)
    others = 6 * sum(matrix_parameters(MODEL))
    assert train_flops_per_token(config, 16) - others == pytest.approx(
        3 * 2 * 4 * 3 * keys * widths
    )


def test_full_head_multiplies_with_every_row() -> None:
    full = schema.Model(vocab_size=100, embed_dim=8, head=schema.FullHead())
    assert matrix_parameters(full)[1] == 800


@pytest.mark.parametrize(
    ("head", "weights"),
    [
        (schema.LowRankHead(rank=3), 3 * 8 + 100 * 3),
        # 20 frequent tokens and 2 clusters; 30 tokens of width 4 and 50 of width 2.
        (schema.AdaptiveHead(cutoffs=(20, 50), div_value=2.0), 22 * 8 + 4 * 38 + 2 * 58),
        # 10 classes of 10 tokens, of which a position sees one.
        (schema.HierarchicalHead(), (10 + 10) * 8),
        # ceil(log2 100) = 7 steps, padded by 8.
        (schema.HierarchicalHead(tree="huffman"), 15 * 8),
        # 7 classes and 9 frequent tokens at the first level, and 10 codes (of all slices).
        (
            schema.ClassVQHead(num_classes=7, num_frequent=9, num_codes=10, num_codebooks=4),
            (7 + 9 + 10) * 8,
        ),
        # A third of the vocabulary, rounded up.
        (schema.ClassVQHead(num_codes=10), (34 + 34 + 10) * 8),
    ],
)
def test_baseline_heads(head: schema.HeadConfig, weights: int) -> None:
    assert matrix_parameters(schema.Model(vocab_size=100, embed_dim=8, head=head))[1] == weights


class Device:
    def __init__(self, kind: str):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_of_the_longest_name_that_fits(kind: str, peak: float | None) -> None:
    assert peak_flops(cast(jax.Device, Device(kind))) == peak


def test_peak_of_a_cpu_is_unknown() -> None:
    assert peak_flops(jax.devices("cpu")[0]) is None
