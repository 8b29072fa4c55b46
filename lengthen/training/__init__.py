"""Memory-lean LoRA training on packed rows."""
