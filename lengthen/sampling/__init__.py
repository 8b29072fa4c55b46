"""The batched sampler: continuous batching over a paged KV cache."""
