"""The machinery that the stages share: records, text measures, models, chat rendering, LoRA, the sampler."""
