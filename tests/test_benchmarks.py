"""Every benchmark still runs at its small size and writes the ratios it is there for; no time is judged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import figures
from tools.doc_tables import replace_tables

ROOT = Path(__file__).resolve().parent.parent
# script -> (extra options, keys that must lead to a positive number)
SMALL = {
    "contrastive": ((), ()),
    "decode": ((), ("decode", "decode", "ratio")),
    "entropy": ((), ()),
    "generate": ((), ("times_faster", "one_at_a_time")),
    "loader": ((), ()),
    "probe": ((), ()),
    "shards": ((), ()),
    "vcq": ((), ()),
}


def numbers(tree: object) -> list[float]:
    """Every number of a JSON tree."""
    if isinstance(tree, dict):
        return [n for value in tree.values() for n in numbers(value)]
    if isinstance(tree, list):
        return [n for value in tree for n in numbers(value)]
    return [tree] if isinstance(tree, (int, float)) and not isinstance(tree, bool) else []


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_run_writes_figures(name, tmp_path):
    options, keys = SMALL[name]
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", f"benchmarks.bench_{name}", "--small", *options, "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert len(numbers(figures)) > 3
    for key in keys:
        figures = figures[key]
    assert not keys or figures > 0


def test_every_benchmark_can_be_run_as_the_table_says():
    """`python -m benchmarks.bench_NAME` finds what each script imports."""
    names = sorted(script.stem for script in (ROOT / "benchmarks").glob("bench_*.py"))
    code = "; ".join(f"import benchmarks.{name}; benchmarks.{name}.main" for name in names)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert f"benchmarks/{name}.py" not in (ROOT / "benchmarks" / f"{name}.py").read_text(), "an old way to run it"


def test_every_benchmark_is_in_the_table():
    table = (ROOT / "benchmarks" / "README.md").read_text()
    for script in (ROOT / "benchmarks").glob("bench_*.py"):
        assert f"`{script.name}`" in table


def test_the_figures_in_the_document_are_those_of_the_results():
    results, document = ROOT / "benchmarks" / "results", (ROOT / "benchmarks" / "README.md").read_text()
    assert replace_tables(document, {"figures": figures.table(results)}) == document, "run python -m benchmarks.figures"


def test_another_result_changes_the_figures(tmp_path):
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    path = tmp_path / "results" / "encode.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ratio": 123.45}))
    assert "123.45 x as many images/s" in figures.table(tmp_path / "results")
