"""Progress: redrawn in place on a terminal, whole lines in a file, silent where asked."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from semdict.pipeline.common import progress as module
from semdict.pipeline.common.progress import progress


def test_a_file_gets_a_line_at_the_start_and_at_the_end(capsys):
    with progress(50, "encode") as bar:
        for _ in range(50):
            bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("encode: 0/50 [") and lines[-1].startswith("encode: 50/50 [")
    assert len(lines) == 2 and "img/s" in lines[-1]


def test_a_file_gets_a_line_every_interval(capsys, monkeypatch):
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    with progress(3, "train", unit="step", done=1) as bar:
        bar.set_postfix_str("loss 0.5000", refresh=False)
        bar.update(1)
        bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" [")[0] for line in lines[:3]] == ["train: 1/3", "train: 2/3", "train: 3/3"]
    assert lines[-1].startswith("train: 3/3") and lines[-1].endswith("loss 0.5000]")


def test_quiet_shows_nothing(capsys):
    with progress(2, "encode", quiet=True) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_gets_one_line_that_is_redrawn():
    code = (
        "import time\nfrom semdict.pipeline.common.progress import progress\n"
        "with progress(3, 'encode') as bar:\n    for _ in range(3):\n        time.sleep(0.15)\n        bar.update(1)\n"
    )
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=follower, check=True)
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert shown.count("\n") == 1 and shown.count("\rencode:") >= 3 and "3/3" in shown
