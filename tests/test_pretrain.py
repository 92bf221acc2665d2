"""`semdict pretrain` as a user runs it: from shards to a published run, killed, shared among processes, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from semdict.cli import main
from semdict.pipeline.shards import Block, ShardSpec, write_shards
from semdict.pipeline.shards.convert import export_tokens
from semdict.train.engine.logging import read_log
from semdict.train.engine.model_file import load_model
from semdict.train.masked.model import MaskedTokenTransformer
from semdict.train.masked.objectives import OBJECTIVES
from semdict.train.masked.objectives.mage import Mage, Masking
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ROWS, CODES, WORDS, WIDTH = 50, 16, 12, 6


def write_tokens(path: Path, seed: int = 0, swap: bool = False) -> None:
    """Learnable tokens: an image repeats a few codes of its class, and a code's word follows from the code.

    swap: other tokens of equal counts, so that the metadata stays the same.
    """
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, ROWS).astype(np.int32)
    gen = (label[:, None, None] * 4 + rng.integers(0, 2, (ROWS, 2, 16))).astype(np.uint16)
    disc = (gen * 3 % WORDS).astype(np.uint16)
    if swap:
        gen, disc = gen[:, :, ::-1].copy(), disc[:, :, ::-1].copy()
    status = np.zeros(ROWS, np.uint8)
    status[7], gen[7], disc[7] = 3, 65535, 65535
    index = pa.table({"key": [str(n) for n in range(ROWS)], "split": ["train"] * ROWS,
                      "label_name": [""] * ROWS, "reason": [""] * ROWS})  # fmt: skip
    spec = ShardSpec(ROWS, [{"name": "a"}, {"name": "b"}], (4, 4), CODES, WORDS, {"seed": seed}, "f")
    centroids = rng.normal(size=(WORDS, WIDTH)).astype(np.float32)
    write_shards(path, spec, [Block(gen, disc, label, status)], index, centroids=centroids)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "set"
    write_tokens(path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch, shards) -> Path:
    """A folder with params.yaml, which is the current one."""
    monkeypatch.chdir(tmp_path)
    tree = tiny.preset("demo")
    pretrain = {
        "size": "tiny", "width": 32, "decoder_width": 32, "depth": 1, "decoder_depth": 1, "heads": 2,
        "decoder_heads": 2, "epochs": 4, "warmup_epochs": 1, "batch": 12, "base_lr": 0.1, "dropout": 0.0,
        "precision": "float32",
        "sorcen": {"projector": [16, 8], "predictor": [8, 8], "echo_warmup_epochs": 2},
    }  # fmt: skip
    runtime = {"device": "cpu", "log_every": 1, "save_every": 3, "tensorboard": False}
    tree = tiny.replaced(tree, pretrain=pretrain, runtime=runtime)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def pretrain(shards: Path, objective: str, *options: str) -> int:
    return main(["pretrain", "--objective", objective, "--shards", str(shards), *options])


def start(shards: Path, objective: str, *options: str, processes: int = 1) -> subprocess.Popen:
    runner = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [
        sys.executable,
        *runner,
        "-m",
        "semdict.train.masked.pretrain",
        "--objective",
        objective,
        "--shards",
        str(shards),
    ]
    return subprocess.Popen([*command, *options], env=ENV, stderr=subprocess.PIPE, text=True)


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run, MaskedTokenTransformer)[0].state_dict()


def curve(path: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in read_log(path / "log.jsonl")]


@pytest.mark.parametrize("objective", ["mage", "lease", "sorcen"])
def test_a_run_is_published_and_left_alone(folder, shards, objective, capsys):
    assert pretrain(shards, objective) == 0
    out, reports = folder / "runs" / "demo" / objective, folder / "reports" / "demo" / objective
    metrics, losses = json.loads((reports / "metrics.json").read_text()), curve(out, "reconstruction")
    assert len(losses) == 16 and metrics["steps"] == 16 and metrics["images_left_out"] == 1
    assert metrics["chance"]["reconstruction"] == pytest.approx(np.log(CODES))
    assert metrics["final"]["reconstruction"] == pytest.approx(np.mean(losses[-4:])) and losses[-1] < losses[0] - 0.3
    assert (reports / "plots" / "reconstruction.tsv").read_text().startswith("step\treconstruction\n1\t")
    model, file = load_model(out, MaskedTokenTransformer)
    assert file.about["cfg"]["epochs"] == 4 and model.family == objective
    assert model.features(torch.zeros(2, 16, dtype=torch.long)).shape == (2, 32)
    assert not (out / "checkpoints").exists() and sorted(p.name for p in (folder / "work").iterdir()) == ["locks"]
    before = (out / "model.pt").stat().st_mtime_ns
    assert pretrain(shards, objective, "--resume", "--set", "runtime.log_every=5") == 0  # how often to log is no recipe
    assert (out / "model.pt").stat().st_mtime_ns == before and "nothing to do" in capsys.readouterr().err
    assert pretrain(shards, objective) == 2 and "already complete" in capsys.readouterr().err
    assert pretrain(shards, objective, "--resume", "--set", "pretrain.epochs=5") == 2
    assert "epochs: 4 -> 5" in capsys.readouterr().err


def test_tokens_of_another_recipe_are_another_run(folder, shards, capsys):
    assert pretrain(shards, "mage") == 0
    write_tokens(folder / "other", seed=1)
    assert pretrain(folder / "other", "mage", "--resume") == 2
    assert "recipe: " in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9_and_resume_is_bit_exact(folder, shards, objective="sorcen"):
    """Sorcen has the most to restore: an averaged teacher, running statistics, and dropout."""
    options = ("--set", "pretrain.epochs=20", "--set", "pretrain.dropout=0.1")
    process = start(shards, objective, *options)
    deadline = time.monotonic() + 120
    while not list(folder.glob("work/pretrain-*/checkpoints/step-00000006.pt")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "runs").exists() and len(list(folder.glob("work/pretrain-*"))) == 1
    assert pretrain(shards, objective, *options, "--resume") == 0
    assert pretrain(shards, objective, *options, "--out", "whole", "--reports", "r") == 0
    broken, whole = (state_of(path) for path in (folder / "runs/demo" / objective, folder / "whole"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert curve(folder / "whole") == curve(folder / "runs/demo" / objective)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["lease", "sorcen"])
def test_two_processes_reproduce_the_curve(folder, shards, objective):
    """Same global batch: BatchNorm, InfoNCE and uniformity see the rows of both."""
    assert pretrain(shards, objective) == 0
    process = start(shards, objective, "--out", "two", "--reports", "r", processes=2)
    assert process.wait(180) == 0, process.stderr.read()
    for name in read_log(folder / "two" / "log.jsonl")[0].keys() - {"step", "speed", "lr", "grad_norm"}:
        shared, expected = curve(folder / "two", name), curve(folder / "runs/demo" / objective, name)
        assert shared == pytest.approx(expected, rel=2e-3), name
        assert shared[:4] == pytest.approx(expected[:4], rel=1e-5), name


@pytest.mark.slow
def test_two_processes_when_nothing_is_visible(folder, shards):
    """A mask ratio of 1 leaves the contrast without rows: the other gradients must still be exchanged."""
    masks = ("--set", "pretrain.mask.min=1.0", "--set", "pretrain.epochs=1")
    process = start(shards, "lease", *masks, "--out", "two", processes=2)
    assert process.wait(180) == 0, process.stderr.read()
    assert curve(folder / "two", "contrast_encoder") == [0.0] * 4


def test_streaming_trains_from_tars(folder, shards, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semdict.pipeline.shards.layouts.webdataset.BLOCK_ROWS", 8)
        export_tokens(shards, folder / "tars", "webdataset")
    options = ("--set", "pretrain.loader=streaming", "--set", "pretrain.epochs=1")
    assert pretrain(folder / "tars", "lease", *options) == 1 and "--centroids" in capsys.readouterr().err
    assert pretrain(folder / "tars", "lease", *options, "--centroids", str(shards / "codebooks/centroids.npy")) == 0
    assert len(curve(folder / "runs/demo/lease")) == 4
    np.save(folder / "wrong.npy", np.ones((5, WIDTH), np.float32))
    assert pretrain(folder / "tars", "lease", *options, "--centroids", "wrong.npy", "--out", "x") == 1
    assert "5 centroids" in capsys.readouterr().err


def test_the_online_classifier_does_not_change_the_encoder(folder, shards):
    """Clipping off: its gradient must not reach the encoder, and it learns the labels."""
    free = ("--set", "pretrain.clip=0", "--set", "pretrain.epochs=8")
    assert pretrain(shards, "sorcen", *free) == 0
    assert pretrain(shards, "sorcen", *free, "--set", "pretrain.online_classifier=true", "--out", "online") == 0
    plain, online = (state_of(folder / p) for p in ("runs/demo/sorcen", "online"))
    assert plain.keys() == online.keys() and all(torch.equal(plain[name], online[name]) for name in plain)
    accuracy = curve(folder / "online", "online_accuracy")
    assert np.mean(accuracy[:2]) < 0.45 and np.mean(accuracy[-4:]) > 0.6


def test_pictures_are_written(folder, shards):
    from PIL import Image

    from semdict.pipeline.tokenizers.base import save_tokenizer
    from semdict.pipeline.tokenizers.mage import MageTokenizer
    from semdict.pipeline.tokenizers.vqgan import Sizes

    torch.manual_seed(0)
    sizes = Sizes(
        stem=32, widths=(32,) * 5, blocks=1, decoder_blocks=1, z_channels=8, codes=CODES, dim=8, strided=False
    )
    save_tokenizer(MageTokenizer(sizes).eval(), folder / "vqgan.ckpt")
    watch = (*tiny.other_vqgan("vqgan.ckpt"), "--set", "runtime.picture_every=2", "--set", "runtime.pictures=3")
    assert pretrain(shards, "mage", "--set", "pretrain.epochs=1", *watch) == 0
    assert pretrain(shards, "mage", "--set", "pretrain.epochs=1", "--out", "plain") == 0
    pictures = sorted((folder / "runs/demo/mage/pictures").iterdir())
    assert [p.name for p in pictures] == ["step-00000002.png", "step-00000004.png"]
    assert np.asarray(Image.open(pictures[0])).std() > 5
    seen, unseen = (state_of(folder / p) for p in ("runs/demo/mage", "plain"))
    assert all(torch.equal(seen[name], unseen[name]) for name in seen)  # watching does not change the run


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--set", "pretrain.epoch=3"), 2, "did you mean pretrain.epochs"),
        (("--set", "pretrain.warmup_epochs=9"), 2, "more than epochs 4"),
        (("--set", "pretrain.lambda=-1"), 2, "pretrain.lambda"),
        (("--set", "pretrain.batch=100"), 2, "larger than the token set"),
        (("--set", "pretrain.accumulate=5"), 2, "multiple of accumulate 5"),
        (("--set", "pretrain.splits=[test]"), 1, "no split 'test'"),
        (("--set", "runtime.picture_every=1"), 1, "does not exist"),
        (("--set", "pretrain.lease.neighbours=12"), 2, "12 neighbours do not exist"),
    ],
)
def test_mistakes_are_named(folder, shards, capsys, options, status, words):
    assert pretrain(shards, "lease", *options) == status
    assert words in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_a_folder_without_shards_is_named(folder, capsys):
    assert pretrain(folder / "nowhere", "mage") == 2
    assert "nowhere" in capsys.readouterr().err


class Rotated(Mage):
    """An objective of its own: reconstruction of ids that are shifted by `shift`."""

    last_step = "argmax"

    def __init__(self, shift: int, masking: Masking, smoothing: float) -> None:
        super().__init__(masking, smoothing)
        self.shift = shift

    @classmethod
    def architecture(cls) -> dict:
        return {"grid_code": True}

    @classmethod
    def from_cfg(cls, cfg, own, model, token_set):
        return cls(own.shift, Masking.from_cfg(cfg), cfg.label_smoothing)

    def masked_pass(self, model, batch, rng):
        return super().masked_pass(model, {**batch, "gen": (batch["gen"] + self.shift) % model.codebook_size}, rng)


def test_an_objective_takes_a_file_a_line_and_a_section(folder, shards, monkeypatch, capsys):
    """Nothing else: it trains under its name, its section is part of the run's identity, unknown names are refused."""
    monkeypatch.setitem(OBJECTIVES, "rotated", (__name__, "Rotated"))
    assert pretrain(shards, "rotated") == 2
    assert "pretrain: rotated is missing; `semdict preset --complete`" in capsys.readouterr().err
    section = ("--set", "pretrain.rotated={shift: 3}")
    assert pretrain(shards, "rotated", *section) == 0
    model, file = load_model(folder / "runs/demo/rotated", MaskedTokenTransformer)
    assert model.family == "rotated" and model.pos2d is not None and file.about["cfg"]["rotated"] == {"shift": 3}
    assert not {"lease", "sorcen", "mage"} & file.about["cfg"].keys()
    assert pretrain(shards, "rotated", "--resume", "--set", "pretrain.rotated={shift: 4}") == 2
    assert "pretrain.rotated.shift: 3 -> 4" in capsys.readouterr().err
    assert pretrain(shards, "mage", *section, "--set", "pretrain.epochs=1") == 0
    other = ("--set", "pretrain.rotated={shift: 5}", "--set", "pretrain.sorcen.top=3", "--set", "pretrain.epochs=1")
    assert pretrain(shards, "mage", "--resume", *other) == 0  # another objective's keys are no part of this run
    assert "nothing to do" in capsys.readouterr().err
    assert pretrain(shards, "rotatd", *section) == 2 and "did you mean 'rotated'?" in capsys.readouterr().err


def test_an_unknown_section_is_refused(folder, shards, capsys):
    assert pretrain(shards, "mage", "--set", "pretrain.rotated={shift: 3}") == 2
    assert "pretrain.rotated is unknown" in capsys.readouterr().err
