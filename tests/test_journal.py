"""The journal of stage commands: one entry per run of a command that makes a result."""

import argparse
import json
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from semdict.journal import STAGES, latest, read_journal, run_recorded
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A preset's reports and a params.yaml; the current folder."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny.params(tmp_path)))
    (tmp_path / "reports/tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments() -> argparse.Namespace:
    return argparse.Namespace(params=Path("params.yaml"), set=[])


def entries(project) -> list[dict]:
    return read_journal(project / "reports/tiny/journal.jsonl")


def test_a_stage_leaves_an_entry_and_passes_its_exit_status_on(project):
    words = ["--objective", "lease", "--resume"]
    assert run_recorded("semdict pretrain", words, arguments(), lambda args: None) == 0
    assert run_recorded("semdict vcq train", [], arguments(), lambda args: 1) == 1
    first, second = entries(project)
    assert first["command"] == "semdict pretrain --objective lease", "--resume changes no result"
    assert (first["exit"], second["command"], second["exit"]) == (0, "semdict vcq train", 1)
    assert "cores" in first["device"]


def test_an_interrupted_stage_leaves_an_entry_too(project):
    def interrupted(args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recorded("semdict encode", [], arguments(), interrupted)
    assert [entry["exit"] for entry in entries(project)] == [1]


def test_other_commands_and_other_places_leave_none(project):
    run_recorded("semdict check", [], arguments(), lambda args: 0)
    run_recorded("semdict shards info", [], argparse.Namespace(dir=Path()), lambda args: 0)
    (project / "reports/tiny").rmdir()
    run_recorded("semdict encode", [], arguments(), lambda args: 0)
    assert not list(project.rglob("journal.jsonl"))


def test_the_commit_and_changes_of_the_repository_are_named(project):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *identity, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "params.yaml")
    git("commit", "-qm", "first")
    run_recorded("semdict encode", [], arguments(), lambda args: 0)
    Path("params.yaml").write_text(Path("params.yaml").read_text() + "# edited\n")
    run_recorded("semdict encode", [], arguments(), lambda args: 0)
    clean, edited = entries(project)
    assert clean["commit"] == edited["commit"] == git("rev-parse", "--short=12", "HEAD")
    assert (clean["changed"], edited["changed"]) == (False, True)


def test_the_last_success_of_each_command_carries_the_time_of_its_attempts():
    def entry(command, seconds, status):
        return {"command": command, "started": "", "seconds": seconds, "exit": status}

    runs = [entry("a", 5.0, 1), entry("a", 2.0, 0), entry("b", 1.0, 0), entry("a", 3.0, 0), entry("c", 9.0, 1)]
    assert [(run["command"], run["seconds"]) for run in latest(runs)] == [("b", 1.0), ("a", 3.0)]
    assert [(run["command"], run["seconds"]) for run in latest(runs[:3])] == [("a", 7.0), ("b", 1.0)]


def test_lines_that_are_no_entry_are_left_out(tmp_path):
    good = {"command": "semdict encode", "started": "", "seconds": 1.0, "exit": 0}
    (tmp_path / "j").write_text(json.dumps(good) + "\n[1]\n{}\nhalf a li")
    assert read_journal(tmp_path / "j") == [good]
    assert read_journal(tmp_path / "none") == []


def test_every_command_of_the_pipeline_is_recorded():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in stages.values():
        for command in [stage["cmd"]] if isinstance(stage["cmd"], str) else stage["cmd"]:
            words = shlex.split(command.replace("${", "").replace("}", ""))
            assert any(" ".join(words).startswith(name) for name in STAGES), command
