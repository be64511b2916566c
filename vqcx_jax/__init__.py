"""VQ-Logits output layers and complex multi-head attention for language models.

- `ops`: the mathematics, as pure functions over arrays
- `nn`: thin Flax NNX modules on them
- `config`: frozen dataclasses that define a run
- `data`: corpora, tokenizers, packed batches
- `maps`: which codes of a VQ head every token has
- `training`: the loop, its state and its checkpoints
- `evaluation`: perplexity and generation from a checkpoint
- `sharding`: logical axes to mesh axes
"""

__version__ = "0.1.0.dev0"
