"""The machinery that the stages share: records, text measures, models, chat rendering, LoRA, the sampler."""

import os

# OpenMP's threads spin while they wait for each other, unless this is set before torch loads. On two cores with one
# other busy process a decoding step then took 1,500 ms instead of 140; with no other it makes no difference.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
