"""The kinds of attention that the campaigns compare."""

from campaign import Variant

VARIANTS = {
    "RoPE": Variant({"model.attention.kind": "rope"}),
    "complex, delta = 1": Variant({"model.attention.kind": "complex"}),
    "smooth": Variant({"model.attention.kind": "smooth"}),
    "harmonic, R = 2": Variant({"model.attention.kind": "harmonic"}),
    "complex, published": Variant(
        {
            "model.attention.kind": "complex",
            "model.attention.delta_init": "published",
            "model.attention.scaled": False,
        }
    ),
    "PoPE": Variant({"model.attention.kind": "pope"}),
    "EulerFormer": Variant({"model.attention.kind": "eulerformer"}),
    "0.75-RoPE": Variant({"model.attention.kind": "rope", "model.attention.rope_fraction": 0.75}),
    "NoPE": Variant({"model.attention.kind": "nope"}),
    "ALiBi": Variant({"model.attention.kind": "alibi"}),
    "amplitude": Variant({"model.attention.kind": "amplitude"}),
    "complex, learned frequencies": Variant(
        {"model.attention.kind": "complex", "model.attention.learned_frequencies": True}
    ),
    "complex, frequencies per head": Variant(
        {"model.attention.kind": "complex", "model.attention.frequencies": "per_head"}
    ),
}

TRUNK = {
    "data.batch_size": 8,
    "model.embed_dim": 128,
    "model.num_layers": 3,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "model.head_dim": 32,
    "model.mlp_dim": 352,
    "train.steps": 600,
    "train.checkpoint_every": 600,
    "optimizer.warmup_steps": 50,
}
