"""`--name`: one word decides the folders of a run, its scores and its samples, for every command."""

import argparse
from pathlib import Path

import pytest

from semdict.cli import COMMANDS, Command, load, main
from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.config.naming import REPORT, RUN, add_name_argument, fill_named_paths, required
from semdict.train.engine import dist
from semdict.train.engine.trainer import Trainer
from tests import tiny

EXPECTED = {  # command -> what `--name lambda-0.3` stands for in preset tiny
    "pretrain --objective lease": {"out": "runs/tiny/lambda-0.3", "reports": "reports/tiny/lambda-0.3"},
    "vqgan train": {"out": "runs/tiny/lambda-0.3", "reports": "reports/tiny/lambda-0.3"},
    "vcq train": {"out": "runs/tiny/lambda-0.3", "reports": "reports/tiny/lambda-0.3"},
    "ar train": {"out": "runs/tiny/lambda-0.3", "reports": "reports/tiny/lambda-0.3"},
    "condition": {
        "model": "runs/tiny/lambda-0.3",
        "out": "runs/tiny/lambda-0.3-conditional",
        "reports": "reports/tiny/lambda-0.3-conditional",
    },
    "generate": {"model": "runs/tiny/lambda-0.3"},
    "evaluate probe": {"model": "runs/tiny/lambda-0.3"},
    "evaluate knn": {"model": "runs/tiny/lambda-0.3"},
    "evaluate few-shot": {"model": "runs/tiny/lambda-0.3"},
    "evaluate fine-tune": {"model": "runs/tiny/lambda-0.3"},
    "evaluate fid": {"samples": "runs/tiny/lambda-0.3-samples"},
    "evaluate nearest": {"samples": "runs/tiny/lambda-0.3-samples"},
    "vcq encode": {
        "tokenizer": "runs/tiny/lambda-0.3",
        "out": "shards/tiny-lambda-0.3",
        "reports": "reports/tiny/lambda-0.3-encode",
    },
    "vcq evaluate": {"tokenizer": "runs/tiny/lambda-0.3", "out": "reports/tiny/lambda-0.3"},
    "ar sample": {"model": "runs/tiny/lambda-0.3", "out": "runs/tiny/lambda-0.3-samples-guided"},
}


def parsed(words: str, *options: str) -> argparse.Namespace:
    """The arguments of a command line, its paths filled in."""
    name, *rest = words.split()
    entry = COMMANDS[name]
    if not isinstance(entry, Command):
        entry, rest = entry.actions[rest[0]], rest[1:]
    parser = argparse.ArgumentParser()
    load(entry).add_arguments(parser)
    args = parser.parse_args([*rest, *options])
    fill_named_paths(args, "tiny")
    return args


@pytest.mark.parametrize("command", EXPECTED)
def test_a_name_decides_every_folder(command):
    args = parsed(command, "--name", "lambda-0.3")
    assert {option: str(getattr(args, option)) for option in EXPECTED[command]} == EXPECTED[command]


def test_every_command_that_makes_or_scores_a_run_takes_a_name():
    commands = {**COMMANDS}
    groups = {f"{group} {name}": c for group in ("evaluate", "vcq", "ar", "vqgan") for name, c in
              commands[group].actions.items()}  # fmt: skip
    single = {name: commands[name] for name in ("pretrain", "condition", "generate")}
    named = {words.split(" --")[0] for words in EXPECTED}
    without = {"evaluate reference", "evaluate umap"}  # images alone; takes the models of a figure
    for name, command in {**groups, **single}.items():
        parser = argparse.ArgumentParser()
        load(command).add_arguments(parser)
        has = any("--name" in action.option_strings for action in parser._actions)
        assert has or name in without, name
        assert name in named or name in without or has


def test_a_path_that_is_given_wins():
    args = parsed("pretrain --objective lease", "--name", "a", "--out", "elsewhere/b")
    assert (str(args.out), str(args.reports)) == ("elsewhere/b", "reports/tiny/a")


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_a_name_is_one_folder(name):
    parser = argparse.ArgumentParser()
    add_name_argument(parser, out=RUN)
    parser.add_argument("--out")
    with pytest.raises(UsageError, match="one folder's name"):
        fill_named_paths(parser.parse_args(["--name", name]), "tiny")
    with pytest.raises(UsageError, match=r"--out is missing: .* --name"):
        required(argparse.Namespace(out=None), "out")


def test_the_report_of_a_run_follows_its_folder(tmp_path, monkeypatch):
    """`--out runs/x/lambda-0.3` alone must not write into the report of another run."""
    monkeypatch.setattr("semdict.train.engine.trainer.code_identity", lambda module: "c0de")
    args = argparse.Namespace(out=Path("runs/tiny/lambda-0.3"), reports=None, work=tmp_path, resume=False)

    class Recipe:
        name, cfg = "toy", None

        def settings(self) -> dict:
            return {}

    class Params:
        preset, runtime = "tiny", None

    trainer = Trainer.for_command(Recipe(), args, Params(), dist.World(0, 1, "cpu"), "lease")
    assert str(trainer.reports) == REPORT.format(preset="tiny", name="lambda-0.3")


def test_a_command_without_name_and_path_asks_for_one(tmp_path, capsys):
    tiny.write_params(tmp_path)
    for words in (["evaluate", "probe"], ["generate"], ["condition"], ["evaluate", "fid"], ["evaluate", "nearest"]):
        assert tiny.semdict(tmp_path, *words) == 2
        assert "is missing: name a path, or the run by --name" in capsys.readouterr().err.splitlines()[-1], words


def test_a_missing_run_is_named(tmp_path, capsys, monkeypatch):
    tiny.write_params(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "probe", "--name", "nothing"]) != 0
    assert "runs/tiny/nothing" in capsys.readouterr().err
