"""Ladder, 8B: C4, 20 tokens per parameter (151 billion), grouped-query attention, FSDP.

Trunk 6.98B parameters, input embedding 537M, codebook 0.3M, a bias and a scale per
token 0.27M (a full output layer: 537M). For 64 devices or more; with fewer, split the batch:
--config.train.grad_accumulation=8.
"""

from vqcx_jax.config import schema


def get_config() -> schema.Config:
    """Everything that is not named here has the schema's default."""
    return schema.Config(
        model=schema.Model(
            embed_dim=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=14_336,
            attention=schema.PopeAttention(),
            head=schema.ClassVQHead(),
            dtype="bfloat16",
            remat="full",
        ),
        data=schema.Data(
            dataset=schema.TFDS(name="c4/en"),
            tokenizer=schema.BPETokenizer(vocab_size=131_072, train_documents=500_000),
            seq_len=4096,
            batch_size=1024,
        ),
        optimizer=schema.Optimizer(learning_rate=3e-4, schedule="wsd", warmup_steps=2000),
        train=schema.Training(
            steps=36_000,
            eval_every=1000,
            checkpoint_every=1000,
            final_eval_batches=200,
        ),
        mesh=schema.Mesh(data=1, fsdp=-1),
    )
