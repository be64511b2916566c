"""Kinds of attention on WikiText-2, words; --data is a directory with its files.

D = 128, three layers, four heads of 32; the output layer has two codebooks and own vectors of the
most frequent tokens, which is the cheapest one with a perplexity near those of full softmaxes.
"""

import dataclasses
from pathlib import Path

from campaign import Campaign
from campaigns import heads
from campaigns.attention import TRUNK, VARIANTS


def campaign(data: Path) -> Campaign:
    head = heads.variants(num_codes=332, dim=128)["own + additive 2"]
    return Campaign(
        config="benchmarks/campaigns/base.py",
        paths={"data.dataset.path": data},
        overrides={**TRUNK, **head.overrides},
        baseline="RoPE",
        maps=heads.maps(num_codes=332),
        variants={
            name: dataclasses.replace(variant, token_map=head.token_map)
            for name, variant in VARIANTS.items()
        },
        more_seeds={"RoPE": 5, "PoPE": 5, "complex, delta = 1": 5, "amplitude": 5},
        report="attention",
        lengths=(256, 512, 1024),
    )
