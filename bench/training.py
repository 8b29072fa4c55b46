"""A training step: the longest row, tokens/s and peak memory of train.py and of what else one could use.

    python bench/training.py --vram 24            # on a GPU: Qwen2.5-7B r16 and Llama-3.1-8B r32, capped at 24 GB
    python bench/training.py                      # the same with all of the card
    python bench/training.py --device cpu         # SmolLM2-135M, samples of 1,024 tokens: ours against PEFT, in turns

On a GPU: shapes as in the names, random weights in NF4 with double quantisation (nothing is downloaded), LoRA on every
linear layer, one row of T random tokens a step of which 95 % are targets, AdamW. --vram caps the allocator
(torch.cuda.set_per_process_memory_fraction; the context, about 0.5 GB, is outside of the cap). Per method, each in a
process of its own: tokens/s (median of 3 steps after a first one) and peak allocated GB at 4K, 16K and 64K tokens, and
the longest T that trains, by bisection to 2 %. The methods:

    ours                 train_step of train.py, with the settings that its plan chooses
    transformers + PEFT  the model's own code and loss, gradient checkpointing, flash-attn where installed, else SDPA
    the same + Liger     with Liger's kernels patched in, its fused loss among them
    Unsloth              needs real files: --unsloth-model FOLDER of that shape; skipped without

On a CPU: fp32, each in a process of its own with its own defaults, one step each in turn, each first every other time;
medians, quartiles, and the median of the turns' ratios: what slows a shared machine for minutes slows both of a turn.
The table goes to stderr, the same data as one JSON line to stdout; --save keeps it (harness.py). No GPU has run this
yet.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
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
from torch import nn
from transformers import AutoConfig, PreTrainedModel

import train
from lengthen.models import lora
from lengthen.models.cards import out_of_memory
from lengthen.models.loading import load_model
from lengthen.records import UserError
from lengthen.training.learner import Learner, adamw
from lengthen.training.packed import examine
from lengthen.training.pairs import Pair
from lengthen.training.parallel import Processes
from lengthen.training.policy import memory_of
from lengthen.training.settings import LoraFlags, MemoryFlags
from lengthen.training.shapes import meta_model

SHAPES = {  # name: (family, rank, sizes)
    "Qwen2.5-7B": ("qwen2", 16, (152_064, 3584, 18_944, 28, 28, 4)),
    "Llama-3.1-8B": ("llama", 32, (128_256, 4096, 14_336, 32, 32, 8)),
    "tiny": ("llama", 8, (512, 128, 256, 2, 4, 2)),
}
METHODS = ("ours", "transformers + PEFT", "transformers + PEFT + Liger", "Unsloth")
LENGTHS = [4096, 16_384, 65_536]
CONTEXT = 1 << 20  # tokens: no method stops at a length of its own


# ---- models ----------------------------------------------------------------------------------------------------------


def random_model(shape: str, device: torch.device, nf4: bool) -> PreTrainedModel:
    """The shape with random weights: linear layers quantised one by one, so that no second copy is ever held."""
    family, _, (vocab, hidden, inner, layers, heads, keys) = SHAPES[shape]
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = meta_model(config, dtype)
    if nf4:
        for name, linear in lora.decoder_linears(model).items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, quantised(linear, device, dtype))
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.randn(parameter.shape, device=device, dtype=dtype) * 0.02
                ones = parameter.dim() == 1 and name == "weight"  # norms
                setattr(module, name, nn.Parameter(torch.ones_like(value) if ones else value, requires_grad=False))
    decoder = model.get_decoder()
    with device:
        decoder.rotary_emb = type(decoder.rotary_emb)(config=config)  # its buffers were on meta, too
    return model.eval().requires_grad_(False)


def quantised(linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    bias = linear.bias is not None
    layer = Linear4bit(
        linear.in_features, linear.out_features, bias, dtype, compress_statistics=True, quant_type="nf4", device="meta"
    )
    weight = torch.randn(linear.out_features, linear.in_features, device=device, dtype=dtype) * 0.02
    layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to(device)
    return layer


# ---- the methods: a function that does one step over the pairs, and says what it did --------------------------------


def ours(model: PreTrainedModel, rank: int, vram_gb: float, longest: int) -> Callable:
    parameters = lora.attach(model, rank, 2 * rank)
    abilities = examine(model)
    model.train()
    nf4 = any(type(m).__name__ == "Linear4bit" for m in model.modules())
    flags = MemoryFlags(vram=vram_gb, auto_shrink=True)
    memory = memory_of(LoraFlags(rank=rank), flags, 32, model, abilities, longest, Processes(), nf4=nf4)
    learner = Learner(model, abilities, memory, adamw(parameters, 1e-5, 32))

    def step(pairs: list[Pair]) -> str:
        train.train_step(learner, pairs, len(pairs))
        return str(memory.choice(max(len(p.ids) for p in pairs)))

    return step


def with_peft(model: PreTrainedModel, rank: int, checkpointing: bool) -> Callable:
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return plain_step(model, "--checkpoint full" if checkpointing else "--checkpoint none")


def with_unsloth(folder: str, rank: int, longest: int) -> Callable:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=longest, load_in_4bit=True)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=rank, lora_alpha=2 * rank, target_modules=names, use_gradient_checkpointing="unsloth"
    )
    return plain_step(model, "its own")


def plain_step(model: nn.Module, settings: str) -> Callable:
    """A step by the model's own loss: samples one by one, as a batch of one has no padding."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)

    def step(pairs: list[Pair]) -> str:
        targets = sum(len(p.ids) - p.num_prompt for p in pairs)
        for pair in pairs:
            ids = torch.tensor([pair.ids], device=parameters[0].device)
            labels = ids.clone()
            labels[0, : pair.num_prompt] = -100
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            (loss * (len(pair.ids) - pair.num_prompt) / targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return settings

    return step


def stepper(args: argparse.Namespace) -> Callable:
    """The step of args.worker on a GPU."""
    device, rank = torch.device("cuda"), SHAPES[args.shapes[0]][1]
    if args.worker == "Unsloth":
        return with_unsloth(args.unsloth_model, rank, max(args.tokens))
    if args.worker.endswith("Liger"):  # before the model is built: it patches classes
        import liger_kernel.transformers as liger

        getattr(liger, f"apply_liger_kernel_to_{SHAPES[args.shapes[0]][0]}")()
    model = random_model(args.shapes[0], device, nf4=True)
    if args.worker == "ours":
        return ours(model, rank, args.vram, max(args.tokens))
    model.set_attn_implementation("flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa")
    return with_peft(model, rank, checkpointing=True)


# ---- measuring -------------------------------------------------------------------------------------------------------


def sample(tokens: int, vocab: int) -> Pair:
    ids = torch.randint(3, vocab, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()
    return Pair(ids, max(1, tokens // 20))


def seconds(work: Callable, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fits(step: Callable, tokens: int, vocab: int) -> bool:
    """Whether a step of one row of so many tokens trains. Anything but a lack of memory is raised."""
    try:
        step([sample(tokens, vocab)])
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
    if args.vram:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, 1e9 * args.vram / torch.cuda.get_device_properties(0).total_memory)
        )
    step, vocab = stepper(args), SHAPES[args.shapes[0]][2][0]
    for tokens in args.tokens:
        torch.cuda.reset_peak_memory_stats()
        row = {"tokens": tokens, "tokens_per_second": -1.0, "peak_gb": -1.0, "settings": "out of memory"}
        if fits(step, tokens, vocab):
            pairs = [sample(tokens, vocab)]
            row["settings"] = step(pairs)
            times = [seconds(lambda pairs=pairs: step(pairs), "cuda") for _ in range(3)]
            row["tokens_per_second"] = round(tokens / statistics.median(times), 1)
            row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        print(json.dumps(row), flush=True)
    if args.longest:
        print(json.dumps({"longest": longest_row(lambda n: fits(step, n, vocab), 1024)}), flush=True)


def on_gpu(args: argparse.Namespace) -> list[dict]:
    """Every method in its own process: what one patches or leaves in memory does not meet the next."""
    rows = []
    for shape in args.shapes:
        print(f"\n{shape}, NF4, rank {SHAPES[shape][1]}, {args.vram or 'all'} GB", file=sys.stderr)
        print(f"{'':30}{'T':>9}{'tokens/s':>10}{'peak GB':>9}  settings", file=sys.stderr)
        for method in args.methods:
            if why := missing(method, args):
                print(f"{method:30}  not measured: {why}", file=sys.stderr)
                continue
            command = [sys.executable, __file__, "--worker", method, "--shapes", shape, "--vram", str(args.vram)]
            command += ["--tokens", *map(str, args.tokens), "--longest" if args.longest else "--no-longest"]
            command += ["--unsloth-model", args.unsloth_model]
            done = subprocess.run(command, capture_output=True, text=True)
            found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            if done.returncode:
                print(f"{method:30}  failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            for row in found:
                rows.append({"shape": shape, "method": method, "vram_gb": args.vram, **row})
                if "longest" in row:
                    print(f"{method:30}{row['longest']:9,}  the longest that trains", file=sys.stderr)
                else:
                    speed = f"{row['tokens_per_second']:10,.0f}{row['peak_gb']:9.2f}"
                    print(f"{method:30}{row['tokens']:9,}{speed}  {row['settings']}", file=sys.stderr)
    return rows


def missing(method: str, args: argparse.Namespace) -> str:
    """Why a method cannot run here, "" = it can."""
    needs = {"PEFT": "peft", "Liger": "liger_kernel", "Unsloth": "unsloth"}
    for word, package in needs.items():
        if word in method and not importlib.util.find_spec(package):
            return f"pip install {package.replace('_', '-')}"
    return "" if method != "Unsloth" or args.unsloth_model else "--unsloth-model FOLDER"


def cpu_stepper(method: str, shape: str, longest: int) -> Callable[..., dict]:
    """What answers the requests of `on_cpu`: a step over one sample of so many tokens."""
    if shape == "SmolLM2-135M":
        model = load_model("smollm2", device="cpu", train=True).model
    else:
        model = random_model(shape, torch.device("cpu"), nf4=False)
    rank, vocab = 8, model.config.vocab_size
    if method == "ours":
        step = ours(model, rank, 0.0, longest)
    else:
        model.set_attn_implementation("sdpa")
        step = with_peft(model, rank, checkpointing=False)

    def answer(tokens: int) -> dict:
        pairs = [sample(tokens, vocab)]
        return {"seconds": seconds(lambda: step(pairs), "cpu")}

    return answer


def on_cpu(args: argparse.Namespace) -> tuple[list[list[str]], list[dict]]:
    """Ours and PEFT's in turns: what else the machine does meets both. -> (lines of the table, all seconds)"""
    lines, figures = [], []
    for shape in args.shapes:
        command = [sys.executable, __file__, "--device", "cpu", "--shapes", shape, "--tokens", *map(str, args.tokens)]
        engines = {name: harness.Engine([*command, "--worker", name]) for name in METHODS[:2]}
        for tokens in args.tokens:
            times: dict[str, list[float]] = {name: [] for name in engines}
            for repeat in range(args.repeats + 1):
                for name, engine in list(engines.items())[:: -1 if repeat % 2 else 1]:
                    took = engine(tokens=tokens)["seconds"]
                    if repeat:  # the first is a warm-up
                        times[name].append(took)
            ratios = [theirs / own for own, theirs in zip(*times.values(), strict=True)]
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
    p.add_argument("--shapes", nargs="+", choices=[*SHAPES, "SmolLM2-135M"], help="default: both; SmolLM2 on a CPU")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="on a GPU")
    p.add_argument("--tokens", nargs="+", type=int, help="lengths; default 4K 16K 64K, on a CPU 1024")
    p.add_argument("--repeats", type=int, default=10, help="steps of each, on a CPU")
    p.add_argument(
        "--longest", action=argparse.BooleanOptionalAction, default=True, help="find the longest row, on a GPU"
    )
    p.add_argument("--unsloth-model", default="", help="folder with weights of that shape, for Unsloth")
    p.add_argument("--worker", default="", choices=["", *METHODS], help="used by the script itself")
    harness.add_save(p)
    args = p.parse_args(argv)
    args.shapes = args.shapes or (["SmolLM2-135M"] if args.device == "cpu" else ["Qwen2.5-7B", "Llama-3.1-8B"])
    args.tokens = args.tokens or (LENGTHS if args.device == "cuda" else [1024])
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.worker and args.device == "cpu":
        harness.serve(lambda: cpu_stepper(args.worker, args.shapes[0], max(args.tokens)))
    elif args.worker:
        work(args)
    elif args.device == "cpu":
        lines, figures = on_cpu(args)
        columns = ["", "model", "tokens of a sample", "tokens/s (quartiles)", "ours is faster by"]
        harness.finish("training", argv, args.save, [harness.table("steps", columns, lines)], {"runs": figures})
    elif torch.cuda.is_available():
        columns = ["", "shape", "tokens", "tokens/s", "peak GB", "longest row", "settings"]
        keys = ("method", "shape", "tokens", "tokens_per_second", "peak_gb", "longest", "settings")
        rows = on_gpu(args)
        lines = [[str(row.get(key, "")) for key in keys] for row in rows]
        harness.finish("training", argv, args.save, [harness.table("steps", columns, lines)], {"rows": rows})
    else:
        sys.exit("no CUDA device: --device cpu")


if __name__ == "__main__":
    main()
