"""Every trainer: a killed run continues to the same files, but never across changed code, data or settings."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from semdict.cli import main
from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.execute.code_identity import PACKAGES, identity_of, import_closure
from semdict.train.data.resident import ResidentLoader
from semdict.train.engine import dist, trainer
from semdict.train.engine.logging import RunLog
from semdict.train.engine.loop import Phase
from semdict.train.engine.model_file import save_model
from semdict.train.engine.optim import adamw
from semdict.train.engine.trainer import Components, Trainer
from semdict.train.masked.model import MaskedTokenTransformer, model_config
from tests import tiny, toy
from tests.test_pretrain import write_tokens

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"width": 16, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
STEPS = {"batch": 4, "accumulate": 2, "precision": "float32"}
SECTIONS = {
    "pretrain": {**SHAPE, **STEPS, "size": "tiny", "batch": 24, "epochs": 4, "warmup_epochs": 1, "dropout": 0.1,
                 "online_classifier": True,
                 "sorcen": {"projector": [16, 8], "predictor": [8, 8], "echo_warmup_epochs": 2}},
    "condition": {**STEPS, "batch": 24, "epochs": 4, "warmup_epochs": 1, "dropout": 0.1, "held_out": ["train"]},
    "vcq": {**STEPS, "size": "tiny", "patch": 64, "tokens": 16, "encoder": [1, 32, 2], "decoder": [1, 32, 2],
            "steps": 8, "warmup": 2, "hold": 3, "perceptual_weight": 0.0, "discriminator_start": 3,
            "discriminator_ramp": 0, "discriminator_channels": 8, "held_out": [], "measured_images": 4,
            "usage_images": 100, "lecam_weight": 0.001, "reset_patience": 2.0, "reset_protected": 4},
    "ar": {**STEPS, "size": "tiny", "steps": 8, "warmup": 2, "hold": 3, "held_out": ["train"], "nll_images": 7},
    "evaluate": {"train_splits": ["train"], "test_splits": ["train"], "batch": 6,
                 "finetune": {**STEPS, "epochs": 3, "warmup_epochs": 1, "drop_path": 0.1}},
}  # fmt: skip
RUNTIME = {"device": "cpu", "workers": 1, "log_every": 1, "save_every": 2, "tensorboard": False}
COMMANDS = {  # trainer -> words of the command; the folder of its output follows
    "pretrain-lease": ["pretrain", "--objective", "lease", "--shards", "tokens", "--reports", "reports", "--out"],
    "pretrain-sorcen": ["pretrain", "--objective", "sorcen", "--shards", "tokens", "--reports", "reports", "--out"],
    "condition": ["condition", "--model", "base4", "--shards", "tokens", "--reports", "reports", "--out"],
    "vcq-train": ["vcq", "train", "--reports", "reports", "--out"],
    "ar-train": ["ar", "train", "--shards", "tokens", "--reports", "reports", "--out"],
    "finetune": ["evaluate", "fine-tune", "--model", "base16", "--out", "reports", "--run"],
}
CRASH = 6  # step that is not logged; the last checkpoint is of step 4


class Killed(BaseException):
    """Ends a run like a kill: nothing is saved."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Images and their manifest, tokens, a VQGAN, and two untrained encoders in the form of pretrained ones."""
    root = tmp_path_factory.mktemp("trainers")
    tiny.make_world(root, runtime=RUNTIME, **SECTIONS)
    assert tiny.semdict(root, "manifest") == 0
    write_tokens(root / "tokens")
    recipe = {"base4": {"seed": 0}, "base16": None}
    for name, grid, codes in (("base4", 4, 16), ("base16", 16, tiny.CODES)):
        config = model_config("mage", "tiny", codes, grid=grid, **SHAPE)
        save_model(root / name / "model.pt", MaskedTokenTransformer(config), {"token_set": {"recipe": recipe[name]}})
    return root


@pytest.fixture
def folder(world, tmp_path, monkeypatch) -> Path:
    """A copy of the world, which is the current folder."""
    shutil.copytree(world, tmp_path / "world")
    tree = yaml.safe_load((world / "params.yaml").read_text().replace(str(world), str(tmp_path / "world")))
    (tmp_path / "world" / "params.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A copy of the project's code, which stands for the code of the trainers."""
    roots = {name: tmp_path / "code" / name.partition(".")[2] for name in PACKAGES}
    for path in roots.values():
        shutil.copytree(ROOT / path.name, path, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(trainer, "code_identity", lambda module: identity_of(import_closure(module, roots)))
    return tmp_path / "code"


@pytest.fixture
def kill_at(monkeypatch) -> Iterator:
    """A function that makes runs end when they log a step; None lets them be."""
    write, at = RunLog.write, {"step": None}

    def write_or_die(log: RunLog, step: int, *values) -> None:
        if step == at["step"]:
            raise Killed
        write(log, step, *values)

    monkeypatch.setattr(RunLog, "write", write_or_die)
    return lambda step: at.update(step=step)


def published(folder: Path) -> dict[str, bytes | list]:
    """Contents of every file of a run; of log.jsonl all but the speed."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    rows = [json.loads(line) for line in files.pop("log.jsonl").splitlines()]
    return {**files, "log.jsonl": [{**row, "speed": None} for row in rows]}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_run_continues_across_a_comment_but_not_across_code(folder, source, kill_at, capsys, name):
    command = COMMANDS[name]
    assert main([*command, "whole"]) == 0
    kill_at(CRASH)
    with pytest.raises(Killed):
        main([*command, "resumed"])
    first = {path.name for path in Path("work").glob(f"{name}-*")}
    assert len(first) == 1
    layers = source / "train" / "engine" / "optim.py"  # every trainer imports it
    text = layers.read_text()
    layers.write_text(text.replace("eps: float = 1e-8", "eps: float = 1e-7"))
    assert layers.read_text() != text
    capsys.readouterr()
    kill_at(2)
    with pytest.raises(Killed):
        main([*command, "resumed", "--resume"])
    assert f"starting anew; unfinished, of other settings or code: {first.pop()}" in capsys.readouterr().err
    layers.write_text("# a comment\n" + text.replace('"""', '"""Another sentence. ', 1))
    kill_at(None)
    assert main([*command, "resumed", "--resume"]) == 0
    assert "continuing in work" in capsys.readouterr().err
    whole, resumed = published(Path("whole")), published(Path("resumed"))
    assert whole.keys() == resumed.keys() and {"run.json", "log.jsonl"} < whole.keys()
    assert [file for file in whole if whole[file] != resumed[file]] == []
    assert len(whole["log.jsonl"]) >= 8
    layers.write_text(text.replace("eps: float = 1e-8", "eps: float = 1e-7"))
    assert main([*command, "resumed", "--resume"]) == 2  # complete, but by other code
    assert "code: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pretrain-lease", "condition", "ar-train"])
def test_tokens_of_equal_recipe_and_other_content_are_another_run(folder, kill_at, capsys, name):
    """Two sets of the same metadata are exchanged under a killed run."""
    kill_at(CRASH)
    with pytest.raises(Killed):
        main([*COMMANDS[name], "out"])
    write_tokens(folder / "other", seed=0, swap=True)
    shutil.rmtree("tokens")
    Path("other").rename("tokens")
    with pytest.raises(Killed):
        main([*COMMANDS[name], "out", "--resume"])
    assert "starting anew; unfinished, of other settings or code" in capsys.readouterr().err


class ToyRecipe:
    """The bag-of-tokens model of tests/toy.py as a recipe."""

    name, seed, accumulate, precision = "toy", 1, 1, "float32"

    def __init__(self, **settings) -> None:
        self.cfg, self.values = self, settings

    def settings(self) -> dict:
        return self.values

    def loader(self, _trainer: Trainer) -> ResidentLoader:
        return ResidentLoader(toy.table(), 8, 3)

    def build(self, loader: ResidentLoader, _trainer: Trainer) -> Components:
        model = toy.Toy()
        phase = Phase("model", model, toy.objective, adamw(model, (0.9, 0.95), 0.0), lambda step: 0.1)
        return Components([phase], 3, {"model": model})

    def finish(self, components: Components, _loader: ResidentLoader, run: Trainer) -> dict:
        torch.save({}, run.folder / "model.pt")
        return {"parameters": sum(p.numel() for p in components.state["model"].parameters())}


class Runtime:
    compile, save_every, keep, log_every, tensorboard, wandb = False, 0, 2, 1, False, None


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function that runs the toy recipe."""
    monkeypatch.setattr(trainer, "code_identity", lambda module: "c0de")
    world = dist.World(0, 1, torch.device("cpu"))

    def run(resume: bool = False, **settings) -> dict:
        folders = (tmp_path / "out", tmp_path / "reports", tmp_path / "work")
        return Trainer(ToyRecipe(**settings), Runtime(), world, *folders, resume).run()

    return run


def test_a_complete_run_is_published_once(tmp_path, train):
    card = train(lr=1)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"model.pt", "run.json", "log.jsonl"} and not list((tmp_path / "work").glob("toy-*"))
    assert card == json.loads((tmp_path / "out" / "run.json").read_text())
    assert card["settings"] == {"lr": 1, "code": "c0de"} and len(card["files"]["model.pt"]) == 64
    metrics = json.loads((tmp_path / "reports" / "metrics.json").read_text())
    assert metrics == card["metrics"] and metrics["steps"] == 3 and {"loss", "lr"} < metrics["final"].keys()
    before = (tmp_path / "out" / "run.json").stat().st_mtime_ns
    assert train(lr=1, resume=True) == card and (tmp_path / "out" / "run.json").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="already complete"):
        train(lr=1)
    with pytest.raises(UsageError, match="lr: 1 -> 2"):
        train(lr=2, resume=True)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, train):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        train(lr=1)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "x" and not list((tmp_path / "work").glob("toy-*"))


def test_without_resume_an_unfinished_run_starts_anew(tmp_path, train, kill_at):
    for _ in range(2):
        kill_at(3)
        with pytest.raises(Killed):
            train(lr=1)
    kill_at(None)
    assert train(lr=1)["metrics"]["steps"] == 3
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 3


def test_the_closure_of_a_trainer_reaches_what_it_trains():
    for module, imported in {
        "semdict.train.masked.pretrain": "semdict.train.masked.losses",
        "semdict.train.masked.condition": "semdict.train.masked.class_conditional_model",
        "semdict.train.vcq.train": "semdict.train.vcq.quantizer",
        "semdict.train.ar.train": "semdict.train.ar.head",
        "semdict.train.eval.finetune": "semdict.train.data.augment",
    }.items():
        roots = {name: ROOT / name.partition(".")[2] for name in PACKAGES}
        assert imported in import_closure(module, roots)
