"""For a vLLM server: a repetition penalty that counts the output and a given part of the prompt only.

vLLM's own counts the whole prompt; extend.py's counts what the model itself has written. A request asks for it by
`vllm_xargs: {"penalty": 1.1, "penalty_from": 512}`: prompt ids from that index on count, and all of the output. Loaded
by vLLM, in its own environment, and by nothing of ours:

    PYTHONPATH=. VLLM_USE_V2_MODEL_RUNNER=0 vllm serve MODEL \\
        --logits-processors lengthen.sampling.penalty_scope:PenaltyScope ...
"""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality


class PenaltyScope(LogitsProcessor):
    """One row of the batch: [penalty, the output (vLLM appends to it), ids of it that are in `counted`]."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.rows: dict[int, list[Any]] = {}
        rows = vllm_config.scheduler_config.max_num_seqs
        self.counted = torch.zeros(rows, vllm_config.model_config.get_vocab_size(), dtype=torch.bool, device=device)
        self.penalties = torch.ones(rows, 1, device=device)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        extra = sampling_params.extra_args or {}
        if not extra.get("penalty", 1.0) > 0 or extra.get("penalty_from", 0) < 0:
            raise ValueError("penalty must be above 0, and penalty_from an index of the prompt")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._clear(index)
        for index, params, prompt, output in batch_update.added:
            self._clear(index)
            extra = params.extra_args or {}
            if extra.get("penalty", 1.0) != 1.0:
                self.rows[index] = [extra["penalty"], output, 0]
                self.penalties[index] = extra["penalty"]
                self._count(index, (prompt or [])[int(extra.get("penalty_from", 0)) :])
        for a, b, direction in batch_update.moved:
            if a not in self.rows and b not in self.rows:
                continue
            row_a, row_b = self.rows.pop(a, None), self.rows.pop(b, None)
            for index, row in ((b, row_a), (a, row_b)):
                if row and (index == b or direction == MoveDirectionality.SWAP):
                    self.rows[index] = row
            for table in (self.counted, self.penalties):
                table[[a, b]] = table[[b, a]]
            if direction != MoveDirectionality.SWAP:
                self._clear(a)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [rows, V], as in Hugging Face's RepetitionPenaltyLogitsProcessor."""
        if not self.rows:
            return logits
        for index, row in self.rows.items():
            new = [token for token in row[1][row[2] :] if token >= 0]  # -1: a place held for a token still on its way
            row[2] += len(new)
            self._count(index, new)
        size, vocabulary = logits.shape
        counted, penalties = self.counted[:size, :vocabulary], self.penalties[:size]
        return torch.where(counted, torch.where(logits > 0, logits / penalties, logits * penalties), logits)

    def _count(self, index: int, ids: list[int]) -> None:
        if ids:
            self.counted[index, torch.tensor(ids, device=self.counted.device)] = True

    def _clear(self, index: int) -> None:
        self.rows.pop(index, None)
        self.counted[index] = False
        self.penalties[index] = 1.0
