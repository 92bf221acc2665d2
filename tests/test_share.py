"""Sharing token sets: push to a hub, open at an address, read by `datasets`, import back from exported layouts."""

import os
import subprocess
import sys
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from semdict.cli import main
from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.pipeline.shards import NotShardsError, open_shards, verify_shards
from semdict.pipeline.shards.convert import export_tokens, guess_layout, import_tokens
from semdict.pipeline.shards.remote import address_of
from tests.hub_server import serve
from tests.token_sets import good_rows, tree, write_awkward_set


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of fetched sets."""
    monkeypatch.setenv("SEMDICT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def copies(cache: Path) -> list[Path]:
    return sorted((cache / "shards").glob("*"))


def in_process(hub, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Python in a process of its own: huggingface_hub reads the address of the hub when it is imported."""
    variables = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_stand_in"}
    folders = {"HF_HOME": str(folder / "hf"), "SEMDICT_CACHE": str(folder / "cache")}
    environment = {**os.environ, **variables, **folders, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


READ = """
import numpy as np, semdict
shards = semdict.open_shards("hf://datasets/me/tokens")
print(shards.content_sha256)
{datasets}
"""
WITH_DATASETS = """
import datasets
rows = datasets.load_dataset("me/tokens")
features = rows["train"].features
print(features["label"].names, features["gen"].length, features["gen"].feature.dtype)
ids = np.array(rows["train"].with_format("numpy")["disc"][:])
want = shards.disc[:][np.array(rows["train"]["row"][:])][:, 0]
assert np.array_equal(ids, want)
assert rows["train"][0]["label"] in range(-1, 5)
"""


def test_a_pushed_set_opens_from_the_hub_as_shards_and_as_a_dataset(tmp_path):
    path, _, _ = write_awkward_set(tmp_path / "shards" / "mine")
    with serve() as hub:
        push = ("-m", "semdict", "shards", "push", "shards/mine", "me/tokens", "--private")
        run = in_process(hub, tmp_path, *push)
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(f"{hub.address}/datasets/me/tokens: pushed; 9 rows without tokens left out")
        files = hub.repositories["datasets/me/tokens"]
        assert {f"shards/{name}": data for name, data in tree(path).items()}.items() <= files.items(), "byte for byte"
        assert hub.private == {"datasets/me/tokens"}
        card = files["README.md"].decode()
        assert "| `gen` | 40 | 40 | 5." in card and "| train | 34 |" in card and "load_tokenizer" in card
        assert not list((tmp_path / "work").glob("push*"))
        missing = subprocess.run([sys.executable, "-c", "import datasets"], capture_output=True, check=False).returncode
        code = READ.format(datasets="" if missing else WITH_DATASETS)
        run = in_process(hub, tmp_path, "-c", code)
        assert run.returncode == 0, run.stderr
        lines = run.stdout.splitlines()
        assert lines[0] == open_shards(path).content_sha256
        assert missing or lines[1:] == ["['0', '1', '2', '3', '4'] 16 uint16"]


def test_a_hub_that_refuses_is_one_line(tmp_path):
    write_awkward_set(tmp_path / "shards" / "mine")
    with serve() as hub:
        run = in_process(hub, tmp_path, "-c", "import semdict; semdict.open_shards('hf://datasets/me/none')")
        assert "hf://datasets/me/none is not a token shard directory" in run.stderr.splitlines()[-1]
    hub.address = "http://127.0.0.1:9"  # the discard port: nobody listens
    run = in_process(hub, tmp_path, "-m", "semdict", "shards", "push", "shards/mine", "me/tokens")
    assert run.returncode == 1
    assert "me/tokens cannot be pushed" in run.stderr and "Traceback" not in run.stderr


@pytest.fixture
def website(tmp_path):
    """Address of a server of the files below tmp_path/site."""
    (tmp_path / "site").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    SimpleHTTPRequestHandler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_set_opens_from_the_web_once(tmp_path, cache, website):
    pytest.importorskip("aiohttp", reason="fsspec's http needs aiohttp")
    path, block, _ = write_awkward_set(tmp_path / "site" / "s")
    shards = open_shards(f"{website}/s")
    assert np.array_equal(shards.gen[:], block.gen)
    assert tree(shards.path) == tree(path)
    assert shards.path == copies(cache)[0]
    assert open_shards(f"{website}/s").path == shards.path
    assert verify_shards(Path(f"{website}/s")).ok, "also as a Path, which loses a slash"
    (path / "SHA256SUMS").unlink()
    with pytest.raises(NotShardsError, match="it has no SHA256SUMS"):
        open_shards(f"{website}/s")


def test_a_set_opens_inside_an_archive_and_by_a_file_address(tmp_path, cache):
    path, block, _ = write_awkward_set(tmp_path / "s")
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for name, data in tree(path).items():
            archive.writestr(f"inside/{name}", data)
    zipped = open_shards(f"zip://inside::{tmp_path}/s.zip")
    assert np.array_equal(zipped.disc[:], block.disc)
    assert open_shards(f"file://{path}").path == zipped.path, "equal sets are one copy"


def test_an_interrupted_copy_goes_on_and_a_damaged_file_is_named(tmp_path, cache):
    path, block, _ = write_awkward_set(tmp_path / "s")
    damaged = path / "tokens.zarr/gen/c/1/0/0"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ShardError, match=r"tokens\.zarr/gen/c/1/0/0 is not the file that SHA256SUMS lists"):
        open_shards(f"file://{path}")
    (part,) = copies(cache)
    assert part.suffix == ".part" and (part / "index.parquet").exists()
    stamp = (part / "index.parquet").stat().st_mtime_ns
    damaged.write_bytes(whole)
    shards = open_shards(f"file://{path}")
    assert np.array_equal(shards.gen[:], block.gen)
    assert (shards.path / "index.parquet").stat().st_mtime_ns == stamp, "not fetched again"


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "tokens.zarr/../../x", "other/file"])
def test_a_listing_that_leads_elsewhere_is_refused(tmp_path, cache, name):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(ShardError, match="which is no file of a shard directory"):
        open_shards(f"file://{tmp_path}/s")
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_addresses_are_told_from_paths(tmp_path):
    assert address_of("shards/demo") is None and address_of("C:/x") is None
    assert address_of(Path("hf://datasets/me/x")) == "hf://datasets/me/x"
    assert address_of(Path("s3://bucket/x")) == "s3://bucket/x"
    assert address_of(Path("file:///x/y")) == "file:///x/y"
    assert address_of(Path("zip://in::https://host/x.zip")) == "zip://in::https://host/x.zip"
    assert address_of(f"zip://in::{tmp_path}/x.zip") == f"zip://in::{tmp_path}/x.zip"


def test_a_protocol_that_is_not_installed_names_its_package(cache):
    with pytest.raises(UsageError, match="unknown://x/y"):
        open_shards("unknown://x/y")


@pytest.mark.parametrize(("to", "views", "options"), [
    ("hf", 1, {}), ("hf", 2, {"parquet_only": True}), ("webdataset", 1, {}), ("webdataset", 2, {"per_sample": True}),
])  # fmt: skip
def test_exported_sets_are_imported_back(tmp_path, to, views, options):
    path, block, keys = write_awkward_set(tmp_path / "s", views=views)
    export_tokens(path, tmp_path / "out", to, **options)
    assert guess_layout(tmp_path / "out") == to
    assert main(["shards", "import", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    back, original = open_shards(tmp_path / "back"), open_shards(path)
    assert verify_shards(tmp_path / "back").ok
    splits = ("val", "train") if to == "hf" else ("train", "val")  # as the card lists them, as dataset.json does
    rows = np.concatenate([good_rows(block, split) for split in splits])
    for name in ("gen", "disc", "label"):
        assert np.array_equal(getattr(back, name)[:], getattr(block, name)[rows])
    assert back.index["key"].to_pylist() == [keys[row] for row in rows]
    assert back.index["split"].to_pylist() == ["val" if row % 3 == 0 else "train" for row in rows]
    for key in ("recipe", "title", "licence", "source", "views", "codebooks", "fingerprint"):
        assert back.meta[key] == original.meta[key]
    assert (back.centroids is not None) == (to == "hf"), "tars hold no centroids"


def test_position_sizes_survive_the_way_back(tmp_path):
    from tests.token_sets import make_set, write

    spec, block = make_set(rows=20, gen_sizes=list(range(2, 18)), disc_size=None, bad=0)
    write(tmp_path / "s", spec, block)
    for to in ("hf", "webdataset"):
        export_tokens(tmp_path / "s", tmp_path / to, to, **({"licence": "mit"} if to == "hf" else {}))
        import_tokens(tmp_path / to, tmp_path / f"{to}-back")
        back = open_shards(tmp_path / f"{to}-back")
        assert back.gen_sizes.tolist() == list(range(2, 18)) and back.disc is None
        assert np.array_equal(back.gen[:], block.gen)


def test_damaged_exports_are_named(tmp_path):
    path, _, _ = write_awkward_set(tmp_path / "s")
    export_tokens(path, tmp_path / "hf", "hf")
    export_tokens(path, tmp_path / "wds", "webdataset")
    (tmp_path / "hf/semdict.json").write_text("{")
    with pytest.raises(ShardError, match="no folder of tokens for the Hub"):
        import_tokens(tmp_path / "hf", tmp_path / "a")
    tar = next((tmp_path / "wds").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(ShardError, match=r"damaged"):
        import_tokens(tmp_path / "wds", tmp_path / "b")


def test_a_pushed_model_opens_from_the_hub(tmp_path):
    """The tensors of the run, bit for bit, and the scores on the card."""
    import semdict
    from semdict.train.engine.model_file import save_model
    from semdict.train.masked.model import MaskedTokenTransformer
    from tests.test_model import build_model
    from tests.test_model import tiny as tiny_config

    assert MaskedTokenTransformer.KIND == "semdict-pretrained"
    run = tmp_path / "runs/small/lease"
    run.mkdir(parents=True)
    model = build_model(tiny_config("lease")).float()
    save_model(run / "model.pt", model, {"epochs": 1})
    (tmp_path / "reports/small/lease").mkdir(parents=True)
    (tmp_path / "reports/small/lease/probe.json").write_text('{"top1": 61.5, "protocol": []}')
    with serve() as hub:
        push = ("-m", "semdict", "model", "push", "runs/small/lease", "me/lease", "--licence", "MIT")
        done = in_process(hub, tmp_path, *push)
        assert done.returncode == 0, done.stderr
        files = hub.repositories["me/lease"]
        assert "| probe top1 | 61.5 |" in files["README.md"].decode() and "license: mit" in files["README.md"].decode()
        code = "import semdict; print(sum(p.double().sum().item() for p in semdict.load_model({!r}).parameters()))"
        done = in_process(hub, tmp_path, "-c", code.format("hf-hub:me/lease"))
        assert done.returncode == 0, done.stderr
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    back = semdict.load_model(str(tmp_path))
    assert type(back) is type(model)
    state = model.state_dict()
    assert state.keys() == back.state_dict().keys()
    assert all(np.array_equal(tensor, state[name]) for name, tensor in back.state_dict().items())
    assert float(done.stdout) == sum(p.double().sum().item() for p in back.parameters())
