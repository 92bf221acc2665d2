"""The Hugging Face hub: files named by their place (`hf-hub:owner/name@revision/file`), and folders that are pushed."""

import os
from pathlib import Path

from semdict.pipeline.common.errors import SemdictError, UsageError, WeightsError

SCHEME = "hf-hub:"


def is_hub_name(name: str | os.PathLike) -> bool:
    """Whether `name` is a place on the hub rather than a path."""
    return str(name).startswith(SCHEME)


def absolute(name: str | os.PathLike) -> str:
    """The name as another process with another working folder can use it: hub names as they are, paths resolved."""
    return str(name) if is_hub_name(name) else str(Path(name).resolve())


def push_folder(folder: Path, repository: str, kind: str, private: bool = False) -> str:
    """Upload a folder as one commit to `owner/name`, which is created if there is none; returns its address.

    kind: "dataset" or "model". UsageError for a malformed name, SemdictError with the hub's answer.
    """
    import re

    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UsageError(f"{repository!r} is no repository of the hub, expected OWNER/NAME")
    api = HfApi()
    try:
        api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, repo_type=kind, commit_message="Upload with semdict")
    except Exception as error:  # of the library or its transport: no login, no right, no network
        first = (str(error).splitlines() or [""])[0][:200]
        raise SemdictError(
            f"{repository} cannot be pushed ({type(error).__name__}: {first}). `hf auth login` stores a token of the "
            "hub; an interrupted upload goes on with the same command"
        ) from None
    return f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repository}"


def local_file(name: str | os.PathLike) -> Path:
    """The path of a file; one on the hub is fetched into huggingface_hub's cache first, where it is not there yet.

    WeightsError when the name is malformed or the file cannot be fetched.
    """
    if not is_hub_name(name):
        return Path(name)
    from huggingface_hub import hf_hub_download

    owner, _, rest = str(name).removeprefix(SCHEME).partition("/")
    repository, _, file = rest.partition("/")
    repository, _, revision = repository.partition("@")
    if not (owner and repository and file):
        raise WeightsError(f"{name} is no file on the hub, expected {SCHEME}owner/name/file")
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file, revision=revision or None))
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise WeightsError(
            f"{name} cannot be fetched ({type(error).__name__}: {first}). Without a network, put the file on this "
            "machine and give its path"
        ) from None
