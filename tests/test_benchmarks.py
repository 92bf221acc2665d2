"""Every CPU benchmark runs at its small size and writes its figures; no test depends on a time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import figures
from tests import tiny
from tools.doc_tables import replace_tables

ROOT = Path(__file__).resolve().parent.parent
# script -> keys of a figure that must be positive
SMALL = {
    "analyse": ("command", "peak_bytes"),
    "contrastive": ("times_faster_than", "full_logits"),
    "decode": ("decode", "decode", "ratio"),
    "entropy": ("rows",),
    "generate": ("times_faster", "one_at_a_time"),
    "kmeans_memory": ("ours", "growth"),
    "loader": ("ratio_images_per_s",),
    "search": ("tf32", "deepest"),
    "probe": ("epochs", "ratio_90_epochs", "tokens_anew"),
    "shards": ("ratios", "pt_int64_bytes_over_ours"),
    "step": ("lease_against_straight", "times_faster"),
    "vcq": ("search", "ratio_to_uniform", "grouped_cosine"),
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
    figures = run(name, tmp_path)
    assert len(numbers(figures)) > 3
    for key in SMALL[name]:
        figures = figures[key]
    assert figures > 0


@pytest.mark.slow
def test_encode_runs_on_a_small_world(tmp_path):
    tiny.make_world(tmp_path)
    tiny.run_until_centroids(tmp_path)
    files = {"images": "images/train", "vqgan": "vqgan.ckpt", "teacher": "teacher.pth"}
    files["centroids"] = "data/tiny/kmeans/centroids.npy"
    options = [part for name, path in files.items() for part in (f"--{name}", str(tmp_path / path))]
    figures = run("encode", tmp_path, *options, "--kwargs", json.dumps(tiny.VIT), "--batch", "4")
    assert figures["ratio"] > 0
    assert figures["equal_tokens"] > 0.5


def run(name: str, folder: Path, *options: str) -> dict:
    """The figures that a benchmark writes at its small size."""
    out = folder / "figures.json"
    command = [sys.executable, "-m", f"benchmarks.bench_{name}", "--small", *options, "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_every_benchmark_can_be_run_as_the_table_says():
    """Every script can be imported from the project's folder, as `python -m benchmarks.bench_NAME` needs."""
    names = sorted(script.stem for script in (ROOT / "benchmarks").glob("bench_*.py"))
    code = "; ".join(f"import benchmarks.{name}; benchmarks.{name}.main" for name in names)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert f"benchmarks/{name}.py" not in (ROOT / "benchmarks" / f"{name}.py").read_text(), "run it with -m"


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
