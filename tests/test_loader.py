"""Token loaders: every row once an epoch, the same order anywhere, and the right tokens behind each row."""

import tarfile
from itertools import chain

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.pipeline.shards import Block, ShardSpec, write_shards
from semdict.pipeline.shards.convert import export_tokens
from semdict.train.data.resident import ResidentLoader, TokenTable, table_from_shards
from semdict.train.data.streaming import StreamingLoader, find_blocks, read_about
from semdict.train.data.token_set import recipe_of

ROWS, VIEWS, LENGTH, BAD = 90, 3, 4, (0, 7, 88)


def tokens(offset: int = 0, dtype: type = np.uint16) -> np.ndarray:
    """(ROWS, VIEWS, LENGTH): an id says which row, view and cell it belongs to."""
    return (np.arange(ROWS * VIEWS * LENGTH) + offset).reshape(ROWS, VIEWS, LENGTH).astype(dtype)


def table(rows: int = ROWS) -> TokenTable:
    status = np.zeros(rows, np.uint8)
    status[[row for row in BAD if row < rows]] = 1
    return TokenTable.of(tokens()[:rows], tokens(7)[:rows], np.arange(rows, dtype=np.int32), status)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A shard directory of the same tokens: rows 0..79 train, the rest val; and its tars of 8 rows a block."""
    folder = tmp_path_factory.mktemp("shards")
    status, split = np.zeros(ROWS, np.uint8), ["train"] * 80 + ["val"] * 10
    status[list(BAD)] = 1
    gen, disc = tokens(), tokens(7)
    gen[list(BAD)] = disc[list(BAD)] = 65535
    spec = ShardSpec(ROWS, [{"name": str(v)} for v in range(VIEWS)], (2, 2), 2000, 2000, {"crop": "c"}, "f")
    names = {"key": [f"k{n}" for n in range(ROWS)], "split": split}
    index = pa.table({**names, "label_name": [""] * ROWS, "reason": [""] * ROWS})
    write_shards(folder / "set", spec, [Block(gen, disc, np.arange(ROWS, dtype=np.int32), status)], index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semdict.pipeline.shards.layouts.webdataset.BLOCK_ROWS", 8)
        patch.setattr("semdict.pipeline.shards.layouts.webdataset.TAR_ROWS", 24)
        export_tokens(folder / "set", folder / "tars", "webdataset")
    return folder


def epoch_of(loader, steps: int | None = None) -> list[dict]:
    return [next(loader) for _ in range(loader.steps_per_epoch if steps is None else steps)]


def rows_of(batches: list[dict]) -> list[int]:
    return [int(row) for batch in batches for row in batch["row"]]


def check_content(batch: dict) -> None:
    """Ids are those of the named rows, all cells of one view, gen and disc of the same view."""
    assert batch["gen"].dtype == batch["disc"].dtype == batch["row"].dtype == torch.int64
    view = batch["gen"][:, 0] // LENGTH - batch["row"] * VIEWS
    assert ((view >= 0) & (view < VIEWS)).all()
    assert torch.equal(batch["gen"], (batch["gen"][:, :1] + torch.arange(LENGTH)))
    assert torch.equal(batch["disc"], batch["gen"] + 7) and torch.equal(batch["label"], batch["row"])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(1, 8), (2, 8), (3, 12), (4, 12)]), st.integers(0, 3), st.integers(0, 2))
def test_ranks_share_an_epoch_without_overlap(shape, seed, epoch):
    world, batch = shape
    ranks = [ResidentLoader(table(), batch, seed, rank, world) for rank in range(world)]
    for _ in range(epoch):
        for loader in ranks:
            epoch_of(loader)
    one = ResidentLoader(table(), batch, seed)
    one.load_state_dict(ranks[0].state_dict())
    for _ in range(one.steps_per_epoch):
        whole = next(one)
        parts = [next(loader) for loader in ranks]
        for name, values in whole.items():
            assert torch.equal(values, torch.cat([part[name] for part in parts]))
        check_content(whole)
    found = rows_of(epoch_of(ResidentLoader(table(), batch, seed)))
    assert len(set(found)) == len(found) == 87 // batch * batch and not set(found) & set(BAD)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16])
def test_ids_keep_their_value_in_every_type(dtype):
    top = {np.uint8: 255, np.int16: 32767, np.uint16: 65534}[dtype]
    loader = ResidentLoader(TokenTable.of(np.full((4, 1, 2), top, dtype)), 4, 0)
    batch = next(loader)
    assert batch["gen"].tolist() == [[top, top]] * 4 and batch["disc"] is None and batch["label"] is None


def test_epochs_differ_and_every_view_comes():
    loader = ResidentLoader(table(), 8, 0)
    epochs = [epoch_of(loader) for _ in range(12)]
    assert len({tuple(rows_of(epoch)) for epoch in epochs}) == 12
    seen: dict[int, set[int]] = {}
    for batch in (b for epoch in epochs for b in epoch):
        for row, first in zip(batch["row"].tolist(), batch["gen"][:, 0].tolist(), strict=True):
            seen.setdefault(row, set()).add(first // LENGTH - row * VIEWS)
    assert set(seen) == set(range(ROWS)) - set(BAD)  # what one epoch leaves out, others bring
    assert np.mean([len(views) for views in seen.values()]) > 2.8


@pytest.mark.parametrize("steps", [0, 5, 10, 11, 23])
def test_position_can_be_restored(steps):
    """Also exactly at the end of an epoch (10 steps): none is skipped or repeated."""
    loader, other = ResidentLoader(table(), 8, 4), ResidentLoader(table(), 8, 4)
    assert loader.steps_per_epoch == 10
    epoch_of(loader, steps)
    other.load_state_dict(loader.state_dict())
    assert other.epoch == loader.epoch == steps // 10
    assert rows_of(epoch_of(loader, 15)) == rows_of(epoch_of(other, 15))


@pytest.mark.parametrize(
    "other",
    [
        lambda: ResidentLoader(table(), 8, 5),
        lambda: ResidentLoader(table(), 4, 4),
        lambda: ResidentLoader(table(60), 8, 4),
        lambda: ResidentLoader(TokenTable.of(tokens(), recipe="another"), 8, 4),
    ],
)
def test_a_position_in_something_else_is_refused(other):
    state = ResidentLoader(table(), 8, 4).state_dict()
    with pytest.raises(ShardError, match="the checkpoint's loader has"):
        other().load_state_dict(state)


def test_impossible_batches_are_refused():
    with pytest.raises(UsageError, match="shared evenly by 3"):
        ResidentLoader(table(), 8, 0, 0, 3)
    with pytest.raises(UsageError, match="larger than the token set"):
        ResidentLoader(table(), 88, 0)
    with pytest.raises(ShardError, match="all 4 have a bad status"):
        TokenTable.of(tokens()[:4], status=np.ones(4, np.uint8))
    with pytest.raises(ShardError, match="not of the same images"):
        TokenTable.of(tokens(), tokens()[:5])


def test_a_table_from_shards(shards):
    found = table_from_shards(shards / "set", ["train"])
    assert found.left_out == 2 and sorted(found.row) == sorted(set(range(80)) - set(BAD))
    for batch in epoch_of(ResidentLoader(found, 8, 0)):
        check_content(batch)
    both = table_from_shards(shards / "set", ["val", "train"])
    assert both.left_out == 3 and set(both.row) == set(range(ROWS)) - set(BAD)
    check_content(next(ResidentLoader(both, 87, 0)))
    with pytest.raises(ShardError, match="no split 'test'"):
        table_from_shards(shards / "set", ["test"])


def test_a_recipe_names_what_the_tokens_are(shards):
    meta = read_about(shards / "tars")
    assert recipe_of(meta) == table_from_shards(shards / "set").recipe
    assert recipe_of({**meta, "title": "renamed"}) == recipe_of(meta)
    assert recipe_of({**meta, "recipe": {"crop": "d"}}) != recipe_of(meta) != recipe_of({**meta, "fingerprint": "g"})


def streamed(batch: dict) -> dict:
    """Streamed rows are numbered in the order of the export: 78 good rows of train, without rows 0 and 7."""
    good = torch.tensor([row for row in range(80) if row not in BAD])
    return {**batch, "row": good[batch["row"]]}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_streaming_ranks_share_an_epoch_without_overlap(shards, world):
    loaders = [StreamingLoader(shards / "tars", ["train"], 6, 1, r, world, window=2) for r in range(world)]
    epochs = []
    for _ in range(3):
        batches = [streamed(batch) for loader in loaders for batch in epoch_of(loader)]
        for batch in batches:
            check_content(batch)
        epochs.append(rows_of(batches))
        assert len(set(epochs[-1])) == len(epochs[-1]) >= 78 - 8 * world and not set(epochs[-1]) & set(BAD)
    assert epochs[0] != epochs[1] != epochs[2] and len(set(chain(*epochs))) == 78


def test_streaming_shuffles_across_blocks(shards):
    loader = StreamingLoader(shards / "tars", ["train"], 16, 1, window=4)
    blocks = [len(set((batch["row"] // 8).tolist())) for batch in epoch_of(loader)]
    assert min(blocks) >= 3  # were rows only shuffled within a block, a batch of 16 would hold two or three


@pytest.mark.parametrize("steps", [0, 7, 13, 20])
def test_streaming_position_can_be_restored(shards, steps):
    loaders = [StreamingLoader(shards / "tars", ["train"], 6, 1, 1, 2, window=2) for _ in range(2)]
    epoch_of(loaders[0], steps)
    loaders[1].load_state_dict(loaders[0].state_dict())
    a, b = (epoch_of(loader, 16) for loader in loaders)
    assert all(torch.equal(x["gen"], y["gen"]) for x, y in zip(a, b, strict=True))
    with pytest.raises(ShardError, match="processes 2, this run has processes 1"):
        StreamingLoader(shards / "tars", ["train"], 6, 1, window=2).load_state_dict(loaders[0].state_dict())


def test_streaming_refuses_what_it_cannot_share_or_read(shards, tmp_path):
    with pytest.raises(UsageError, match=r"2 blocks, 9 rows are too few for 4 processes"):
        StreamingLoader(shards / "tars", ["val"], 4, 0, 0, 4)
    with pytest.raises(ShardError, match="no split 'test'"):
        StreamingLoader(shards / "tars", ["test"], 4, 0)
    with pytest.raises(ShardError, match=r"dataset.json does not exist"):
        StreamingLoader(tmp_path, ["train"], 4, 0)
    export_tokens(shards / "set", tmp_path / "single", "webdataset", per_sample=True)
    with pytest.raises(ShardError, match="without --per-sample"):
        StreamingLoader(tmp_path / "single", ["train"], 4, 0)


def test_streaming_refuses_a_pickle_and_foreign_ids(shards, tmp_path):
    """A tar that someone else made: an object array is not unpickled, an id beyond the codebook is named."""
    for name in ("dataset.json", *(t for t in read_about(shards / "tars")["tars"]["train"])):
        (tmp_path / name).write_bytes((shards / "tars" / name).read_bytes())
    first = find_blocks(shards / "tars", read_about(shards / "tars"), ["train"])[0]
    path = tmp_path / first.tar.name
    offset, size = first.columns["gen"]
    data = bytearray(path.read_bytes())
    data[offset + size - 2 : offset + size] = (2000).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"train-000000.gen.npy holds id 2000, its codebook has 2000"):
        epoch_of(StreamingLoader(tmp_path, ["train"], 6, 0))
    data[offset : offset + size] = bytes(data[offset : offset + size]).replace(b"'<u2'", b"'|O' ")
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"train-000000.gen.npy is not a plain array"):
        epoch_of(StreamingLoader(tmp_path, ["train"], 6, 0))
    path.write_bytes(data[:700])
    with pytest.raises(ShardError, match=r"train-000000.tar cannot be read"):
        StreamingLoader(tmp_path, ["train"], 6, 0)
    assert tarfile.is_tarfile(shards / "tars" / "train-000000.tar")
