"""Shared fixtures. Data that is not part of the project is looked for in SEMDICT_SHARED, or in ../shared."""

import os
import signal
from pathlib import Path

import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would the commands they send it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
