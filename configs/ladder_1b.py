"""Ladder, 1B: C4, 20 tokens per parameter (25 billion), grouped-query attention, FSDP.

Trunk 973M parameters, input embedding 268M, codebook 0.1M, a bias and a scale per
token 0.27M (a full output layer: 268M). For 8 devices or more; with little memory, split
the batch: --config.train.grad_accumulation=4.
"""

from vqcx_jax.config import schema


def get_config() -> schema.Config:
    """Everything that is not named here has the schema's default."""
    return schema.Config(
        model=schema.Model(
            embed_dim=2048,
            num_layers=16,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            mlp_dim=8192,
            attention=schema.PopeAttention(),
            head=schema.ClassVQHead(),
            dtype="bfloat16",
            remat="full",
        ),
        data=schema.Data(
            dataset=schema.TFDS(name="c4/en"),
            tokenizer=schema.BPETokenizer(vocab_size=131_072, train_documents=500_000),
            seq_len=2048,
            batch_size=512,
        ),
        optimizer=schema.Optimizer(learning_rate=5e-4, schedule="wsd", warmup_steps=1000),
        train=schema.Training(
            steps=24_000,
            eval_every=1000,
            checkpoint_every=1000,
            final_eval_batches=200,
        ),
        mesh=schema.Mesh(data=1, fsdp=-1),
    )
