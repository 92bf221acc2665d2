"""The command line: fast help, examples, exit codes, no traceback for a user's mistake."""

import resource
import subprocess
import sys

import pytest
import torch
from ruamel import yaml

from semdict.cli import COMMANDS, MEMORY_KEYS, Command, load, main
from semdict.pipeline.config.presets import render

HEAVY = ("torch", "zarr", "pyarrow", "dask", "numpy", "faiss", "pydantic", "PIL", "dvc")


def semdict(*args: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "semdict", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def leaves() -> dict[str, Command]:
    """Full name of every command and action -> its entry."""
    commands = {}
    for name, entry in COMMANDS.items():
        if isinstance(entry, Command):
            commands[name] = entry
        else:
            commands |= {f"{name} {action}": command for action, command in entry.actions.items()}
    return commands


def test_help_lists_every_command_and_imports_nothing_heavy():
    script = (
        "import sys\nfrom semdict.cli import load, main\nmain(['--help'])\nmain(['vcq', '--help'])\n"
        f"print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert "example" in done.stdout


def test_help_takes_less_than_a_second_of_processor_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert semdict("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize("name", leaves())
def test_each_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*name.split(), "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: semdict {name}")
    assert f"  semdict {name}" in text[text.index("example") :]
    assert callable(load(leaves()[name]).run)


@pytest.mark.parametrize("group", [name for name, entry in COMMANDS.items() if not isinstance(entry, Command)])
def test_a_group_lists_its_actions_with_examples(group, capsys):
    for words in ([group], [group, "--help"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert all(f"  {action} " in text for action in COMMANDS[group].actions)
        assert f"  semdict {group} " in text[text.index("example") :]


def test_semdict_alone_prints_the_help(capsys):
    assert main([]) == 0
    alone = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == alone


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["enocde"], "unknown command 'enocde'; did you mean 'encode'?"),
        (["vcq", "trian"], "unknown action 'trian'; did you mean 'train'?"),
        (["shards", "inof"], "unknown action 'inof'; did you mean 'info'?"),
        (["evaluate", "fewshot"], "did you mean 'few-shot'?"),
        (["ar", "xyz"], "known: train, sample; see `semdict ar --help`"),
        (["--params"], "unknown command '--params'"),
    ],
)
def test_unknown_names_are_wrong_usage_with_the_nearest_known_one(words, message, capsys):
    assert main(words) == 2
    text = capsys.readouterr()
    assert message in text.err
    assert not text.out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("semdict 0.")


def test_a_users_mistake_is_one_line_and_exit_2(tmp_path):
    done = semdict("check", "--params", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert "none.yaml does not exist" in done.stderr
    assert done.stderr.startswith("semdict check: ")
    assert "Traceback" not in done.stderr


def test_short_names_are_importable_and_the_package_itself_is_light():
    script = (
        f"import sys, semdict\nprint('HEAVY', [m for m in {HEAVY} if m in sys.modules])\n"
        "from semdict import load_features, load_model, load_tokenizer, open_shards\n"
        "print(load_tokenizer.__module__, open_shards.__module__, hasattr(semdict, 'load_nothing'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("HEAVY []\nsemdict.pipeline.tokenizers") and done.stdout.endswith("False\n")


@pytest.mark.parametrize("name", MEMORY_KEYS)
def test_a_full_gpu_is_one_line_that_names_a_key_of_the_presets(name, monkeypatch, capsys):
    words = name.split()[1:]
    module = load(leaves()[" ".join(words)])
    text = "CUDA out of memory. Tried to allocate 28.00 GiB. GPU 0 has a total capacity of 79.11 GiB."

    def run(args):
        raise torch.OutOfMemoryError(text)

    monkeypatch.setattr(module, "add_arguments", lambda parser: None)
    monkeypatch.setattr(module, "run", run)
    assert main(words) == 1
    lines = capsys.readouterr().err.splitlines()
    key = MEMORY_KEYS[name].split()[1]
    assert lines == [f"{name}: CUDA out of memory. Tried to allocate 28.00 GiB; {MEMORY_KEYS[name]} and run it again"]
    section = yaml.YAML(typ="safe").load(render("demo"))
    for part in key.split("."):
        section = section[part]
    assert isinstance(section, int)


def test_other_runtime_errors_are_not_taken_for_a_full_gpu(monkeypatch):
    module = load(leaves()["check"])

    def run(args):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(module, "run", run)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        main(["check"])


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("pretrain --objective lease --lr 0.1", "--set pretrain.base_lr=VALUE"),
        ("pretrain --objective lease --epochs=3", "--set pretrain.epochs=VALUE"),
        ("vcq train --lr 0.1", "--set vcq.lr=VALUE"),
        ("evaluate probe --model x --base-lr 0.1", "--set evaluate.probe.base_lr=VALUE"),
        ("evaluate few-shot --model x --shots 3", "--set evaluate.few_shot.shots=VALUE"),
        ("generate --model x --temperature 3", "--set generate.temperature=VALUE"),
        ("kmeans --k 3", "--set kmeans.k=VALUE"),
        ("pretrain --objective lease --resmue", "did you mean --resume?"),
        ("pretrain --objective lease --zzz", "see `semdict pretrain --help`"),
        ("shards info x --lambda 3", "see `semdict shards info --help`"),
    ],
)
def test_an_option_that_names_a_parameter_is_answered_with_set(words, hint, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    assert hint in capsys.readouterr().err.splitlines()[-1]


def test_completion_knows_every_command_and_its_options(capsys, tmp_path):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    script_path = tmp_path / "semdict.bash"
    script_path.write_text(script)

    def completed(*words: str) -> list[str]:
        """What the shell offers for the last of the words."""
        line = f"COMP_WORDS=(semdict {' '.join(words)}); COMP_CWORD={len(words)}; _shtab_semdict"
        command = f"source {script_path}; {line} 2>/dev/null; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.split()

    assert completed("pret") == ["pretrain"]
    assert completed("evaluate", "few") == ["few-shot"]
    assert completed("pretrain", "--obj") == ["--objective"]


def test_the_bare_command_prints_the_help(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: semdict COMMAND")
