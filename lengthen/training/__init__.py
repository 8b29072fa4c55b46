"""The machinery of train.py, which tells the algorithm. In the order in which a training meets it:

settings       the flags, typed: one class per concern
parallel       the processes of torchrun
folder         the output: sidecar, log, checkpoints on disk        checkpoint   what is in one, and resuming from it
pairs          records -> token ids, on disk
learner        model + LoRA + optimizer, from what follows
  packed         several samples in one row, none seeing another; what a loaded model allows
  policy         how each row is computed so that it fits
    budget         bytes and FLOPs of a row, as arithmetic          shapes       a model's sizes, read without weights
  lean_layer     a decoder layer with its backward pass by hand     lean_linears, offload   its parts
steplog        a record and a line per step, the curve
plan           --plan: the budget, printed
"""
