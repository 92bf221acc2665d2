"""The command line: fast help, exit codes, no traceback for a user's mistake."""

import subprocess
import sys

import pytest

from semdict.cli import COMMANDS

HEAVY = ("torch", "zarr", "pyarrow", "dask", "numpy", "faiss", "pydantic")


def semdict(*args: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "semdict", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def test_help_lists_every_command_and_imports_nothing_heavy():
    script = (
        "import sys\nfrom semdict.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(command):
    done = semdict(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"semdict {command}" in done.stdout
    assert "example" in done.stdout


def test_unknown_command_is_wrong_usage():
    done = semdict("enocde")
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


def test_a_users_mistake_is_one_line_and_exit_2(tmp_path):
    done = semdict("check", "--params", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert "none.yaml does not exist" in done.stderr
    assert "Traceback" not in done.stderr
