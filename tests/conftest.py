"""Shared fixtures. Data that is not part of the project is looked for in SEMDICT_SHARED, or in ../shared."""

import os
import signal
from pathlib import Path

import pytest

# Children inherit ignored signals: Ctrl-C is ignored where a shell started the tests in the background, SIGHUP under
# nohup. The tests send both to the commands that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SEMDICT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the fixtures computed with the published code."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip(f"no golden fixtures at {folder} (set SEMDICT_SHARED)")
    return folder


@pytest.fixture(scope="session")
def photographs() -> Path:
    """Folder of a small set of real photographs."""
    folder = SHARED / "data" / "imagenet-sample"
    if not folder.is_dir():
        pytest.skip(f"no photographs at {folder} (set SEMDICT_SHARED)")
    return folder
