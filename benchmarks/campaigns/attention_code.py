"""Kinds of attention on the Python standard library, a BPE of 2,048 tokens; it needs no --data.

D = 128, three layers, four heads of 32; a full output layer that starts from co-occurrence.
"""

from pathlib import Path

from campaign import Campaign
from campaigns.attention import TRUNK, VARIANTS


def campaign(data: Path) -> Campaign:
    return Campaign(
        config="benchmarks/campaigns/base.py",
        overrides={
            **TRUNK,
            "data.dataset.kind": "python_stdlib",
            "data.tokenizer.kind": "bpe",
            "data.tokenizer.vocab_size": 2048,
            "model.head.kind": "full",
            "model.head.token_bias": True,
            "model.head.start": "cooccurrence",
        },
        baseline="RoPE",
        variants=VARIANTS,
        more_seeds={"RoPE": 5, "PoPE": 5, "complex, delta = 1": 5, "amplitude": 5},
        report="attention",
        lengths=(256, 512, 1024),
    )
