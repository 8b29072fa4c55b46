"""Fine-tune one role on the extended answers: pairs -> masked, packed rows -> (Q)LoRA -> an adapter in PEFT's format.

Algorithm (Self-Lengthen, arXiv 2410.23933; constants of its released trainer):
  1. Pairs. Generator: instruction -> extended answer. Extender: the extend-prompt over (instruction, draft) -> extended
     answer, the draft with ~20 % of its lines removed: a sparser outline, so that the Extender learns to ADD.
  2. Each pair is rendered with the model's chat template; the prompt is masked, the answer ends in EOS.
  3. LoRA on every linear layer of the decoder, rank 8, alpha 16; AdamW, learning rate 1e-4, cosine with 10 % warm-up,
     4 epochs, one pair per step. A step's loss is the mean over its target tokens.

Reads    extended.jsonl (prompt, initial, response), several files; `query` takes the place of `prompt` where a record
         has one (constrained.jsonl); any JSONL with prompt and response will do for the Generator.
Writes   OUTPUT/  adapter_model.safetensors  adapter_config.json  meta.json  train_log.jsonl  loss.png  README.md
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
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lengthen import cli
from lengthen.errors import out_of_memory
from lengthen.jobs import read_sidecar
from lengthen.models.chat import Chat, fill, template_hashes
from lengthen.records import LowYield, UserError, draw_seed, fingerprint, replace_file
from lengthen.text.thoughts import strip_thoughts
from lengthen.text.words import remove_lines
from lengthen.training import parallel, steplog
from lengthen.training.folder import TrainingFolder, target_tokens_of
from lengthen.training.pairs import Pair, PairFile, encode_pairs, records_of
from lengthen.training.parallel import Processes
from lengthen.training.settings import GROUPS, PairFlags, Training
from lengthen.training.steplog import Step

# torch and what imports it come with the functions that need them: --help, a mistake in the input and a finished
# training do not wait seconds for it.
if TYPE_CHECKING:
    from torch import Tensor

    from lengthen.training.learner import Learner
    from lengthen.training.packed import Abilities

WARM_UP = 0.1  # share of the steps
CLIP = 1.0  # largest gradient norm
SKIPS_ALLOWED = 2  # steps in a row that are skipped; one more stops the run
# A spike is a loss above three times the median of the last 32 that were not skipped, and one nat above it (where a
# model knows its pairs by heart, their losses differ by more than three times); from the 17th step on.
SPIKE, SPIKE_NATS, SPIKE_WINDOW, SPIKE_FROM = 3.0, 1.0, 32, 16
LAST_WORD = 5.0  # seconds that the other processes wait before they end, for the first to say why


# ---------------------------------------------------------------------------------------------------------
# Pairs: what the model is shown, and what it should have written


def to_messages(record: dict, role: str, keep_lines: float, seed: int) -> list[dict[str, str]]:
    """What the model is shown: as generate.py and extend.py will ask it."""
    # constrained.jsonl has a length demand in `query`: that is what the answer was written for.
    prompt = record.get("query") or record["prompt"]
    if role == "extender":
        # The draft, not the answer of the round before: one step from a first draft to the text that grew out of it.
        draft = record["initial"]
        if keep_lines < 1:
            # Seeded by the record alone: every epoch sees the same outline, and so does a resumed run.
            draft = remove_lines(draft, keep_lines, draw_seed(seed, record.get("id") or prompt, 0, "lines"))
        prompt = fill("extend", record["language"], instruction=prompt, draft=draft)
    return [{"role": "user", "content": prompt}]


def make_pairs(
    records: list[dict], chat: Chat, flags: PairFlags, seed: int, max_length: int
) -> tuple[list[Pair], list[dict]]:
    """(pairs, records left out with `reason`). A pair longer than max_length tokens is left out, never cut."""
    for record in records:  # a user's own may hold thoughts: they are no part of an answer
        strip_thoughts(record)
    # A text that was cut at its limit would teach to stop anywhere. A user's own records have no `finish`: all count.
    left_out = [{**r, "reason": "unfinished"} for r in records if r.get("finish", "eos") not in ("eos", "")]
    whole = [r for r in records if r.get("finish", "eos") in ("eos", "")]
    # One call of the tokenizer for all: a fast one then uses every core.
    prompts = chat.encode_many([to_messages(r, flags.role, flags.kept_lines, seed) for r in whole])
    answers = chat.encode_answers([r["response"] for r in whole])  # each ends in its EOS
    pairs = []
    for record, prompt, answer in zip(whole, prompts, answers, strict=True):
        if len(prompt) + len(answer) > max_length:
            left_out.append({**record, "reason": "too-long", "tokens": len(prompt) + len(answer)})
        else:
            pairs.append(Pair(prompt + answer, len(prompt)))
    return pairs, left_out


def pairs_of(training: Training, folder: TrainingFolder, chat: Chat, max_length: int, processes: Processes) -> PairFile:
    """The pairs of this run: those in the folder where they are of the same files, templates and tokenizer."""
    # All that the ids depend on: with another key they are encoded again.
    names = ("inputs", "templates", "role", "language", "keep_lines", "seed")
    key = {name: folder.settings[name] for name in names} | {"tokenizer": chat.hash, "max_length": max_length}
    needs = ("prompt", "response", "initial") if training.pairs.role == "extender" else ("prompt", "response")
    return encode_pairs(
        folder.folder,
        key,
        records=lambda: records_of(training.inputs.input, needs, training.out.language),
        make=lambda block: make_pairs(block, chat, training.pairs, training.out.seed, max_length),
        processes=processes,
    )


# ---------------------------------------------------------------------------------------------------------
# Steps and rows: which pairs, in which order, packed how


def step_pairs(step: int, num_pairs: int, per_step: int, seed: int) -> list[int]:
    """Indices of the pairs of a step (from 0). Each epoch is its own permutation; its last step may be smaller.

    A pure function of the step: the data cursor of a checkpoint is its step number.
    """
    import torch

    per_epoch = math.ceil(num_pairs / per_step)  # steps
    epoch, position = divmod(step, per_epoch)
    # Drawn on the CPU from the seed and the epoch alone: the same order on every device and after every resume.
    generator = torch.Generator().manual_seed(draw_seed(seed, "order", epoch))
    order = torch.randperm(num_pairs, generator=generator).tolist()
    return order[position * per_step : (position + 1) * per_step]


def steps_for(target_tokens: int, num_targets: Sequence[int], per_step: int, seed: int) -> int:
    """How many steps it takes to train on so many target tokens, at least one; the last epoch may be cut short.

    num_targets: of each pair.
    """
    # Step by step, because the pairs differ in length and each epoch has its own order. The prompt's tokens do not
    # count: nothing is learned from them, and the two roles have prompts of very different lengths.
    step = 0
    while step == 0 or target_tokens > 0:
        target_tokens -= sum(int(num_targets[i]) for i in step_pairs(step, len(num_targets), per_step, seed))
        step += 1
    return step


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up over the first tenth, then a cosine to zero; step counts from 0."""
    # step + 1: transformers' schedule gives the first step a rate of 0, here it already learns.
    warm_up = math.ceil(WARM_UP * total)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    # It would be 0 one step after the last; max(): a single step has no way down.
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


def split_rows(pairs: list[Pair], per_row: int, most_tokens: int) -> list[list[Pair]]:
    """The pairs of a step as rows of at most `per_row` pairs and `most_tokens` tokens (a longer pair goes alone)."""
    # In the order of the step, not sorted by length: rows are for memory, and the sum of their gradients is the same.
    # A row costs attention's square only within each pair, so a longer row is as cheap per token as a shorter one.
    rows: list[list[Pair]] = []
    for pair in pairs:
        room = rows and len(rows[-1]) < per_row
        if room and sum(len(p.ids) for p in rows[-1]) + len(pair.ids) <= most_tokens:
            rows[-1].append(pair)
        else:
            rows.append([pair])
    return rows


def targets_of(pairs: list[Pair]) -> tuple[list[int], list[int]]:
    """(position in the packed row of each hidden state that predicts a target, the target's id).

    By position, never by id: where PAD is EOS (SmolLM2), a mask by id would take away the EOS to be learned.
    """
    index: list[int] = []
    ids: list[int] = []
    start = 0  # of the pair in its row
    for pair in pairs:
        # The hidden state at position i predicts token i + 1: the last of the prompt predicts the answer's first.
        index += range(start + pair.num_prompt - 1, start + len(pair.ids) - 1)
        ids += pair.ids[pair.num_prompt :]
        start += len(pair.ids)
    return index, ids


# ---------------------------------------------------------------------------------------------------------
# The step: loss of a row, gradients of all rows, one update


def row_loss(model: Any, abilities: "Abilities", pairs: list[Pair]) -> "tuple[Tensor, Tensor]":
    """Sum of the negative log-likelihoods (nats) of the targets of one row; how many were the likeliest token."""
    import torch
    import torch.nn.functional as F

    from kernels.linear_cross_entropy import linear_cross_entropy
    from lengthen.models.upload import upload
    from lengthen.training.packed import pack

    # The sum, not the mean: train_step divides by the targets of all rows, so that a token counts the same in each.
    index, targets = upload(targets_of(pairs), torch.long, model.device)  # int64 [num_targets]
    row = pack([p.ids for p in pairs], model.device)
    # A model whose attention cannot be packed exactly gets rows of one sample, and its own attention.
    inputs = row.keywords() if abilities.packs else {"input_ids": row.input_ids}
    if abilities.head is None:  # this model does something to its logits that the loss kernel does not know
        # [num_targets, V] in memory, in fp32: what the kernel below is for.
        logits = model(**inputs, use_cache=False).logits[0, index]
        return F.cross_entropy(logits.float(), targets, reduction="sum"), (logits.argmax(-1) == targets).sum()
    # Only hidden states that predict a target go through the head: no logits of the prompt, none held of the answer.
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state[0]  # [T, H]
    loss, stats = linear_cross_entropy(
        hidden.index_select(0, index), targets=targets, return_stats=True, **abilities.head._asdict()
    )
    return loss, stats.top1.sum()


def train_step(
    learner: "Learner",
    pairs: list[Pair],
    per_row: int,
    *,
    ceiling: float = math.inf,
    seed: int | None = None,
    processes: Processes = Processes(),  # noqa: B008  frozen, so one for all calls
) -> Step:
    """One optimizer step over the pairs, `per_row` of them packed into a row.

    Rows accumulate; each counts by its tokens, so the gradient is that of all pairs in one batch, in one process or in
    several. A loss or a norm that is not finite, or a loss above `ceiling`, leaves weights and optimizer alone. Where
    memory runs out, the step is forgotten and done again with more recomputation, or ends in a UserError.
    """
    import torch

    model, memory = learner.model, learner.memory
    # Tokens of each pair, prompt and answer: what memory and time go by. The loss goes by the targets alone.
    lengths = [len(p.ids) for p in pairs]
    num_targets = sum(p.num_targets for p in pairs)  # of the whole step: what the loss is divided by
    mine = [pairs[i] for i in processes.share(lengths)]
    while True:
        if seed is not None:
            torch.manual_seed(seed)  # a step that is done again draws what it drew before
        sums = accumulate(learner, mine, per_row, num_targets)
        # If memory runs out in one process, all do the step again: their gradients are summed below.
        if not processes.any(sums is None, model.device):
            break
        # Rows that did fit have left gradients, and the allocator holds blocks of the size that did not.
        learner.optimizer.zero_grad()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        packs = learner.abilities.packs
        memory.ran_out(max(*lengths, min(sum(lengths), memory.free_tokens)) if packs else max(lengths))

    # Every row was divided by the targets of the whole step: the sum over rows and processes is the gradient of the
    # mean over all targets, however they were split.
    processes.sum_gradients(learner.parameters)
    loss, hits, flops = processes.sum(sums or [], model.device)
    norm = torch.nn.utils.clip_grad_norm_(learner.parameters, CLIP).item()
    # Skipped steps keep AdamW's moments as they are: one bad batch in bf16 would poison them for hundreds of steps.
    finite = math.isfinite(loss) and math.isfinite(norm)
    skipped = "not finite" if not finite else f"a spike, above {ceiling:.2f}" if loss > ceiling else ""
    if not skipped:
        learner.optimizer.step()
    learner.optimizer.zero_grad()
    return Step(loss, norm, hits / num_targets, skipped, flops)


def accumulate(learner: "Learner", pairs: list[Pair], per_row: int, num_targets: int) -> list[float] | None:
    """Add the gradients of these pairs -> [loss, hits, FLOPs], their share of the step's; None = out of memory."""
    memory, abilities = learner.memory, learner.abilities
    flops, rows = 0.0, []
    try:
        # A row is no longer than what fits without recomputation: filling it further would cost more than it saves.
        for row in split_rows(pairs, per_row if abilities.packs else 1, memory.free_tokens):
            lengths = [len(p.ids) for p in row]
            how = memory.set(sum(lengths))  # store as much as fits for this row, recompute the rest
            loss, likeliest = row_loss(learner.model, abilities, row)
            loss = loss / num_targets
            loss.backward()  # adds to A's and B's .grad; the base is frozen
            rows.append((loss.detach(), likeliest))
            flops += memory.budget.flops(lengths, [p.num_targets for p in row], how)
        # Read only now: the host prepares a row while the device still computes the one before.
        total, hits = (float(sum(pair[i].item() for pair in rows)) for i in (0, 1))
    except RuntimeError as error:  # torch.OutOfMemoryError is one, too
        if not out_of_memory(error):
            raise
        return None
    return [total, hits, flops]


def spike_ceiling(losses: list[float]) -> float:
    """The loss above which a step is skipped, from the losses of the steps before it that were not."""
    if len(losses) < SPIKE_FROM:
        return math.inf
    # The median, so that one high loss among the last 32 does not raise the ceiling for the next.
    middle = statistics.median(losses[-SPIKE_WINDOW:])
    return max(SPIKE * middle, middle + SPIKE_NATS)


# ---------------------------------------------------------------------------------------------------------
# The run: pairs -> model -> steps -> adapter


def train(training: Training, folder: TrainingFolder, processes: Processes) -> None:
    """From the records to a finished adapter; killed and started again, it goes on from its last checkpoint."""
    from lengthen.models import hub, lora
    from lengthen.models.loading import context_length, load_chat, load_config
    from lengthen.training.learner import check_exports, prepare

    check_exports(training)
    # 1) pairs: all are encoded before the model is loaded, so that a mistake in the input costs no gigabytes
    flags, optimizer = training.model, training.optimizer
    chat = load_chat(flags.model, flags.trust_remote_code)
    context, _ = context_length(load_config(flags.model, flags.trust_remote_code), chat.tokenizer)
    max_length = training.pairs.longest(context)
    pairs = pairs_of(training, folder, chat, max_length, processes)
    for line in pairs.facts["notes"]:
        cli.say(line)
    # Fewer than asked for is exit code 3, not an adapter that nobody wants.
    least = max(1, training.out.min_yield)
    if len(pairs) < least:
        raise LowYield(
            f"{len(pairs)} of {pairs.facts['records']} records can be trained on, --min-yield asks for {least}",
            f"--max-length is {max_length} tokens; see {folder.folder / 'rejected.jsonl'}",
        )
    # The last step of an epoch may have fewer pairs; a control (--budget-of) ends in the middle of one.
    total = optimizer.epochs * math.ceil(len(pairs) / optimizer.pairs_per_step)
    if optimizer.budget_of:
        budget = folder.settings["target_tokens"]
        total = steps_for(budget, pairs.num_targets.tolist(), optimizer.pairs_per_step, training.out.seed)

    # 2) model, LoRA, memory plan, optimizer
    learner, facts = prepare(training, int(pairs.lengths.max()), processes)
    cli.say(f"{training.pairs.role}: {len(pairs)} pairs, {pairs.lengths.sum():,} tokens, {total} steps")
    facts |= {"role": training.pairs.role, "pairs": len(pairs), "left_out": pairs.facts["left_out"], "steps": total}
    folder.save_meta("running", **facts)

    # 3) the steps
    entries = run_steps(learner, pairs, total, training, folder, processes)

    # 4) the adapter, and what to show of it. Until now there is none in the folder: whoever finds one may use it.
    if not processes.first:
        return
    lora.save_adapter(learner.model, folder.folder, facts["base"])
    title = f"{training.pairs.role}, {folder.folder.parent.name}"
    cli.save_figure(folder.folder / "loss.png", lambda: steplog.plot_loss(entries, title))
    summary = {"stage": "train", "role": training.pairs.role, "output": training.out.output, "pairs": len(pairs)}
    summary |= {"left_out": pairs.facts["left_out"], "steps": total, **steplog.totals(entries)}
    folder.save_meta("done", summary=summary)
    replace_file(folder.folder / "README.md", hub.model_card(folder.folder))
    folder.drop_checkpoints()


def run_steps(
    learner: "Learner",
    pairs: PairFile,
    total: int,
    training: Training,
    folder: TrainingFolder,
    processes: Processes,
) -> list[dict[str, Any]]:
    """Steps up to `total`, from where the folder's checkpoint is -> the log of all of them."""
    from lengthen.models.threads import Neighbours
    from lengthen.training.checkpoint import resume, state_bytes
    from lengthen.training.plan import peak_flops

    flags, seed, device = training.optimizer, training.out.seed, learner.model.device
    per_epoch = math.ceil(len(pairs) / flags.pairs_per_step)
    # From here on everything depends on the step number alone: order, rate, dropout, ceiling.
    done, skips, entries = resume(learner, total, folder, processes)
    speed, source = peak_flops(device, learner.model.get_input_embeddings().weight.dtype)
    cli.say(f"peak: {speed / 1e12:,.3g} TFLOP/s ({source})" if speed else f"peak of {source}: unknown")
    # Read back from the log, so that a resumed run calls the same losses spikes as an unbroken one.
    losses = [e["loss"] for e in entries if not e["skipped"]]
    progress = cli.progress("step", total) if cli.console.is_terminal else nullcontext()
    with progress as bar, closing(Neighbours()) as neighbours:
        for step in range(done, total):
            neighbours.look()
            started = time.monotonic()
            batch = [pairs[i] for i in step_pairs(step, len(pairs), flags.pairs_per_step, seed)]
            rate = learning_rate(step, total, flags.learning_rate)
            for group in learner.optimizer.param_groups:
                group["lr"] = rate
            # Dropout's seed is the step's (and the process's): a resumed run draws what an unbroken one does.
            draw = (seed, "dropout", step, *((processes.rank,) if processes.rank else ()))
            ceiling = spike_ceiling(losses)
            result = train_step(
                learner, batch, flags.batch_size, ceiling=ceiling, seed=draw_seed(*draw), processes=processes
            )
            skips = skips + 1 if result.skipped else 0
            if not result.skipped:
                losses.append(result.loss)
            seconds = time.monotonic() - started  # .item() of the loss has waited for the GPU
            entry = steplog.log_entry(step, per_epoch, result, rate, batch, seconds, speed * processes.count, device)
            folder.log(entry)
            entries.append(entry)
            left = statistics.fmean(e["seconds"] for e in entries[-20:]) * (total - step - 1)
            cli.say(f"step {step + 1}/{total} | {steplog.step_line(result, entry)} | {left:.0f} s left")
            if bar:
                bar.update(step + 1)
            # One skipped step is a bad batch; three in a row are a training that has gone wrong.
            if skips > SKIPS_ALLOWED:
                raise UserError(
                    f"{skips} steps in a row were skipped: {result.skipped} (last: step {step + 1})",
                    "a lower --learning-rate with --overwrite, or --dtype float32 with --overwrite",
                )
            # Not after the last step: the adapter follows at once. A kill costs at most save_every steps.
            if (step + 1) % training.runtime.save_every == 0 and step + 1 < total:
                state = {"step": step + 1, "skips_in_a_row": skips}
                folder.save_checkpoint(state_bytes(learner.model, learner.optimizer), state)
    return entries


# ---------------------------------------------------------------------------------------------------------
# The command line


def make_parser() -> argparse.ArgumentParser:
    """The flags of lengthen/training/settings.py."""
    parser = cli.make_parser(__doc__, "train.py")
    for title, kind in GROUPS.items():
        cli.add_flags(parser, title, kind)
    return parser


def settings_of(args: argparse.Namespace) -> Training:
    """The parsed command line as typed settings: below this line nobody sees a Namespace."""
    return Training(*(cli.take(args, kind) for kind in GROUPS.values()))


def main(argv: list[str] | None = None) -> None:
    processes = parallel.start()
    cli.console.quiet = not processes.first  # what concerns all processes is said by the first
    try:
        run(settings_of(make_parser().parse_args(argv)), processes)
    except UserError:
        if not processes.first:  # torchrun ends all when one ends: the first must have said why
            time.sleep(LAST_WORD)
        raise


def run(training: Training, processes: Processes) -> None:
    """Open the folder, train what is not finished, print the summary."""
    if training.runtime.plan:
        if processes.first:
            from lengthen.training.plan import show_plan

            show_plan(training)
        return
    # What a run that goes on must have in common with this one. Models and adapters count by their contents.
    out, model = training.out, training.model
    settings = {**training.recorded(), "model": fingerprint(model.model), "adapter": fingerprint(model.adapter)}
    # By its number of tokens, not by its path: the other training may move, its budget is what matters here.
    if training.optimizer.budget_of:
        settings["target_tokens"] = target_tokens_of(training.optimizer.budget_of)
    # Only the Extender's prompt has a template; an edited one makes other pairs.
    settings["templates"] = template_hashes(out.language, "extend") if training.pairs.role == "extender" else {}
    before = {} if out.overwrite or not Path(out.output).is_dir() else read_sidecar(out.output)
    processes.check(training.optimizer.batch_size, training.optimizer.accumulate, before, out.output)
    with TrainingFolder(
        out.output,
        inputs=training.inputs.input,
        settings=settings,
        overwrite=out.overwrite,
        allow_partial=out.allow_partial,
        processes=processes,
    ) as folder:
        # A finished training prints its summary again, without torch; --merge-to may still be new.
        if folder.complete:
            cli.say(f"{out.output} is done: nothing to train")
        else:
            folder.save_meta("running", processes=processes.count)
            train(training, folder, processes)
        if processes.first:
            summary = dict(folder.meta["summary"])
            if training.runtime.merge_to:
                from lengthen.training.learner import write_exports

                summary |= write_exports(training)
            cli.emit(summary)
        processes.wait()  # else torchrun would end the first in the middle of a merge
    processes.stop()


if __name__ == "__main__":
    cli.run(main)
