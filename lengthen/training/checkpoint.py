"""What is in a checkpoint: LoRA's weights and AdamW's moments. The order of the pairs and the random draws follow from
the step number, which the folder keeps beside them (lengthen/training/folder.py)."""

from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn, optim

from lengthen import cli
from lengthen.models import lora
from lengthen.training.folder import TrainingFolder
from lengthen.training.learner import Learner
from lengthen.training.parallel import Processes


def state_bytes(model: nn.Module, optimizer: optim.Optimizer) -> bytes:
    """All that a step changes, as safetensors: "INDEX.weight" and "INDEX.NAME" for each moment of that parameter."""
    tensors: dict[str, Tensor] = {}
    for i, parameter in enumerate(lora.lora_parameters(model)):
        tensors[f"{i}.weight"] = parameter
        for name, value in optimizer.state.get(parameter, {}).items():
            if not name.startswith("qmap"):  # bitsandbytes' table of what 8 bits stand for: a constant
                tensors[f"{i}.{name}"] = torch.as_tensor(value)
    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def restore_state(model: nn.Module, optimizer: Any, data: bytes) -> None:
    """Load what state_bytes gave. optimizer: torch's AdamW, or bitsandbytes' of 8 bits."""
    tensors = load(data)
    for i, parameter in enumerate(lora.lora_parameters(model)):
        parameter.data.copy_(tensors[f"{i}.weight"])
        if f"{i}.step" not in tensors:  # every step so far was skipped
            continue
        if not isinstance(optimizer, optim.AdamW):  # bitsandbytes' counts its steps as an int
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, i)
        for name in (key.partition(".")[2] for key in tensors if key.startswith(f"{i}.")):
            value = tensors[f"{i}.{name}"]
            if name != "weight":
                is_count = not value.is_floating_point() and not value.dim()
                optimizer.state[parameter][name] = value.item() if is_count else value.to(parameter.device)


def resume(
    learner: Learner, total: int, folder: TrainingFolder, processes: Processes
) -> tuple[int, int, list[dict[str, Any]]]:
    """Load the last checkpoint that is whole -> (steps done, of them skipped at the end, their log)."""
    data, state, notes = folder.load_checkpoint()
    for line in notes:
        cli.say(f"{line}: going on from the one before, or from the start")
    done, skips = state.get("step", 0), state.get("skips_in_a_row", 0)
    if data:
        restore_state(learner.model, learner.optimizer, data)
        cli.say(f"resuming after step {done} of {total}")
    entries = folder.open_log(done) if processes.first else []
    processes.wait()  # the first cuts the log to the steps that count, the others read what it left
    return done, skips, entries if processes.first else folder.open_log(done)
