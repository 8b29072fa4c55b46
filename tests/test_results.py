"""The figures in the documents are those of bench/results, and a bench runs its engines as their users would.

python -m pytest tests/test_results.py
"""

import json
import os
import sys

import pytest
from test_bench_training import BENCH, load
from tiny import save_tiny

sys.path.append(str(BENCH))
import harness  # noqa: E402

FILES = sorted(harness.RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", harness.DOCUMENTS, ids=lambda path: path.name)
def test_a_documents_tables_are_those_of_the_files(path):
    text = path.read_text("utf-8")
    assert text.count("<!-- bench/results/") == text.count("<!-- end -->") == len(harness.QUOTED.findall(text))
    assert harness.requoted(text) == text, "python bench/harness.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_where_its_figures_come_from_and_a_document_quotes_it(path):
    result = json.loads(path.read_text("utf-8"))
    where = result["machine"]
    assert all(where[key] for key in ("cpu", "instructions", "cores", "versions", "commit", "date")), where
    assert not where["commit"].endswith("dirty"), "figures come from a clean checkout"
    assert result["command"].startswith(f"python bench/{result['bench']}.py") and result["figures"]
    quoted = {name for document in harness.DOCUMENTS for _, name, *_ in harness.QUOTED.findall(document.read_text())}
    assert path.stem in quoted, "no document quotes it"


def test_a_changed_file_changes_the_document(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    for value in ("1.5", "1.6"):
        one = harness.table("speed", ["", "times"], [["ours", value]])
        harness.finish("x", ["--rows", "1", "--save", "a"], "a", [one], {"times": [float(value)]})
        printed = json.loads(capsys.readouterr().out)
        assert printed == json.loads((tmp_path / "a.json").read_text())
        assert printed["command"] == "python bench/x.py --rows 1"  # --save changes no figure
        text = harness.requoted("<!-- bench/results/a.json: speed -->\n| old |\n<!-- end -->\nrest\n", tmp_path)
        assert f"| ours | {value} |\n<!-- end -->\nrest" in text and printed["machine"]["commit"] in text
    with pytest.raises(SystemExit, match=r"b\.json"):
        harness.requoted("<!-- bench/results/b.json: speed -->\n<!-- end -->", tmp_path)


def test_peers_run_without_our_waiting_policy(monkeypatch):
    """They inherited OMP_WAIT_POLICY from the bench, which imports lengthen."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    code = "import os, json, sys; sys.path.append(sys.argv[1]); from harness import serve\n"
    code += "def start():\n    print('noise')\n    return lambda name: os.environ.get(name)\nserve(start)"
    for threads, want in ((0, harness.ENVIRONMENT.get("OMP_NUM_THREADS")), (3, "3")):
        engine = harness.Engine([sys.executable, "-c", code, str(BENCH)], threads)
        assert engine(name="OMP_WAIT_POLICY") == harness.ENVIRONMENT.get("OMP_WAIT_POLICY")
        assert engine(name="OMP_NUM_THREADS") == want
        engine.close()


def test_the_sampler_bench_runs_both_parts(tmp_path, capsys, monkeypatch):
    """Ours and generate as processes, on a tiny model: the tables have their rows, the exact job its tokens."""
    bench, model = load("sampler"), save_tiny(tmp_path / "model", num_hidden_layers=1)
    flags = ["--model", str(model), "--peers", "generate", "llama.cpp", "--prompts", "4", "--max-new-tokens", "8"]
    bench.main([*flags, "--even", "6", "--batches", "2", "4", "--rows", "1", "2", "--steps", "2", "--runs", "2"])
    out, err = capsys.readouterr()
    result = json.loads(out)
    ragged, even, steps = result["tables"]
    assert [row[0] for row in ragged["rows"]][0] == "ours" and ragged["rows"][1][0].startswith("generate, ")
    assert [row[1] for row in even["rows"]] == ["24", "24"]  # 4 prompts of 6 tokens
    places = ["ours, default", "ours, 1 thread", "ours, busy", "generate, default", "generate, 1 thread"]
    assert [row[0] for row in steps["rows"]] == places
    assert "llama.cpp: left out, --model is no GGUF file" in err
    assert "AVX" in result["machine"]["instructions"] or os.uname().machine != "x86_64"
