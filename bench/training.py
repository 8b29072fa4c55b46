"""A training step: tokens/s and peak memory of train.py and of what else one could use, and the longest row.

    python bench/training.py                      # on a GPU: Qwen2.5-7B rank 16 at 4K and 16K tokens, a few minutes
    python bench/training.py --vram 24 --longest --shapes Qwen2.5-7B Llama-3.1-8B     # capped at 24 GB, and the limit
    python bench/training.py --device cpu         # SmolLM2-135M, samples of 1,024 tokens: ours against PEFT, in turns

On a GPU: shapes as in the names, random weights in NF4 with double quantisation (nothing is downloaded) and key biases
as large as Qwen2.5's, LoRA on every linear layer, one row of T random tokens a step of which 95 % are targets, AdamW.
--vram caps the allocator (torch.cuda.set_per_process_memory_fraction; the context, about 0.5 GB, is outside of the
cap). Per method, each in a process of its own: tokens/s (median of 3 steps after a first one) and peak allocated GB;
of ours also what the plan says of both, and whether the memory-lean layers serve the model. --longest: the longest T
that trains, by bisection to 2 %, which takes many steps. The methods:

    ours                 train_step of train.py, with the settings that its plan chooses
    TRL                  SFTTrainer as its users set it up for long rows: PEFT, bf16 autocast, its chunked loss,
                         checkpoints offloaded to the host, flash-attn where installed, else SDPA
    transformers + PEFT  the same without TRL: the model's own loss, all logits in memory
    Unsloth              needs real files: --unsloth-model FOLDER of that shape; skipped without

On a CPU: fp32, each in a process of its own with its own defaults, one step each in turn, each first every other time;
medians, quartiles, and the median of the turns' ratios: what slows a shared machine for minutes slows both of a turn.
The table goes to stderr, the same data as one JSON line to stdout; --save keeps it (harness.py). --tiny runs the GPU's
way on a CPU, on a toy shape. No GPU has run this yet.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import harness

# isort: split
if "--worker" in sys.argv and "ours" not in sys.argv:
    import torch  # before lengthen, which sets how OpenMP's threads wait: another's process keeps its own defaults

# isort: split
import lengthen  # noqa: F401  before torch

# isort: split
import torch
from models import CONTEXT, random_model
from torch import nn
from transformers import PreTrainedModel

import train
from lengthen.errors import out_of_memory
from lengthen.models import lora
from lengthen.models.loading import load_model
from lengthen.records import UserError
from lengthen.training.learner import Learner, adamw
from lengthen.training.packed import examine
from lengthen.training.pairs import Pair
from lengthen.training.parallel import Processes
from lengthen.training.plan import peak_flops
from lengthen.training.policy import memory_of
from lengthen.training.settings import LoraFlags, MemoryFlags

RANKS = {"Qwen2.5-7B": 16, "Llama-3.1-8B": 32, "SmolLM2-135M": 8, "tiny": 8}  # of LoRA, by the model
METHODS = ("ours", "TRL", "transformers + PEFT", "Unsloth")
LENGTHS = [4096, 16_384]
COLUMNS = ["method", "shape", "tokens", "tokens_per_second"]  # of what a method's process says
COLUMNS += ["of_peak", "peak_gb", "plan_gb", "lean", "longest", "settings"]

Run = Callable[[int, int], tuple[list[float], dict]]  # tokens of a row, steps -> (seconds of each, what is to be said)


# ---- the methods ----------------------------------------------------------------------------------------------------


def ours(model: PreTrainedModel, rank: int, vram_gb: float, longest: int) -> Run:
    parameters = lora.attach(model, rank, 2 * rank)
    abilities = examine(model)
    model.train()
    nf4 = any(type(m).__name__ == "Linear4bit" for m in model.modules())
    flags = MemoryFlags(vram=vram_gb, auto_shrink=True)
    memory = memory_of(LoraFlags(rank=rank), flags, 32, model, abilities, longest, Processes(), nf4=nf4)
    learner = Learner(model, abilities, memory, adamw(parameters, 1e-5, 32))
    peak, vocab, cuda = peak_flops(model.device, model.dtype)[0], model.config.vocab_size, model.device.type == "cuda"

    def run(tokens: int, count: int) -> tuple[list[float], dict]:
        pair = sample(tokens, vocab)
        times = [harness.seconds(lambda: train.train_step(learner, [pair], 1), cuda) for _ in range(count)]
        how = memory.choice(tokens)
        plan, flops = memory.budget.card_bytes(how, tokens), memory.budget.flops([tokens], [pair.num_targets], how)
        facts = {"settings": str(how), "lean": memory.budget.traced is None, "plan_gb": round(plan / 1e9, 2)}
        return times, facts | {"of_peak": round(flops / statistics.median(times) / peak, 3) if peak else -1.0}

    return run


def with_adapter(model: PreTrainedModel, rank: int) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


def with_peft(model: PreTrainedModel, rank: int, checkpointing: bool) -> Run:
    """checkpointing: as transformers' Trainer switches it on; on a GPU, offloaded."""
    vocab, model, settings = model.config.vocab_size, with_adapter(model, rank), "--checkpoint none"
    if checkpointing:
        model.enable_input_require_grads()
        base, offload = model.get_base_model(), model.device.type == "cuda"
        # transformers 5.23 calls it activation checkpointing, 5.17 gradient checkpointing
        prefix = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
        enable = getattr(base, f"{prefix}_checkpointing_enable")
        enable(**{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}}, offload=offload)
        settings = "--checkpoint full" + " --offload" * offload
    return by_steps(model, vocab, settings)


def with_trl(model: PreTrainedModel, rank: int) -> Run:
    """SFTTrainer.train() over rows that are tokenised, clocked from a step's first callback to its last."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    vocab, cuda, model = model.config.vocab_size, model.device.type == "cuda", with_adapter(model, rank)
    words = Tokenizer(WordLevel({"<eos>": 0}, unk_token="<eos>"))  # it wants one, and has nothing to do for it
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    for parameter in model.parameters():  # as it does by itself with a model that was loaded in 4 bits
        parameter.data = parameter.data.bfloat16() if parameter.requires_grad and cuda else parameter.data

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.began, self.times = 0.0, list[float]()

        def on_step_begin(self, *args: object, **more: object) -> None:
            self.began = harness.clock(cuda)

        def on_step_end(self, *args: object, **more: object) -> None:
            self.times.append(harness.clock(cuda) - self.began)

    def run(tokens: int, count: int) -> tuple[list[float], dict]:
        pair, watch = sample(tokens, vocab), Clock()
        labels = [-100] * pair.num_prompt + pair.ids[pair.num_prompt :]
        with tempfile.TemporaryDirectory() as folder:
            settings = SFTConfig(
                folder,
                max_steps=count,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=1,
                learning_rate=1e-5,
                bf16=cuda,
                use_cpu=not cuda,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": False, "offload": cuda},
            )
            table = InMemoryTable.from_pydict({"input_ids": [pair.ids] * count, "labels": [labels] * count})
            data = Dataset(table, fingerprint="rows")  # named, since hashing it fails with some versions of pyarrow
            more = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [watch]}
            SFTTrainer(model, settings, **more).train()
        return watch.times, {"settings": "chunked loss, checkpoints" + " offloaded" * cuda}

    return run


def with_unsloth(folder: str, rank: int, longest: int) -> Run:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=longest, load_in_4bit=True)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=rank, lora_alpha=2 * rank, target_modules=names, use_gradient_checkpointing="unsloth"
    )
    return by_steps(model, model.config.vocab_size, "its own")


def by_steps(model: nn.Module, vocab: int, settings: str) -> Run:
    """Steps by the model's own loss on a row of one sample: a batch of one has no padding."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)
    device, half = parameters[0].device, any(p.dtype == torch.bfloat16 for p in model.parameters())

    def step(pair: Pair) -> None:
        ids = torch.tensor([pair.ids], device=device)
        labels = ids.clone()
        labels[0, : pair.num_prompt] = -100
        # As Trainer's bf16=True: without it PEFT's fp32 adapters would make every product an fp32 one.
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def run(tokens: int, count: int) -> tuple[list[float], dict]:
        pair = sample(tokens, vocab)
        times = [harness.seconds(lambda: step(pair), device.type == "cuda") for _ in range(count)]
        return times, {"settings": settings}

    return run


def method_of(args: argparse.Namespace) -> Run:
    """args.worker, on its model."""
    device, rank = torch.device("cuda" if torch.cuda.is_available() else "cpu"), RANKS[args.shapes[0]]
    if args.worker == "Unsloth":
        return with_unsloth(args.unsloth_model, rank, max(args.tokens))
    model = random_model(args.shapes[0], device, nf4=device.type == "cuda")
    if args.worker == "ours":
        return ours(model, rank, args.vram, max(args.tokens))
    model.set_attn_implementation("flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa")
    return with_trl(model, rank) if args.worker == "TRL" else with_peft(model, rank, checkpointing=True)


# ---- measuring -------------------------------------------------------------------------------------------------------


def sample(tokens: int, vocab: int) -> Pair:
    ids = torch.randint(3, vocab, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()
    return Pair(ids, max(1, tokens // 20))


def fits(run: Run, tokens: int) -> bool:
    """Whether a row of so many tokens trains. Anything but a lack of memory is raised."""
    try:
        run(tokens, 1)
        return True
    except (RuntimeError, UserError) as error:
        if not out_of_memory(error) and not (isinstance(error, UserError) and "out of memory" in error.message):
            raise
    torch.cuda.empty_cache()
    return False


def longest_row(trains: Callable[[int], bool], start: int) -> int:
    """By doubling, then bisection to 2 %, in multiples of 256 tokens; 0 where `start` does not train."""
    low, high = 0, start
    while trains(high) and high < CONTEXT:
        low, high = high, 2 * high
    while low and high - low > max(256, 0.02 * low):
        middle = (low + high) // 2 // 256 * 256
        low, high = (middle, high) if trains(middle) else (low, middle)
    return low


def work(args: argparse.Namespace) -> None:
    """A process of its own: one method on one shape -> one JSON line a measurement."""
    cuda = torch.cuda.is_available()
    if args.vram and cuda:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, 1e9 * args.vram / torch.cuda.get_device_properties(0).total_memory)
        )
    run = method_of(args)
    for tokens in args.tokens:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        row = {"tokens": tokens, "tokens_per_second": -1.0, "peak_gb": -1.0, "settings": "out of memory"}
        if fits(run, tokens):
            times, facts = run(tokens, 3)
            row |= {"tokens_per_second": round(tokens / statistics.median(times), 1), **facts}
            row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else -1.0
        print(json.dumps(row), flush=True)
    if args.longest:
        print(json.dumps({"longest": longest_row(lambda n: fits(run, n), 1024)}), flush=True)


def one_by_one(args: argparse.Namespace, report: Callable[[list[dict]], object]) -> list[dict]:
    """Every method in its own process: what one patches or leaves in memory does not meet the next.

    report: is given all rows after each measurement.
    """
    rows = []
    for shape in args.shapes:
        print(f"\n{shape}, NF4, rank {RANKS[shape]}, {args.vram or 'all'} GB", file=sys.stderr)
        for method in args.methods:
            if why := missing(method, args):
                print(f"{method:20}  not measured: {why}", file=sys.stderr)
                continue
            command = [sys.executable, __file__, "--worker", method, "--shapes", shape, "--vram", str(args.vram)]
            command += ["--tokens", *map(str, args.tokens), "--longest" if args.longest else "--no-longest"]
            command += ["--unsloth-model", args.unsloth_model]
            for row in harness.measured(command, "settings"):
                rows.append({"shape": shape, "method": method, "vram_gb": args.vram, **row})
                print(f"{method:20} {row}", file=sys.stderr, flush=True)
                report(rows)
    return rows


def missing(method: str, args: argparse.Namespace) -> str:
    """Why a method cannot run here, "" = it can."""
    needs = {"ours": [], "TRL": ["peft", "trl", "datasets"], "transformers + PEFT": ["peft"], "Unsloth": ["unsloth"]}
    if lacking := [package for package in needs[method] if not importlib.util.find_spec(package)]:
        return f"pip install {' '.join(lacking)}"
    return "" if method != "Unsloth" or args.unsloth_model else "--unsloth-model FOLDER"


def cpu_method(method: str, shape: str, longest: int) -> Callable[..., dict]:
    """What answers the requests of `in_turns`: a step over one sample of so many tokens."""
    if shape == "SmolLM2-135M":
        model = load_model("smollm2", device="cpu", train=True).model
    else:
        model = random_model(shape, torch.device("cpu"), nf4=False)
    if method == "ours":
        run = ours(model, 8, 0.0, longest)
    else:
        model.set_attn_implementation("sdpa")
        run = with_peft(model, 8, checkpointing=False)
    return lambda tokens: {"seconds": run(tokens, 1)[0][0]}


def in_turns(args: argparse.Namespace) -> tuple[list[list[str]], list[dict]]:
    """Ours and PEFT's in turns: what else the machine does meets both. -> (lines of the table, all seconds)"""
    lines, figures = [], []
    for shape in args.shapes:
        command = [sys.executable, __file__, "--serve", "--shapes", shape, "--tokens", *map(str, args.tokens)]
        names = ("ours", "transformers + PEFT")
        engines = {name: harness.Engine([*command, "--worker", name]) for name in names}
        for tokens in args.tokens:

            def took(name: str, turn: int, engines=engines, tokens=tokens) -> float:
                return engines[name](tokens=tokens)["seconds"]

            turns = harness.in_turns(args.repeats + 1, names, took)
            times = {name: some[1:] for name, some in turns.items()}  # the first is a warm-up
            ratios = harness.ratios(times["transformers + PEFT"], times["ours"])
            for name, some in times.items():
                quartiles = statistics.quantiles(some, n=4) if len(some) > 1 else [some[0]] * 3
                low, middle, high = (tokens / t for t in quartiles[::-1])
                faster = "" if name == "ours" else harness.spread(ratios)
                lines.append([name, shape, f"{tokens:,}", f"{middle:.1f} ({low:.1f} to {high:.1f})", faster])
            figures.append({"shape": shape, "tokens": tokens, "seconds": times})
        for engine in engines.values():
            engine.close()
    return lines, figures


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    p.add_argument("--vram", type=float, default=0.0, help="GB that the allocator may take; 0 = all of the card")
    p.add_argument("--shapes", nargs="+", choices=RANKS, help="default: the 7B; SmolLM2 on a CPU")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="on a GPU")
    p.add_argument("--tokens", nargs="+", type=int, help="lengths; default 4K and 16K, on a CPU 1024")
    p.add_argument("--repeats", type=int, default=10, help="steps of each, on a CPU")
    p.add_argument(
        "--longest", action=argparse.BooleanOptionalAction, default=False, help="find the longest row, on a GPU"
    )
    p.add_argument("--unsloth-model", default="", help="folder with weights of that shape, for Unsloth")
    p.add_argument("--tiny", action="store_true", help="a toy shape, the GPU's way also on a CPU: to see that it runs")
    p.add_argument("--worker", default="", choices=["", *METHODS], help="used by the script itself")
    p.add_argument("--serve", action="store_true", help="used by the script itself")
    harness.add_save(p)
    args = p.parse_args(argv)
    cpu = args.device == "cpu" and not args.tiny
    args.shapes = args.shapes or ["tiny" if args.tiny else "SmolLM2-135M" if cpu else "Qwen2.5-7B"]
    args.tokens = args.tokens or ([48] if args.tiny else [1024] if cpu else LENGTHS)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.serve:
        harness.serve(lambda: cpu_method(args.worker, args.shapes[0], max(args.tokens)))
    elif args.worker:
        work(args)
    elif args.device == "cpu" and not args.tiny:
        lines, figures = in_turns(args)
        columns = ["", "model", "tokens of a sample", "tokens/s (quartiles)", "ours is faster by"]
        harness.finish("training", argv, args.save, [harness.table("steps", columns, lines)], {"runs": figures})
    elif torch.cuda.is_available() or args.tiny:
        columns, where = [key.replace("_", " ").replace("gb", "GB") for key in COLUMNS], harness.machine()

        def tables(rows: list[dict]) -> list[dict]:
            return [harness.table("steps", columns, [[str(row.get(key, "")) for key in COLUMNS] for row in rows])]

        rows = one_by_one(args, lambda rows: harness.report("training", argv, where, tables(rows), {"rows": rows}))
        harness.finish("training", argv, args.save, tables(rows), {"rows": rows})
    else:
        sys.exit("error: no CUDA device\n  hint: --device cpu")


if __name__ == "__main__":
    main()
