"""A model and what belongs to it: loading, chat templates, LoRA, FlashAttention, the cards it runs on."""
