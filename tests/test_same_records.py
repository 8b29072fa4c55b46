"""The same seeds give the same records, whatever becomes of the code: every stage against the records it once wrote.

python -m pytest tests/test_same_records.py
python tests/test_same_records.py           # writes same_records.json anew: only where a commit means to change texts

same_records.json holds a hash of every record (accepted and rejected: ids, seeds and texts alike) that the commands
below write, and the numbers in them that floating point may change in their last digits, to be compared with a
tolerance. Sidecars (X.meta.json) and the bytes of adapters are not compared.

The tests know command lines and JSONL files and nothing of the package, so that they outlive its modules: where a
command line changes, COMMANDS is the one place to change. All runs in this process, on the CPU: 27 s for the tiny
models, 60 s for SmolLM2, on one quiet core. Few tokens are written, so that the last bits of another CPU's logits
hardly ever turn one of them into another.
"""

import hashlib
import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("same_records.json")

# {what runs: {name: command line}}, one after the other in one folder that `prepare` fills. Paths are relative: the
# run id in every record and half of the ids come from the output's last folders.
COMMANDS = {
    "tiny": {
        "instructions": """generate.py instructions --model writer --seeds prompts/en/seeds.jsonl prompts/zh/seeds.jsonl
            --count 10 --max-attempts 3 --seed 1 --output runs/same/iter_1/instructions.jsonl""",
        "instructions, all known": """generate.py instructions --model writer --seeds prompts/en/seeds.jsonl --count 5
            --max-attempts 2 --seed 1 --dedup-against runs/same/iter_1/instructions.jsonl --min-yield 0
            --output again/same/iter_1/instructions.jsonl""",
        "responses": """generate.py responses --model writer --input runs/same/iter_1/instructions.jsonl
            --samples 3 --max-attempts 3 --max-new-tokens 200 --seed 2 --output runs/same/iter_1/responses.jsonl""",
        "responses, other sampling": """generate.py responses --model writer --input questions.jsonl --samples 2
            --max-attempts 2 --no-length-bias --temperature 0.9 --top-p 0.9 --top-k 0 --repetition-penalty 1.05
            --max-new-tokens 250 --seed 3 --output runs/other/iter_1/responses.jsonl""",
        "extend": """extend.py --model writer --input runs/same/iter_1/responses.jsonl --samples 2 --rounds 2
            --max-attempts 5 --max-new-tokens 200 --seed 4 --output runs/same/iter_1/extended.jsonl""",
        "extend, one stage": """extend.py --model writer --input drafts.jsonl --samples 2 --stages 1
            --penalty-scope all --rounds 2 --max-attempts 4 --min-gain 1.1 --no-length-bias --max-new-tokens 200
            --seed 5 --output runs/other/iter_1/extended.jsonl""",
        "constrain": """generate.py constrain --model writer --input runs/same/iter_1/responses.jsonl
            runs/same/iter_1/extended.jsonl drafts.jsonl --demand-min 20 --demand-max 250 --demand-steps 10,20
            --max-attempts 2 --seed 6 --output runs/same/final/constrained.jsonl""",
        "train generator": """train.py --role generator --model random --input runs/same/iter_1/extended.jsonl
            drafts.jsonl --epochs 2 --batch-size 2 --max-length 300 --seed 7 --output runs/same/iter_1/generator""",
        "train extender": """train.py --role extender --model random --input runs/same/iter_1/extended.jsonl
            runs/other/iter_1/extended.jsonl --epochs 2 --seed 8 --output runs/same/iter_1/extender""",
        "train the extender on": """train.py --role extender --model random --adapter runs/same/iter_1/extender
            --input runs/same/iter_1/extended.jsonl --epochs 1 --accumulate 2 --dropout 0.1 --no-line-removal --seed 8
            --output runs/same/iter_2/extender""",
        "evaluate": """evaluate.py --model writer --benchmark benchmark.jsonl --samples 2 --max-new-tokens 150
            --seed 9 --judge writer --judge-attempts 2 --output runs/same/eval/base""",
        "evaluate an adapter": """evaluate.py --model random --adapter runs/same/iter_1/generator
            --benchmark benchmark.jsonl --at-least 100 --min-new-tokens 20 --max-new-tokens 60 --seed 9
            --output runs/same/eval/tuned""",
        "evaluate ready-made answers": """evaluate.py score runs/same/final/constrained.jsonl
            --output runs/same/eval/constrained""",
        "compare": """evaluate.py compare runs/same/eval/base runs/same/eval/tuned --judge writer
            --judge-attempts 1 --seed 10 --output runs/same/eval/preferred""",
    },
    "real": {
        "instructions": """generate.py instructions --model smollm2 --seeds prompts/en/seeds.jsonl --count 3
            --max-attempts 1 --max-new-tokens 80 --min-yield 0 --seed 1 --output runs/real/iter_1/instructions.jsonl""",
        "responses": """generate.py responses --model smollm2 --input questions.jsonl --language en --samples 2
            --max-attempts 1 --max-new-tokens 60 --min-yield 0 --seed 2 --output runs/real/iter_1/responses.jsonl""",
        "extend": """extend.py --model smollm2 --input drafts.jsonl --language en --samples 1 --rounds 1
            --max-attempts 2 --max-new-tokens 80 --min-yield 0 --seed 4 --output runs/real/iter_1/extended.jsonl""",
        "evaluate": """evaluate.py --model smollm2 --benchmark mini --limit 2 --max-new-tokens 60 --seed 9
            --language en --judge smollm2 --judge-attempts 1 --output runs/real/eval/base""",
    },
}
# The writer never answers a judge's question in form: each verdict is given up, and the command says so at its end.
ENDS_WITH = {("tiny", "evaluate"): "gave no usable verdict", ("tiny", "compare"): "gave no usable verdict"}

QUESTIONS = [
    {"prompt": "Describe the colour of the sea at sunrise in one sentence."},
    {"prompt": "Why do people keep old letters? Answer in two sentences."},
    {"prompt": "Name three things one can make out of apples."},
]
DRAFTS = [
    {"prompt": "Why does bread rise?", "response": "Yeast eats sugar. It makes gas.\n\nThe gas lifts the dough."},
    {"prompt": "What is a lighthouse for?", "response": "A lighthouse shows ships where the coast is."},
    {
        "prompt": "请描写一个下雨的清晨。",
        "response": "清晨下起了小雨，街上的人撑着伞慢慢地走。"
        "卖早点的摊子支起了棚，锅里的热气和雨雾混在一起，远远就能闻到豆浆的香味。"
        "\n\n巷口的茶馆亮着灯，几位老人坐在窗边听雨，谁也不急着说话。孩子们踩着水花跑向学校，书包上的水珠一路洒下来。"
        "\n\n雨停的时候，天边露出一线蓝色，屋檐还在滴水，整条街像刚刚洗过一样干净。",
    },
]

# Compared with TOLERANCE, not hashed. One and two threads differ by 1e-6 of a number; the records hold some of them
# rounded to four decimals, where the last may turn over.
NUMBERS = ("perplexity", "base_losses", "own_loss", "shuffled_loss", "loss", "grad_norm")
TOLERANCE = {"rel": 5e-5, "abs": 2e-4}
# Of a training step, left out: what the machine makes of it, and a share that one near tie among the logits moves.
LEFT_OUT = ("seconds", "tokens_per_second", "peak_percent", "peak_gb", "accuracy")


# ---------------------------------------------------------------------------------------------------------
# Running


def prepare(folder: Path, which: str) -> None:
    """What the commands read: prompts, questions, drafts, a benchmark of both languages, and the tiny models."""
    (folder / "prompts").symlink_to(ROOT / "prompts")
    for name, rows in (("questions", QUESTIONS), ("drafts", DRAFTS)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")
    english, chinese = (
        (ROOT / "prompts" / language / "bench_mini.jsonl").read_text("utf-8").splitlines(keepends=True)
        for language in ("en", "zh")
    )
    (folder / "benchmark.jsonl").write_text("".join(english[:3] + chinese[:2]), "utf-8")
    if which == "tiny":
        import tiny

        tiny.save_writer(folder / "writer")
        # Trained is a model whose loss depends on every token before: the writer hardly looks at any but the last.
        tiny.save_tiny(folder / "random")


def written(folder: Path, which: str) -> dict[str, dict[str, dict]]:
    """Run the commands one after the other in `folder`: {name: {file: {key: record}}} of what each has written."""
    prepare(folder, which)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, line in COMMANDS[which].items():
            script, *argv = shlex.split(line)
            # On any machine the same arithmetic: a GPU has another one.
            run(script, [*argv, "--device", "cpu"], ENDS_WITH.get((which, name), ""))
            found[name] = read_output(Path(argv[argv.index("--output") + 1]))
    return found


def run(script: str, argv: list[str], ends_with: str) -> None:
    """One command in this process; `ends_with`: what its error says, "" = it ends well."""
    main = importlib.import_module(Path(script).stem).main
    if not ends_with:
        main(argv)
        return
    with pytest.raises(Exception, match=ends_with):
        main(argv)


def read_output(output: Path) -> dict[str, dict[str, dict]]:
    """{file name: {key: record}} of a stage's file and what it rejected, or of all JSONL files of a folder."""
    files = sorted(output.glob("*.jsonl") if output.is_dir() else output.parent.glob(f"{output.stem}.*jsonl"))
    found = {}
    for file in files:
        with open(file, encoding="utf-8") as handle:  # str.splitlines would also split at characters inside a text
            rows = [json.loads(line) for line in handle]
        found[file.name] = {key_of(row): row for row in rows}
        assert len(found[file.name]) == len(rows), f"{file} holds a record twice"
    return found


def key_of(row: dict) -> str:
    """The id; of a tiny judge's verdict what was judged (see `comparable`); of a training step its number."""
    if row.get("judge") == "writer":
        return " ".join(filter(None, (row["parent_id"], row.get("order"))))
    if "step" in row:
        return f"step {row['step']}"
    return row.get("id") or row["prompt"]  # a pair that training left out is as its file has it


def comparable(row: dict) -> tuple[str, list[float]]:
    """(hash of a record, 12 hex digits; its numbers to be compared with a tolerance)."""
    left_out = {*NUMBERS, *LEFT_OUT}
    if row.get("judge") == "writer":
        # Its id is hashed from the bytes of the judge's weights, which torch's normal numbers make: they differ in
        # their last bits from CPU to CPU. SmolLM2's is hashed from its name.
        left_out |= {"id", "model"}
    kept = {name: value for name, value in row.items() if name not in left_out}
    if "lr" in kept:
        kept["lr"] = f"{kept['lr']:.6g}"  # a cosine, and so the C library's
    numbers = [row[name] for name in NUMBERS if name in row]
    flat = [x for value in numbers for x in (value if isinstance(value, list) else [value])]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12], flat


def golden_of(found: dict[str, dict[str, dict]]) -> dict:
    """What same_records.json keeps of the files of one command."""
    kept = {}
    for file, rows in found.items():
        pairs = {key: comparable(row) for key, row in sorted(rows.items())}
        if pairs:
            kept[file] = {"count": len(pairs), "records": {key: digest for key, (digest, _) in pairs.items()}}
        if numbers := {key: [float(f"{x:.6g}") for x in flat] for key, (_, flat) in pairs.items() if flat}:
            kept[file]["numbers"] = numbers
    return kept


# ---------------------------------------------------------------------------------------------------------
# Comparing


def check(name: str, found: dict[str, dict[str, dict]], golden: dict) -> None:
    """Fail with the name of every record that is missing, new or another one."""
    wrong = []
    for file in sorted(found.keys() | golden.keys()):
        rows, want = found.get(file, {}), golden.get(file, {"records": {}})
        for key in sorted(rows.keys() | want["records"].keys()):
            where = f"{name}, {file}, {key}"
            if key not in rows or key not in want["records"]:
                wrong.append(f"{where}: {'a new record' if key in rows else 'missing'}")
                continue
            digest, numbers = comparable(rows[key])
            if digest != want["records"][key]:
                wrong.append(f"{where}: another record now: {json.dumps(rows[key], ensure_ascii=False)[:600]}")
            elif numbers != pytest.approx(want.get("numbers", {}).get(key, []), **TOLERANCE):
                wrong.append(f"{where}: numbers {numbers} where {want['numbers'][key]} were")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text("utf-8"))


@pytest.fixture(scope="module")
def tiny_records(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return written(tmp_path_factory.mktemp("tiny"), "tiny")


@pytest.fixture(scope="module")
def real_records(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return written(tmp_path_factory.mktemp("real"), "real")


@pytest.mark.parametrize("name", COMMANDS["tiny"])
def test_the_tiny_models_write_what_they_wrote(tiny_records, golden, name):
    check(name, tiny_records[name], golden["tiny"][name])


@pytest.mark.real_model
@pytest.mark.parametrize("name", COMMANDS["real"])
def test_smollm2_writes_what_it_wrote(real_records, golden, name):
    check(name, real_records[name], golden["real"][name])


if __name__ == "__main__":
    import re
    import tempfile

    sys.path.insert(0, str(ROOT))
    import conftest  # noqa: F401  the tests' environment, before torch is imported

    everything = {}
    for which in COMMANDS:
        with tempfile.TemporaryDirectory() as folder:
            everything[which] = {name: golden_of(found) for name, found in written(Path(folder), which).items()}
    text = json.dumps(everything, indent=1)
    GOLDEN.write_text(re.sub(r"\[[^][]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n", "utf-8")
