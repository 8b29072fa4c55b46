"""Fine-tune one role on the extended answers: pairs -> masked, packed rows -> (Q)LoRA -> an adapter in PEFT's format.

Algorithm (Self-Lengthen, arXiv 2410.23933; constants of its released trainer):
  1. Pairs. Generator: instruction -> extended answer. Extender: the extend-prompt over (instruction, draft) -> extended
     answer, the draft with ~20 % of its lines removed: a sparser outline, so that the Extender learns to ADD.
  2. Each pair is rendered with the model's chat template; the prompt is masked, the answer ends in EOS.
  3. LoRA on every linear layer of the decoder, rank 8, alpha 16; AdamW, learning rate 1e-4, cosine with 10 % warm-up,
     4 epochs, one pair a step. A step's loss is the mean over its target tokens.

Reads    extended.jsonl (prompt, initial, response), several files; `query` takes the place of `prompt` where a record
         has one (constrained.jsonl); any JSONL with prompt and response will do for the Generator.
Writes   OUTPUT/  adapter_model.safetensors  adapter_config.json  meta.json  train_log.jsonl  loss.png
         rejected.jsonl (pairs left out, with `reason`)  checkpoint/ (while it runs)

Departures from the release:
  1. A pair longer than --max-length is left out and counted; the release cuts it and loses its EOS.
  2. Samples of a step share a row without padding and without seeing each other; the loss is weighted by tokens.
  3. Line removal never merges paragraphs and never leaves runs of blank lines; it is drawn per record, not per epoch.
  4. The logits are never held (kernels/linear_cross_entropy.py).

Example (SmolLM2-135M on a CPU: ~3 GB of memory for rows of 1,000 tokens):
  python train.py --role generator --model smollm2 --input runs/demo/iter_1/extended.jsonl --output adapter
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import lengthen  # noqa: F401  before torch: it sets how OpenMP's threads wait

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy
from lengthen import cli, lean, lora
from lengthen.chat import Chat, fill, template_hashes
from lengthen.checkpoint import TrainingFolder
from lengthen.jobs import read_sidecar
from lengthen.model import load_model
from lengthen.packed import Abilities, Recompute, examine, pack
from lengthen.records import LowYield, UserError, draw_seed, fingerprint, read_jsonl, replace_file, to_line
from lengthen.text import count_words, detect_language, remove_lines

MAX_LENGTH = {"generator": 16384, "extender": 32768}  # tokens of prompt + answer; the release cuts both at 16,384
WARM_UP = 0.1  # share of the steps
CLIP = 1.0  # largest gradient norm
SKIPS_ALLOWED = 2  # steps in a row without a finite loss; one more stops the run
CPU_ACTIVATION_GB = 3.0  # kept for the backward pass before layers are recomputed: SmolLM2 then stays below 6 GB in all


# ---------------------------------------------------------------------------------------------------------
# Pairs


@dataclass(frozen=True)
class Pair:
    """One training sample. Only tokens behind the prompt are targets, the EOS among them."""

    ids: list[int]  # prompt, then answer, then EOS
    num_prompt: int


def to_messages(record: dict, role: str, keep_lines: float, seed: int) -> list[dict]:
    """What the model is shown: as generate.py and extend.py will ask it."""
    prompt = record.get("query") or record["prompt"]
    if role == "extender":
        draft = record["initial"]
        if keep_lines < 1:
            # Seeded by the record alone: every epoch sees the same outline, and so does a resumed run.
            draft = remove_lines(draft, keep_lines, draw_seed(seed, record.get("id") or prompt, 0, "lines"))
        prompt = fill("extend", record["language"], instruction=prompt, draft=draft)
    return [{"role": "user", "content": prompt}]


def make_pairs(records: list[dict], chat: Chat, args: argparse.Namespace, most: int) -> tuple[list[Pair], list[dict]]:
    """(pairs, records left out with `reason`). A pair longer than `most` tokens is left out, never cut."""
    pairs, left_out = [], []
    for record in records:
        if record.get("finish", "eos") not in ("eos", ""):
            left_out.append({**record, "reason": "unfinished"})  # a text cut by a limit would teach to stop anywhere
            continue
        prompt = chat.encode(to_messages(record, args.role, args.keep_lines, args.seed))
        answer = chat.encode_answer(record["response"])
        if len(prompt) + len(answer) > most:
            left_out.append({**record, "reason": "too-long", "tokens": len(prompt) + len(answer)})
        else:
            pairs.append(Pair(prompt + answer, len(prompt)))
    return pairs, left_out


def left_out_notes(records: list[dict], left_out: list[dict], most: int) -> list[str]:
    """Lines to say. The longest pairs are what the method is for, so losing them is a warning."""
    if not left_out:
        return []
    lost = sum(count_words(r["response"]) for r in left_out)
    total = sum(count_words(r["response"]) for r in records)
    note = f"left out {len(left_out)} of {len(records)} pairs (rejected.jsonl), {lost:,} of {total:,} words"
    lengths = sorted(len(r["response"]) for r in records)
    longest_tenth = lengths[-max(1, len(lengths) // 10)]
    too_long = [r for r in left_out if r["reason"] == "too-long"]
    if len(left_out) > 0.05 * len(records) or any(len(r["response"]) >= longest_tenth for r in too_long):
        note = f"warning: {note}; the longest pair has {max([r['tokens'] for r in too_long], default=0)} tokens"
        note += f", --max-length is {most}: a larger one keeps them, where the model's context allows"
    return [note]


# ---------------------------------------------------------------------------------------------------------
# Steps: which pairs, in which order, in which rows


def step_pairs(step: int, num_pairs: int, per_step: int, seed: int) -> list[int]:
    """Indices of the pairs of a step (from 0). Each epoch is its own permutation; its last step may be smaller.

    A pure function of the step: the data cursor of a checkpoint is its step number.
    """
    per_epoch = math.ceil(num_pairs / per_step)
    epoch, position = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(draw_seed(seed, "order", epoch))
    order = torch.randperm(num_pairs, generator=generator).tolist()
    return order[position * per_step : (position + 1) * per_step]


def split_rows(pairs: list[Pair], per_row: int, most_tokens: int) -> list[list[Pair]]:
    """The pairs of one step as rows of at most `per_row` pairs and `most_tokens` tokens (a longer pair goes alone)."""
    rows: list[list[Pair]] = []
    for pair in pairs:
        room = rows and len(rows[-1]) < per_row
        if room and sum(len(p.ids) for p in rows[-1]) + len(pair.ids) <= most_tokens:
            rows[-1].append(pair)
        else:
            rows.append([pair])
    return rows


def targets_of(pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """(position in the packed row of each hidden state that predicts a target, target ids): int64 [num_targets] each.

    By position, never by id: where PAD is EOS (SmolLM2), a mask by id would take away the EOS to be learned.
    """
    index, ids, start = [], [], 0
    for pair in pairs:
        index += range(start + pair.num_prompt - 1, start + len(pair.ids) - 1)
        ids += pair.ids[pair.num_prompt :]
        start += len(pair.ids)
    return torch.tensor(index), torch.tensor(ids)


def steps_for(target_tokens: int, pairs: list[Pair], per_step: int, seed: int) -> int:
    """How many steps it takes to train on so many target tokens, one at the least; the last epoch may be cut short."""
    step = 0
    while step == 0 or target_tokens > 0:
        batch = [pairs[i] for i in step_pairs(step, len(pairs), per_step, seed)]
        target_tokens -= sum(len(p.ids) - p.num_prompt for p in batch)
        step += 1
    return step


def target_tokens_of(folder: str) -> int:
    """The target tokens that a finished training went through."""
    meta = read_sidecar(folder) if Path(folder).is_dir() else {}
    if meta.get("status") != "done" or "target_tokens" not in meta.get("summary", {}):
        raise UserError(f"--budget-of {folder} is no finished training", "train.py … --output FOLDER writes one")
    return meta["summary"]["target_tokens"]


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up over the first tenth, then a cosine to zero; step counts from 0."""
    warm_up = math.ceil(WARM_UP * total)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


# ---------------------------------------------------------------------------------------------------------
# The step


def row_loss(model, abilities: Abilities, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihoods (nats) of the targets of one row; how many were the likeliest token."""
    index, targets = (x.to(model.device) for x in targets_of(pairs))
    row = pack([p.ids for p in pairs], model.device)
    inputs = row.keywords() if abilities.packs else {"input_ids": row.input_ids}
    if abilities.head is None:
        logits = model(**inputs, use_cache=False).logits[0, index]
        return F.cross_entropy(logits.float(), targets, reduction="sum"), (logits.argmax(-1) == targets).sum()
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state[0]
    loss, stats = linear_cross_entropy(
        hidden.index_select(0, index),
        targets=targets,
        reduction="sum",
        valid_rows=torch.arange(len(targets), device=targets.device),  # known: no host read to find them
        return_stats=True,
        **abilities.head._asdict(),
    )
    return loss, stats.top1.sum()


def train_step(model, abilities, recompute, optimizer, pairs: list[Pair], per_row: int) -> tuple[float, float, float]:
    """One optimizer step over the pairs -> (mean loss per target token, gradient norm before clipping, accuracy).

    Rows accumulate; each counts by its tokens, so the gradient is that of all pairs in one batch. A loss or a norm that
    is not finite leaves weights and optimizer alone. Accuracy: share of the targets that were the likeliest token.
    """
    num_targets = sum(len(p.ids) - p.num_prompt for p in pairs)
    total, hits = 0.0, 0
    for row in split_rows(pairs, per_row if abilities.packs else 1, recompute.free_tokens):
        recompute.set(sum(len(p.ids) for p in row))
        loss, likeliest = row_loss(model, abilities, row)
        loss = loss / num_targets
        loss.backward()
        total, hits = total + loss.item(), hits + likeliest.item()
    parameters = lora.lora_parameters(model)
    norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP).item()
    if math.isfinite(total) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return total, norm, hits / num_targets


# ---------------------------------------------------------------------------------------------------------
# State of a run


def training_state(model, optimizer) -> dict[str, Tensor]:
    """Weights and moments by name: all that a step changes. The order and the random draws follow from the step."""
    tensors = {}
    for i, parameter in enumerate(lora.lora_parameters(model)):
        tensors[f"{i}.weight"] = parameter
        for name, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{i}.{name}"] = value
    return tensors


def restore_state(model, optimizer, tensors: dict[str, Tensor]) -> None:
    for i, parameter in enumerate(lora.lora_parameters(model)):
        parameter.data.copy_(tensors[f"{i}.weight"])
        if f"{i}.step" in tensors:  # not yet there where every step so far was skipped
            moments = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[parameter] = {name: tensors[f"{i}.{name}"].to(parameter.device) for name in moments}


def plot_loss(entries: list[dict], path: Path, title: str) -> None:
    """The loss of each step and its running mean, as a small PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [e["step"] for e in entries if not e["skipped"]]
    losses = [e["loss"] for e in entries if not e["skipped"]]
    window = len(losses) // 20
    if window < 5:  # few steps: an epoch, in which every pair counts once
        window = max(1, sum(e["epoch"] == 0 for e in entries))
    smooth = [statistics.fmean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
    figure, axis = plt.subplots(figsize=(6, 3.5), dpi=110)
    axis.plot(steps, losses, color="#9ecae1", linewidth=1, label="step")
    axis.plot(steps, smooth, color="#08519c", linewidth=1.8, label=f"mean of {window}")
    axis.set(xlabel="step", ylabel="loss, nats per target token", title=title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, "train.py")
    parser.add_argument("--role", choices=("generator", "extender"), required=True, help="which pairs are made")
    cli.add_io_flags(parser, several_inputs=True)
    cli.add_model_flags(parser)

    group = parser.add_argument_group("pairs")
    add, count, number = group.add_argument, cli.at_least(1), cli.at_least(0, float)
    limits = "16384 generator, 32768 extender, or the context where that is less"
    add("--max-length", type=cli.at_least(0), default=0, help=f"longest pair in tokens; 0 = {limits}")
    add("--keep-lines", type=cli.between(0.01, 1), default=0.8, help="share of a draft's lines the Extender sees")
    add("--no-line-removal", action="store_true", help="control: show the Extender whole drafts")

    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=count, default=8, help="rank of each layer's update")
    add("--alpha", type=cli.at_least(0.001, float), default=16, help="the update is scaled by alpha / rank")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(rank) instead")
    add("--dropout", type=cli.between(0, 0.99), default=0.0, help="share of a layer's inputs that LoRA does not see")
    add("--targets", nargs="+", default=["all-linear"], help="layers by name (q_proj v_proj), or all-linear")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=count, default=4, help="passes over the pairs")
    add(
        "--budget-of",
        default="",
        metavar="ADAPTER",
        help="control: as many target tokens as that training, not --epochs",
    )
    add("--learning-rate", type=number, default=1e-4, help="its peak, behind the warm-up")
    add("--batch-size", type=count, default=1, help="pairs packed into one row; memory may split it, the result stays")
    add("--accumulate", type=count, default=1, help="rows a step, weighted by their tokens")

    add = parser.add_argument_group("runtime").add_argument
    add("--save-every", type=count, default=20, help="steps between checkpoints")
    budget = "0 = 3 on a CPU, 80 %% of what is free on a GPU"
    add("--activation-gb", type=number, default=0.0, help=f"GB of activations before layers are recomputed; {budget}")
    add("--merge-to", default="", help="also write the merged model into this folder")
    args = parser.parse_args(argv)
    args.keep_lines = 1.0 if args.no_line_removal else args.keep_lines
    args.targets = "all-linear" if args.targets == ["all-linear"] else sorted(args.targets)
    return args


SETTINGS = (  # what changes the result
    *("role", "language", "seed", "quantize", "max_length", "keep_lines"),
    *("rank", "alpha", "rslora", "dropout", "targets"),
    *("epochs", "learning_rate", "batch_size", "accumulate"),
)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"model": fingerprint(args.model), "adapter": fingerprint(args.adapter)}
    if args.budget_of:
        settings["target_tokens"] = target_tokens_of(args.budget_of)
    settings["templates"] = template_hashes("extend") if args.role == "extender" else {}
    io = {"inputs": args.input, "overwrite": args.overwrite, "allow_partial": args.allow_partial}
    with TrainingFolder(args.output, settings=settings, **io) as folder:
        if folder.complete:
            cli.say(f"{args.output} is done: nothing to train")
        else:
            train(args, folder)
        summary = dict(folder.meta["summary"])
        if args.merge_to:
            summary["merged"] = write_merged(args)
    cli.emit(summary)


def train(args: argparse.Namespace, folder: TrainingFolder) -> None:
    # 1) records -> model -> pairs
    records = read_records(args)
    loaded = load_model(
        args.model,
        device=args.device,
        dtype=args.dtype,
        quantize=args.quantize,
        trust_remote_code=args.trust_remote_code,
        train=True,
    )
    model = loaded.model
    most = min(args.max_length or MAX_LENGTH[args.role], loaded.context)
    pairs, left_out = make_pairs(records, loaded.chat, args, most)
    replace_file(folder.folder / "rejected.jsonl", b"".join(map(to_line, left_out)))
    for line in [*loaded.notes, *left_out_notes(records, left_out, most)]:
        cli.say(line)
    if len(pairs) < max(1, args.min_yield):
        raise LowYield(
            f"{len(pairs)} of {len(records)} records can be trained on, --min-yield asks for {max(1, args.min_yield)}",
            f"--max-length is {most} tokens; see {folder.folder / 'rejected.jsonl'}",
        )

    # 2) LoRA: fresh, or the adapter of the iteration before
    base_hash = lora.base_hash(model)
    if args.adapter:
        parameters = lora.attach_adapter(model, args.adapter, trainable=True)
        check_continued(args, model)
    else:
        parameters = lora.attach(model, args.rank, args.alpha, args.dropout, args.targets, args.rslora, args.seed)
    abilities = examine(model)
    model.train()
    budget = 1e9 * args.activation_gb or (
        CPU_ACTIVATION_GB * 1e9 if model.device.type == "cpu" else 0.8 * torch.cuda.mem_get_info()[0]
    )
    lent = lean.apply(model)
    abilities.notes += lent.notes()
    recompute = Recompute(model, abilities.token_bytes, budget, lent)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0, fused=True)

    # 3) go on from the last checkpoint, if there is one
    per_step = args.batch_size * args.accumulate
    per_epoch = math.ceil(len(pairs) / per_step)
    total = args.epochs * per_epoch
    if args.budget_of:
        total = steps_for(folder.settings["target_tokens"], pairs, per_step, args.seed)
    tensors, state, said = folder.load_checkpoint()
    for line in said:
        cli.say(f"{line}: going on from the one before, or from the start")
    done, skips = state.get("step", 0), state.get("skips_in_a_row", 0)
    if tensors:
        restore_state(model, optimizer, tensors)
        cli.say(f"resuming behind step {done} of {total}")
    entries = folder.open_log(done)
    for line in abilities.notes:
        cli.say(line)
    cli.say(
        f"{args.role}: {len(pairs)} pairs, {sum(len(p.ids) for p in pairs):,} tokens, {total} steps; "
        f"rank {args.rank}, alpha {args.alpha:g}: {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters; "
        f"{recompute.token_bytes / 1e6:.2f} MB of activations a token, recomputed in rows beyond "
        f"{recompute.free_tokens:,} tokens"
    )
    folder.save_meta(
        "running",
        role=args.role,
        base=loaded.name,
        base_hash=base_hash,
        quantize=loaded.quantize,
        info={
            "device": str(model.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "packed": abilities.packs,
        },
        pairs=len(pairs),
        left_out=len(left_out),
        steps=total,
    )

    # 4) the loop
    for step in range(done, total):
        started = time.monotonic()
        batch = [pairs[i] for i in step_pairs(step, len(pairs), per_step, args.seed)]
        rate = learning_rate(step, total, args.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(draw_seed(args.seed, "dropout", step))  # a resumed run draws what an unbroken one does
        loss, norm, accuracy = train_step(model, abilities, recompute, optimizer, batch, args.batch_size)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        skips = skips + 1 if skipped else 0
        tokens, seconds = sum(len(p.ids) for p in batch), time.monotonic() - started
        entry = {
            "step": step + 1,
            "epoch": step // per_epoch,
            "loss": -1.0 if skipped else loss,
            "accuracy": -1.0 if skipped else round(accuracy, 4),  # share of the targets that were the likeliest token
            "lr": rate,
            "grad_norm": -1.0 if skipped else norm,
            "tokens": tokens,
            "target_tokens": sum(len(p.ids) - p.num_prompt for p in batch),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "skipped": skipped,
        }
        folder.log(entry)
        entries.append(entry)
        left = statistics.fmean(e["seconds"] for e in entries[-20:]) * (total - step - 1)
        cli.say(
            f"step {step + 1}/{total} | loss {loss:.4f} | accuracy {accuracy:.1%} | lr {rate:.2e} | "
            f"grad norm {norm:.3f} | {tokens / seconds:,.0f} tok/s | {left:.0f} s left"
            + (" | skipped: not finite" if skipped else "")
        )
        if skips > SKIPS_ALLOWED:
            raise UserError(
                f"the loss was not finite in {skips} steps in a row (last: step {step + 1})",
                "a lower --learning-rate, or --dtype float32; the last checkpoint is kept",
            )
        if (step + 1) % args.save_every == 0 and step + 1 < total:
            folder.save_checkpoint(training_state(model, optimizer), {"step": step + 1, "skips_in_a_row": skips})

    # 5) the adapter, and what to show of it
    lora.save_adapter(model, folder.folder, loaded.name)
    plot_loss(entries, folder.folder / "loss.png", f"{args.role}, {Path(args.output).parent.name}")
    losses = [e["loss"] for e in entries if not e["skipped"]]
    tenth = max(1, len(losses) // 10)
    summary = {
        "stage": "train",
        "role": args.role,
        "output": str(args.output),
        "pairs": len(pairs),
        "left_out": len(left_out),
        "steps": total,
        "skipped_steps": sum(e["skipped"] for e in entries),
        "first_loss": round(statistics.fmean(losses[:tenth]), 4) if losses else -1.0,
        "last_loss": round(statistics.fmean(losses[-tenth:]), 4) if losses else -1.0,
        "tokens": sum(e["tokens"] for e in entries),
        "target_tokens": sum(e["target_tokens"] for e in entries),
        "tokens_per_second": round(sum(e["tokens"] for e in entries) / sum(e["seconds"] for e in entries), 1),
        "seconds": round(sum(e["seconds"] for e in entries), 1),
    }
    folder.save_meta("done", summary=summary)
    folder.drop_checkpoints()


def read_records(args: argparse.Namespace) -> list[dict]:
    """The records of all input files, in the wanted language; `language` is detected where a user's file has none."""
    needs = ("prompt", "response", "initial") if args.role == "extender" else ("prompt", "response")
    records = [record for path in args.input for record in read_jsonl(path, needs)]
    for record in records:
        record["language"] = record.get("language") or detect_language(record["prompt"]) or "en"
    wanted = [r for r in records if args.language in ("both", r["language"])]
    if not wanted:
        raise LowYield(f"none of the {len(records)} records is in the language {args.language!r}", "--language both")
    return wanted


def check_continued(args: argparse.Namespace, model) -> None:
    """An adapter is continued at its own rank, scale and layers: other flags would be silently ignored."""
    layers = lora.lora_layers(model)
    one = next(iter(layers.values()))
    for name in ("rank", "alpha"):
        theirs, ours = getattr(one, name), getattr(args, name)
        if theirs != ours:
            raise UserError(f"the adapter {args.adapter} has {name} {theirs:g}, not {ours:g}", f"--{name} {theirs:g}")
    if one.rslora != args.rslora:
        hint = "leave --rslora out" if args.rslora else "--rslora"
        raise UserError(f"the adapter {args.adapter} has rslora {one.rslora}, not {args.rslora}", hint)
    if set(layers) != set(lora.select_targets(model, args.targets)):
        raise UserError(
            f"the adapter {args.adapter} adapts other layers than --targets {args.targets}",
            "--targets " + " ".join(sorted({n.rpartition(".")[2] for n in layers})),
        )
    for layer in layers.values():
        layer.dropout = args.dropout


def write_merged(args: argparse.Namespace) -> str:
    """The adapter merged into the unquantised base model, read afresh: never into rounded 4-bit weights."""
    cli.say(f"merging into {args.merge_to}")
    merged = load_model(
        args.model,
        adapter=args.output,
        device="cpu",
        dtype=args.dtype,
        quantize="none",
        trust_remote_code=args.trust_remote_code,
    )
    lora.merge_to(merged.model, merged.tokenizer, args.merge_to)
    return str(args.merge_to)


if __name__ == "__main__":
    cli.run(main)
