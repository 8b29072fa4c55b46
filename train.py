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
         rejected.jsonl (pairs left out, with `reason`)  checkpoint/ and pairs.bin (while it runs)

Departures from the release:
  1. A pair longer than --max-length is left out and counted; the release cuts it and loses its EOS.
  2. Samples of a step share a row without padding and without seeing each other; the loss is weighted by tokens.
  3. Line removal never merges paragraphs and never leaves runs of blank lines; it is drawn per record, not per epoch.
  4. The logits are never held (kernels/linear_cross_entropy.py).

Memory: training/budget.py knows what a row of any length takes and picks the least recomputation that fits; --plan
prints that before anything is loaded. Several GPUs: torchrun --nproc-per-node N train.py … gives the same losses.

Example (SmolLM2-135M on a CPU: ~3 GB of memory for rows of 1,000 tokens):
  python train.py --role generator --model smollm2 --input runs/demo/iter_1/extended.jsonl --output adapter
  python train.py … --plan --vram 24        # what it would take on a card of 24 GB
"""

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import lengthen  # noqa: F401  before torch: it sets how OpenMP's threads wait

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy
from lengthen import cli
from lengthen.jobs import read_sidecar
from lengthen.models import lora
from lengthen.models.chat import Chat, fill, template_hashes
from lengthen.models.loading import context_length, embeddings_to_host, load_config, load_model, load_tokenizer
from lengthen.records import LowYield, UserError, draw_seed, each_record, fingerprint, no_room, to_line
from lengthen.text.words import count_words, detect_language, remove_lines
from lengthen.training import budget as plan
from lengthen.training import parallel, steplog
from lengthen.training.checkpoint import TrainingFolder, restore_state, training_state
from lengthen.training.packed import Abilities, examine, pack
from lengthen.training.pairs import NAME as PAIRS
from lengthen.training.pairs import Pair, PairFile, ahead, read_pairs, write_pairs
from lengthen.training.parallel import Processes
from lengthen.training.policy import Memory, memory_of, show_plan

MAX_LENGTH = {"generator": 16384, "extender": 32768}  # tokens of prompt + answer; the release cuts both at 16,384
WARM_UP = 0.1  # share of the steps
CLIP = 1.0  # largest gradient norm
SKIPS_ALLOWED = 2  # steps in a row that are skipped; one more stops the run
# A spike is a loss above three times the median of the last 32 that were not skipped, and one nat above it (where a
# model knows its pairs by heart, their losses differ by more than three times); from the 17th step on.
SPIKE, SPIKE_NATS, SPIKE_WINDOW, SPIKE_FROM = 3.0, 1.0, 32, 16
PATIENCE = 5.0  # seconds
BLOCK = 64  # records that are encoded at a time


# ---------------------------------------------------------------------------------------------------------
# Pairs


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
    left_out = [{**r, "reason": "unfinished"} for r in records if r.get("finish", "eos") not in ("eos", "")]
    whole = [r for r in records if r.get("finish", "eos") in ("eos", "")]  # a cut text would teach to stop anywhere
    prompts = chat.encode_many([to_messages(r, args.role, args.keep_lines, args.seed) for r in whole])
    answers = chat.encode_answers([r["response"] for r in whole])
    pairs = []
    for record, prompt, answer in zip(whole, prompts, answers, strict=True):
        if len(prompt) + len(answer) > most:
            left_out.append({**record, "reason": "too-long", "tokens": len(prompt) + len(answer)})
        else:
            pairs.append(Pair(prompt + answer, len(prompt)))
    return pairs, left_out


def left_out_notes(records: Iterable[dict], left_out: Iterable[dict], most: int) -> list[str]:
    """Lines to say. The longest pairs are what the method is for, so losing them is a warning."""

    def words(record: dict) -> int:
        known = record.get("response_words", -1)
        return known if known >= 0 else count_words(record["response"])

    lost = [(len(r["response"]), words(r), r["reason"], r.get("tokens", 0)) for r in left_out]
    if not lost:
        return []
    sizes = [(len(r["response"]), words(r)) for r in records]
    note = f"left out {len(lost)} of {len(sizes)} pairs (rejected.jsonl)"
    note += f", {sum(w for _, w, *_ in lost):,} of {sum(w for _, w in sizes):,} words"
    longest_tenth = sorted(length for length, _ in sizes)[-max(1, len(sizes) // 10)]
    too_long = [(length, tokens) for length, _, reason, tokens in lost if reason == "too-long"]
    if len(lost) > 0.05 * len(sizes) or any(length >= longest_tenth for length, _ in too_long):
        note = f"warning: {note}; the longest pair has {max((t for _, t in too_long), default=0)} tokens"
        note += f", --max-length is {most}: a larger one keeps them, where the model's context allows"
    return [note]


def encoded_blocks(
    args: argparse.Namespace, chat: Chat, most: int, rejected: Path, facts: dict
) -> Iterator[list[Pair]]:
    """The pairs, some at a time, so that memory stays flat; those left out go to `rejected`, the counts to `facts`."""
    temporary = rejected.with_name(f".{rejected.name}.tmp")  # left by a kill, it goes with the next start
    facts.update(records=0, left_out=0)
    try:
        with open(temporary, "wb") as handle:
            records = read_records(args)
            while block := list(itertools.islice(records, BLOCK)):
                pairs, left_out = make_pairs(block, chat, args, most)
                handle.writelines(map(to_line, left_out))
                facts["records"] += len(block)
                facts["left_out"] += len(left_out)
                yield pairs
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, rejected)
    except OSError as error:
        raise no_room(rejected, error) from error
    listed = each_record(rejected, ("prompt", "response")) if facts["left_out"] else ()
    facts["notes"] = left_out_notes(read_records(args), listed, most)


def pairs_of(args: argparse.Namespace, folder: TrainingFolder, chat: Chat, most: int, processes: Processes) -> PairFile:
    """The pairs of this run: those in the folder where they are of the same files, templates and tokenizer."""
    path, rejected = folder.folder / PAIRS, folder.folder / "rejected.jsonl"
    names = ("inputs", "templates", "role", "language", "keep_lines", "seed")
    key = {name: folder.settings[name] for name in names} | {"tokenizer": chat.hash, "max_length": most}
    if processes.first:
        found, why = read_pairs(path, key)
        if not found or not rejected.exists():
            if why:
                cli.say(f"{why}: encoding the pairs again")
            started, facts = time.monotonic(), {}
            write_pairs(path, ahead(encoded_blocks(args, chat, most, rejected, facts)), key, facts)
            found, _ = read_pairs(path, key)
            seconds = time.monotonic() - started
            cli.say(f"encoded {len(found)} pairs, {found.lengths.sum():,} tokens, in {seconds:.1f} s: kept in {path}")
    processes.wait()
    return found if processes.first else read_pairs(path, key)[0]


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


def steps_for(target_tokens: int, num_targets: Sequence[int], per_step: int, seed: int) -> int:
    """How many steps it takes to train on so many target tokens, one at the least; the last epoch may be cut short.

    num_targets: of each pair.
    """
    step = 0
    while step == 0 or target_tokens > 0:
        target_tokens -= sum(int(num_targets[i]) for i in step_pairs(step, len(num_targets), per_step, seed))
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


class Step(NamedTuple):
    """What a step did."""

    loss: float  # mean over the target tokens, nats
    norm: float  # of the gradient, before clipping
    accuracy: float  # share of the targets that were the likeliest token
    skipped: str  # why weights and optimizer were left alone, "" = they were not
    flops: float  # with all that was recomputed; 0 = not known


def train_step(
    model,
    abilities: Abilities,
    memory: Memory,
    optimizer,
    pairs: list[Pair],
    per_row: int,
    *,
    ceiling: float = math.inf,
    seed: int | None = None,
    auto_shrink: bool = False,
    processes: Processes = Processes(),  # noqa: B008  frozen, so one for all calls
) -> Step:
    """One optimizer step over the pairs. memory: what each row keeps.

    Rows accumulate; each counts by its tokens, so the gradient is that of all pairs in one batch, in one process or in
    several. A loss or a norm that is not finite, or a loss above `ceiling`, leaves weights and optimizer alone. Where
    memory runs out, the step is forgotten and done again with leaner settings (auto_shrink), or ends in a UserError.
    """
    lengths = [len(p.ids) for p in pairs]
    num_targets = sum(lengths) - sum(p.num_prompt for p in pairs)
    mine = [pairs[i] for i in processes.share(lengths)]
    parameters = lora.lora_parameters(model)
    while True:
        if seed is not None:
            torch.manual_seed(seed)  # a step that is done again draws what it drew before
        totals = accumulate(model, abilities, memory, mine, per_row, num_targets)
        if not processes.any(totals is None, model.device):
            break
        optimizer.zero_grad()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        longest = max(*lengths, min(sum(lengths), memory.free_tokens)) if abilities.packs else max(lengths)
        shrink_or_stop(memory, longest, auto_shrink)

    processes.sum_gradients(parameters)
    loss, hits, flops = processes.sum(totals, model.device)
    norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    skipped = "not finite" if not finite else f"a spike, above {ceiling:.2f}" if loss > ceiling else ""
    if not skipped:
        optimizer.step()
    optimizer.zero_grad()
    return Step(loss, norm, hits / num_targets, skipped, flops)


def accumulate(model, abilities, memory, pairs: list[Pair], per_row: int, num_targets: int) -> list[float] | None:
    """Add the gradients of these pairs -> [loss, hits, FLOPs], their share of the step's; None = out of memory."""
    total, hits, flops = 0.0, 0, 0.0
    try:
        for row in split_rows(pairs, per_row if abilities.packs else 1, memory.free_tokens):
            settings = memory.set(sum(len(p.ids) for p in row))
            loss, likeliest = row_loss(model, abilities, row)
            loss = loss / num_targets
            loss.backward()
            total, hits = total + loss.item(), hits + likeliest.item()
            learned = [len(p.ids) - p.num_prompt for p in row]
            flops += memory.budget.flops([len(p.ids) for p in row], learned, settings)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise  # the CPU's allocator raises a plain RuntimeError
        return None
    return [total, hits, flops]


def shrink_or_stop(memory: Memory, tokens: int, auto_shrink: bool) -> None:
    """Memory ran out in a step whose longest row has so many tokens."""
    settings = memory.choice(tokens)
    if auto_shrink and memory.shrink(tokens):
        cli.say(f"out of memory in a row of {tokens:,} tokens with {settings}: again with {memory.choice(tokens)}")
        return
    name, size, helps = plan.largest_component(memory.budget, settings, tokens)
    raise UserError(
        f"out of memory in a row of {tokens:,} tokens with {settings}; the largest part: {name}, {size / 1e9:.2f} GB",
        (helps if auto_shrink else f"--auto-shrink tries leaner settings; or {helps}")
        + "; the last checkpoint is kept",
    )


def adamw(parameters: list[torch.nn.Parameter], rate: float, bits: int) -> torch.optim.Optimizer:
    """AdamW without weight decay; bits 8: both moments in blocks of 256 with a scale (arXiv 2110.02861)."""
    if bits == 32:
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("--adam-bits 8 needs bitsandbytes", "pip install bitsandbytes, or --adam-bits 32") from None
    return AdamW8bit(parameters, lr=rate, weight_decay=0.0)


def spike_ceiling(losses: list[float]) -> float:
    """The loss above which a step is skipped, from the losses of the steps before it that were not."""
    if len(losses) < SPIKE_FROM:
        return math.inf
    middle = statistics.median(losses[-SPIKE_WINDOW:])
    return max(SPIKE * middle, middle + SPIKE_NATS)


# ---------------------------------------------------------------------------------------------------------


CHECKPOINT_HELP = "recompute nothing, all but attention, or whole layers; auto = the least that fits, row by row"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, "train.py")
    parser.add_argument("--role", choices=("generator", "extender"), required=True, help="which pairs are made")
    cli.add_flags(parser, "input", cli.InputFlags)
    cli.add_flags(parser, "output", cli.OutputFlags)
    cli.add_flags(parser, "model", cli.ModelFlags)

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
    add("--adam-bits", type=int, choices=(32, 8), default=32, help="of AdamW's moments; 8 needs bitsandbytes")
    add("--batch-size", type=count, default=1, help="pairs packed into one row; memory may split it, the result stays")
    add("--accumulate", type=count, default=1, help="rows a step, weighted by their tokens")

    add = parser.add_argument_group("memory").add_argument
    add("--plan", action="store_true", help="print what a step takes and the longest row that fits; loads no weights")
    add("--vram", type=number, default=0.0, help="GB of GPU memory to stay within; 0 = what the card has free")
    add("--checkpoint", choices=("auto", *plan.LEVELS), default="auto", help=CHECKPOINT_HELP)
    add("--offload", action="store_true", help="keep what waits for the backward pass in host memory")
    add("--host-gb", type=number, default=0.0, help="GB of host memory that --offload may take; 0 = what it needs")
    add("--embeddings", choices=("device", "host"), default="device", help="where the input embedding lies")
    add("--tile-rows", type=cli.at_least(0), default=0, help="tokens that an MLP takes at a time; 0 = by the plan")
    add("--auto-shrink", action="store_true", help="out of memory: do the step again with leaner settings")
    budget = "0 = 3 on a CPU, all that --vram leaves on a GPU"
    add("--activation-gb", type=number, default=0.0, help=f"GB of activations before layers are recomputed; {budget}")

    add = parser.add_argument_group("runtime").add_argument
    add("--save-every", type=count, default=20, help="steps between checkpoints")
    add("--tensorboard", action="store_true", help="also write the log for TensorBoard, into OUTPUT/tensorboard")
    add("--merge-to", default="", help="also write the merged model into this folder")
    args = parser.parse_args(argv)
    args.keep_lines = 1.0 if args.no_line_removal else args.keep_lines
    args.targets = "all-linear" if args.targets == ["all-linear"] else sorted(args.targets)
    return args


SETTINGS = (  # what changes the result
    *("role", "language", "seed", "quantize", "max_length", "keep_lines"),
    *("rank", "alpha", "rslora", "dropout", "targets"),
    *("epochs", "learning_rate", "adam_bits", "batch_size", "accumulate"),
)


def main(argv: list[str] | None = None) -> None:
    processes = parallel.start()
    cli.console.quiet = not processes.first  # one voice: what concerns all is said by the first
    try:
        run(parse_args(argv), processes)
    except UserError:
        if not processes.first:  # torchrun ends all when one ends: the first must have said why
            time.sleep(PATIENCE)
        raise


def run(args: argparse.Namespace, processes: Processes) -> None:
    if args.plan:
        if processes.first:
            show_plan(args, MAX_LENGTH[args.role])
        return
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"model": fingerprint(args.model), "adapter": fingerprint(args.adapter)}
    if args.budget_of:
        settings["target_tokens"] = target_tokens_of(args.budget_of)
    settings["templates"] = template_hashes("extend") if args.role == "extender" else {}
    check_processes(args, processes)
    io = {"inputs": args.input, "overwrite": args.overwrite, "allow_partial": args.allow_partial}
    if not processes.first:
        processes.wait()  # until the first has opened the folder
    with TrainingFolder(args.output, settings=settings, writes=processes.first, **io) as folder:
        if processes.first:
            processes.wait()
        if folder.complete:
            cli.say(f"{args.output} is done: nothing to train")
        else:
            folder.save_meta("running", processes=processes.count)
            train(args, folder, processes)
        if processes.first:
            summary = dict(folder.meta["summary"])
            if args.merge_to:
                summary["merged"] = write_merged(args)
            cli.emit(summary)
        processes.wait()
    processes.stop()


def check_processes(args: argparse.Namespace, processes: Processes) -> None:
    """Each process needs a pair of every step, and a run goes on with as many as it began with."""
    per_step = args.batch_size * args.accumulate
    if per_step < processes.count:
        raise UserError(
            f"a step of {per_step} pair{'s' * (per_step > 1)} cannot be shared by {processes.count} processes",
            f"--accumulate {math.ceil(processes.count / args.batch_size)}: a step's pairs are divided among them",
        )
    before = {} if args.overwrite or not Path(args.output).is_dir() else read_sidecar(args.output)
    count = before.get("processes", processes.count)
    if before.get("status") != "done" and count != processes.count:
        raise UserError(
            f"{args.output} was begun by {count} process{'es' * (count > 1)}, this command runs {processes.count}",
            f"torchrun --nproc-per-node {count} train.py …, or --overwrite",
        )


# ---------------------------------------------------------------------------------------------------------
# The run


def train(args: argparse.Namespace, folder: TrainingFolder, processes: Processes) -> None:
    # 1) pairs -> model
    board = steplog.open_tensorboard(folder.folder) if args.tensorboard and processes.first else None
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    context, _ = context_length(load_config(args.model, args.trust_remote_code), tokenizer)
    most = min(args.max_length or MAX_LENGTH[args.role], context)
    pairs = pairs_of(args, folder, Chat(tokenizer), most, processes)
    for line in pairs.facts["notes"]:
        cli.say(line)
    if len(pairs) < max(1, args.min_yield):
        raise LowYield(
            f"{len(pairs)} of {pairs.facts['records']} records can be trained on, --min-yield asks for "
            f"{max(1, args.min_yield)}",
            f"--max-length is {most} tokens; see {folder.folder / 'rejected.jsonl'}",
        )
    loaded = load_model(
        args.model,
        device=processes.device if args.device == "auto" and processes.device else args.device,
        dtype=args.dtype,
        quantize=args.quantize,
        trust_remote_code=args.trust_remote_code,
        train=True,
    )
    model = loaded.model
    for line in loaded.notes:
        cli.say(line)
    if args.embeddings == "host":
        embeddings_to_host(model)

    # 2) LoRA: fresh, or the adapter of the iteration before
    base_hash = lora.base_hash(model)
    if args.adapter:
        parameters = lora.attach_adapter(model, args.adapter, trainable=True)
        check_continued(args, model)
    else:
        parameters = lora.attach(model, args.rank, args.alpha, args.dropout, args.targets, args.rslora, args.seed)
    abilities = examine(model)
    model.train()
    per_step = args.batch_size * args.accumulate
    longest = int(pairs.lengths.max())  # of a row, too: short pairs share one only where that costs nothing
    memory = memory_of(args, model, abilities, longest, processes, nf4=loaded.quantize == "nf4")
    optimizer = adamw(parameters, args.learning_rate, args.adam_bits)

    # 3) go on from the last checkpoint, if there is one
    per_epoch = math.ceil(len(pairs) / per_step)
    total = args.epochs * per_epoch
    if args.budget_of:
        total = steps_for(folder.settings["target_tokens"], pairs.num_targets, per_step, args.seed)
    tensors, state, said = folder.load_checkpoint()
    for line in said:
        cli.say(f"{line}: going on from the one before, or from the start")
    done, skips = state.get("step", 0), state.get("skips_in_a_row", 0)
    if tensors:
        restore_state(model, optimizer, tensors)
        cli.say(f"resuming behind step {done} of {total}")
    entries = folder.open_log(done) if processes.first else []
    processes.wait()  # the first cuts the log to the steps that count, the others read what it left
    entries = entries if processes.first else folder.open_log(done)
    for line in abilities.notes:
        cli.say(line)
    need = memory.budget.card_bytes(memory.choice(longest), longest)
    cli.say(
        f"{args.role}: {len(pairs)} pairs, {pairs.lengths.sum():,} tokens, {total} steps; "
        f"rank {args.rank}, alpha {args.alpha:g}: {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters"
    )
    cli.say(
        f"memory: rows of up to {memory.free_tokens:,} tokens keep all they need; the longest here, {longest:,}, goes "
        f"with {memory.choice(longest)}: {need / 1e9:.2f} of {memory.room / 1e9:.2f} GB by the plan"
    )
    peak_flops, peak_from = plan.peak_flops(model.device)
    cli.say(f"peak: {peak_flops / 1e12:,.3g} TFLOP/s ({peak_from})" if peak_flops else f"peak of {peak_from}: unknown")
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
        left_out=pairs.facts["left_out"],
        steps=total,
    )

    # 4) the loop
    losses = [e["loss"] for e in entries if not e["skipped"]]
    with cli.progress("step", total) if cli.console.is_terminal else nullcontext() as bar:
        for step in range(done, total):
            started = time.monotonic()
            batch = [pairs[i] for i in step_pairs(step, len(pairs), per_step, args.seed)]
            rate = learning_rate(step, total, args.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            draw = (args.seed, "dropout", step, *((processes.rank,) if processes.rank else ()))
            result = train_step(
                *(model, abilities, memory, optimizer, batch, args.batch_size),
                ceiling=spike_ceiling(losses),
                seed=draw_seed(*draw),  # a resumed run draws what an unbroken one does
                auto_shrink=args.auto_shrink,
                processes=processes,
            )
            skips = skips + 1 if result.skipped else 0
            if not result.skipped:
                losses.append(result.loss)
            seconds = time.monotonic() - started
            entry = steplog.log_entry(
                step, per_epoch, result, rate, batch, seconds, peak_flops * processes.count, model.device
            )
            folder.log(entry)
            entries.append(entry)
            if board:
                for name in ("loss", "accuracy", "lr", "grad_norm", "tokens_per_second", "peak_percent", "peak_gb"):
                    board.add_scalar(name, entry[name], step + 1)
            left = statistics.fmean(e["seconds"] for e in entries[-20:]) * (total - step - 1)
            cli.say(f"step {step + 1}/{total} | {steplog.step_line(result, entry)} | {left:.0f} s left")
            if bar:
                bar.update(step + 1)
            if skips > SKIPS_ALLOWED:
                raise UserError(
                    f"{skips} steps in a row were skipped: {result.skipped} (last: step {step + 1})",
                    "a lower --learning-rate, or --dtype float32; the last checkpoint is kept",
                )
            if (step + 1) % args.save_every == 0 and step + 1 < total:
                folder.save_checkpoint(training_state(model, optimizer), {"step": step + 1, "skips_in_a_row": skips})
    if board:
        board.close()

    # 5) the adapter, and what to show of it
    if not processes.first:
        return
    lora.save_adapter(model, folder.folder, loaded.name)
    steplog.plot_loss(entries, folder.folder / "loss.png", f"{args.role}, {Path(args.output).parent.name}")
    tenth = max(1, len(losses) // 10)
    summary = {
        "stage": "train",
        "role": args.role,
        "output": str(args.output),
        "pairs": len(pairs),
        "left_out": pairs.facts["left_out"],
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


def read_records(args: argparse.Namespace) -> Iterator[dict]:
    """The records of all input files, in the wanted language; `language` is detected where a user's file has none."""
    needs = ("prompt", "response", "initial") if args.role == "extender" else ("prompt", "response")
    seen = wanted = 0
    for record in (record for path in args.input for record in each_record(path, needs)):
        record["language"] = record.get("language") or detect_language(record["prompt"]) or "en"
        seen += 1
        if args.language in ("both", record["language"]):
            wanted += 1
            yield record
    if not wanted:
        raise LowYield(f"none of the {seen} records is in the language {args.language!r}", "--language both")


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
