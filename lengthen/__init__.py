"""The machinery that the stages share: records, text measures, models, chat rendering, LoRA, the sampler."""

import os
import sys

try:
    import fcntl  # noqa: F401
except ImportError:
    print(
        "error: this needs Linux or macOS, Windows has no fcntl\nhint:  wsl --install, and start it there",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

# How OpenMP's threads wait for each other, read when torch loads: awake for about a millisecond, then asleep. Asleep at
# once, two threads are no faster than one: a decoding step is a few hundred small parallel regions. Awake for longer,
# they are in the way of other processes, and those in theirs (models/threads.py).
if "OMP_WAIT_POLICY" not in os.environ:  # the user's choice comes first
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # libgomp's name for it; other runtimes sleep at once

# Tensors of 2 MB and more in the large pages of Linux, which gives them to who asks. In a virtual machine 300 MB in
# tensors of 5 MB were read at 3 to 5 GB/s in pages of 4 KB and at 17 in large ones, and decoding reads all weights.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
