"""LoRA training of SmolLM2-135M on a CPU: tokens per second of train.py's step and of transformers + PEFT.

    python bench/training_cpu.py                 # 1,024-token samples, 10 steps of each in turn: minutes on 2 cores

Both train a rank-8 adapter on all linear layers, fp32, one sample a step, its first eighth the prompt, which is no
target, AdamW. transformers computes its own loss from its own logits with its default attention. Steps alternate, so
that a busy machine slows both; the figure is the ratio of the median times, with the quartiles of the ratios of
neighbours. The losses of the first step are printed: they must agree (the adapters start at zero).
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lengthen  # noqa: F401  before torch: it sets how OpenMP's threads wait

# isort: split
import peft
import torch

import train
from lengthen import lean, lora
from lengthen.model import load_model
from lengthen.packed import Recompute, examine


def samples(tokens: int, count: int, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (count, tokens), generator=generator).tolist()


def our_step(args: argparse.Namespace) -> Callable[[list[int]], float]:
    model = load_model(args.model, train=True, device="cpu").model
    parameters = lora.attach(model, 8, 16)
    abilities = examine(model)
    lent = lean.apply(model) if args.checkpoint != "own" else None
    recompute = Recompute(model, abilities.token_bytes, 1e12 if args.checkpoint in ("none", "own") else 1.0, lent)
    print("lean layers: " + (f"{len(lent.layers)} {lent.why}" if lent else "not used"), file=sys.stderr)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    model.train()

    def step(ids: list[int]) -> float:
        return train.train_step(model, abilities, recompute, optimizer, [train.Pair(ids, len(ids) // 8)], 1)[0]

    return step


def peft_step(args: argparse.Namespace) -> Callable[[list[int]], float]:
    model = load_model(args.model, train=True, device="cpu").model
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(model, settings).train()
    if args.checkpoint == "attention":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def step(ids: list[int]) -> float:
        row = torch.tensor([ids])
        labels = row.clone()
        labels[0, : len(ids) // 8] = -100
        loss = model(input_ids=row, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as train.py takes it")
    parser.add_argument("--tokens", type=int, default=1024, help="of a sample")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each, behind one that is not")
    levels = ("none", "attention", "own")
    parser.add_argument("--checkpoint", choices=levels, default="none", help="our layers; own = the model's code")
    args = parser.parse_args(argv)

    steps = {"ours": our_step(args), "transformers + PEFT": peft_step(args)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for i, ids in enumerate(samples(args.tokens, args.steps + 1, 40_000)):
        for name, step in steps.items():
            started = time.perf_counter()
            losses[name].append(step(ids))
            if i:
                times[name].append(time.perf_counter() - started)
    for name, seconds in times.items():
        rate = args.tokens / statistics.median(seconds)
        print(f"{name:22}{rate:8.1f} tok/s   first loss {losses[name][0]:.5f}", file=sys.stderr)
    ours, theirs = times.values()
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    result = {
        "machine": f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "tokens": args.tokens,
        "steps": args.steps,
        "checkpoint": args.checkpoint,
        "tokens_per_second": {name: args.tokens / statistics.median(seconds) for name, seconds in times.items()},
        "first_losses": {name: values[0] for name, values in losses.items()},
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "ratios_of_neighbours": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }
    print(f"ours is {result['ratio']:.2f} times as fast", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
