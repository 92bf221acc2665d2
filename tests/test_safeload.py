"""Checkpoints and arrays of others: nothing in them runs, tensors are found behind what training left there."""

import argparse
import collections
import datetime
import io
import pickle
import random
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from semdict.pipeline.common.errors import UsageError, WeightsError
from semdict.pipeline.common.safeload import load_array, load_checkpoint, load_tensors
from semdict.train.eval.image_sets import read_npz


class TouchPayload:
    """Unpickled carelessly, it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


class EvalPayload(TouchPayload):
    def __reduce__(self):
        return (eval, (f"open({str(self.mark)!r}, 'w')",))


@pytest.mark.parametrize("kind", [TouchPayload, EvalPayload])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "inside namespace", "beside tensors"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, form, kind):
    mark, path = tmp_path / "executed", tmp_path / "x.pth"
    payload = kind(mark)
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"model": payload}))
    else:
        value = {"model": payload}
        if form == "inside namespace":
            value = {"model": {"w": torch.zeros(1)}, "args": argparse.Namespace(out=payload)}
        if form == "beside tensors":
            value = {"model": {"w": torch.zeros(1)}, "extra": [payload]}
        torch.save(value, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(WeightsError, match=r"x\.pth"):
        load_checkpoint(path)
    assert not mark.exists(), "code in the file was executed"
    pickle.loads(pickle.dumps(payload))
    assert mark.exists(), "the payload does nothing at all"


def test_a_refusal_names_what_it_is_and_the_command_that_converts(tmp_path):
    torch.save({"model": EvalPayload(tmp_path / "executed")}, tmp_path / "x.pt")
    with pytest.raises(
        WeightsError, match=r"nothing in it was executed.*eval.*state dict alone.*torch\.load\(.*x\.pt.*x-tensors\.pt"
    ):
        load_checkpoint(tmp_path / "x.pt")


def test_a_name_that_an_allowed_module_imports_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"cargparse\n_sys\n.")
        archive.writestr("archive/version", "3\n")
    with pytest.raises(WeightsError, match=r"argparse\._sys"):
        load_checkpoint(tmp_path / "x.pth")


def test_arguments_and_numpy_scalars_load(tmp_path):
    args = argparse.Namespace(lr=1e-3, output_dir=Path("runs"), model="mage", nested=argparse.Namespace(seed=0))
    value = {"model": {"w": torch.arange(3.0)}, "args": args, "epoch": 3, "loss": np.float64(0.5), "n": np.int64(4)}
    torch.save(value, tmp_path / "x.pth")
    loaded = load_checkpoint(tmp_path / "x.pth")
    assert loaded["args"].lr == 1e-3 and loaded["args"].nested.seed == 0 and loaded["args"].output_dir == Path("runs")
    assert loaded["loss"] == 0.5 and loaded["n"] == 4
    assert torch.equal(load_tensors(tmp_path / "x.pth")["w"], torch.arange(3.0))


def test_a_lightning_class_as_key_loads_without_lightning(tmp_path, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name, "__qualname__": "ModelCheckpoint"})
    parents = ("pytorch_lightning", "pytorch_lightning.callbacks")
    for part in parents:
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    value = {"state_dict": {"w": torch.ones(2)}, "callbacks": {module.ModelCheckpoint: {"best": torch.tensor(1.0)}}}
    torch.save(value, tmp_path / "last.ckpt")
    for part in (*parents, name):
        monkeypatch.setitem(sys.modules, part, None)  # importing any of them now fails
    assert torch.equal(load_tensors(tmp_path / "last.ckpt")["w"], torch.ones(2))


ENTRIES = [
    None, "state_dict", "model", "ema", "model_ema", "state_dict_ema", "student", "teacher", "module",
    "model_state_dict",
]  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_state_dicts_are_found_under_every_wrapper(tmp_path, entry, prefix):
    tensors = {prefix + "a.weight": torch.zeros(2), prefix + "b.bias": torch.ones(1)}
    torch.save({entry: tensors, "epoch": 1, "optimizer": {"state": {}}} if entry else tensors, tmp_path / "x.pth")
    assert set(load_tensors(tmp_path / "x.pth")) == {"a.weight", "b.bias"}


def test_compiled_parts_and_averaged_modules_lose_their_prefixes(tmp_path):
    tensors = {
        "module.encoder._orig_mod.w": torch.zeros(2),
        "module.loss.w": torch.zeros(1),
        "n_averaged": torch.ones(1),
    }
    torch.save({"model": tensors}, tmp_path / "x.pth")
    assert set(load_tensors(tmp_path / "x.pth")) == {"encoder.w", "loss.w"}
    torch.save({"a": torch.zeros(1), "module.a": torch.zeros(2)}, tmp_path / "y.pth")
    assert set(load_tensors(tmp_path / "y.pth")) == {"a", "module.a"}, "two names became one"


def test_averaged_weights_are_preferred_unless_plain_ones_are_asked_for(tmp_path):
    value = {"model": {"w": torch.zeros(1)}, "ema": {"module": {"w": torch.ones(1)}}, "steps": 3}
    torch.save(value, tmp_path / "x.pt")
    assert load_tensors(tmp_path / "x.pt")["w"] == 1 and load_tensors(tmp_path / "x.pt", ema=False)["w"] == 0
    torch.save({"student": {"w": torch.zeros(1)}, "teacher": {"w": torch.ones(1)}}, tmp_path / "y.pt")
    assert load_tensors(tmp_path / "y.pt")["w"] == 1
    torch.save({"model": {"w": torch.zeros(1)}, "ema": None}, tmp_path / "z.pt")
    assert load_tensors(tmp_path / "z.pt")["w"] == 0


def leftovers() -> dict:
    """What training code leaves beside its tensors, by the libraries themselves."""
    from omegaconf import OmegaConf

    config = OmegaConf.create({"model": {"widths": [1, 2], "lr": 1e-4}, "name": "${model.lr}", "none": None})
    rng = {"numpy": np.random.get_state(), "python": random.getstate(), "torch": torch.get_rng_state()}
    return {
        "hyper_parameters": config,
        "rng_state": rng,
        "generator": np.random.default_rng(3),
        "legacy": np.random.RandomState(3),
        "history": np.arange(5.0),
        "counts": collections.defaultdict(list, a=[1]),
        "recent": collections.deque(maxlen=3),
        "when": datetime.datetime(2024, 1, 2),
    }


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("name", leftovers())
def test_tensors_are_read_past_leftovers_of_training(tmp_path, name, form):
    value = {"state_dict": {"w": torch.arange(3.0)}, name: leftovers()[name]}
    torch.save(value, tmp_path / "x.ckpt", _use_new_zipfile_serialization=form == "zip")
    assert torch.equal(load_tensors(tmp_path / "x.ckpt")["w"], torch.arange(3.0))


def test_a_leftover_that_hides_a_call_is_refused(tmp_path):
    mark = tmp_path / "executed"
    value = {"w": torch.zeros(1), "rng": np.array([EvalPayload(mark)], dtype=object), "numpy": np.random.get_state()}
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="eval"):
        load_tensors(tmp_path / "x.pt")
    assert not mark.exists()


def test_a_zip_that_inflates_is_refused_before_it_is_read(tmp_path):
    torch.save({"w": torch.zeros(8_000_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as source, zipfile.ZipFile(tmp_path / "x.pt", "w") as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "x.pt").stat().st_size < 100_000
    with pytest.raises(WeightsError, match=r"x\.pt.*inflate to 320"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_pickle_that_asks_for_memory_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.")
        archive.writestr("archive/version", "3\n")
    with pytest.raises(WeightsError, match="bytearray"):
        load_checkpoint(tmp_path / "x.pt")
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "y.pt")
    with pytest.raises(WeightsError, match=r"y\.pt: w has shape .*more than the whole file holds"):
        load_tensors(tmp_path / "y.pt")


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path):
    torch.save({"w": torch.arange(10_000.0)}, tmp_path / "x.pt")
    raw = bytearray((tmp_path / "x.pt").read_bytes())
    raw[len(raw) // 2] ^= 4
    (tmp_path / "x.pt").write_bytes(raw)
    with pytest.raises(WeightsError, match=r"x\.pt.*damaged"):
        load_checkpoint(tmp_path / "x.pt")


def test_safetensors_load(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.arange(4)}, tmp_path / "x.safetensors")
    assert torch.equal(load_tensors(tmp_path / "x.safetensors")["a"], torch.arange(4))


def whole_checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(1000.0)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.npy"])
@pytest.mark.parametrize("content", [b"", b"\x80", b"not weights at all", whole_checkpoint()[:2000]])
def test_damaged_files_are_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        (load_array if name.endswith("npy") else load_checkpoint)(path)


def test_missing_file_folder_and_wrong_content(tmp_path):
    for load in (load_checkpoint, load_array):
        with pytest.raises(WeightsError, match="does not exist"):
            load(tmp_path / "none")
        with pytest.raises(WeightsError, match="is a folder"):
            load(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    with pytest.raises(WeightsError, match=r"no tensors.*epoch"):
        load_tensors(tmp_path / "empty.pt")


def test_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6.0).reshape(2, 3))
    assert load_array(tmp_path / "a.npy").shape == (2, 3)
    assert isinstance(load_array(tmp_path / "a.npy", mmap=True), np.memmap)
    mark = tmp_path / "executed"
    np.save(tmp_path / "o.npy", np.array([EvalPayload(mark)], dtype=object), allow_pickle=True)
    (tmp_path / "p.npy").write_bytes(pickle.dumps(EvalPayload(mark)))
    np.savez(tmp_path / "z.npz", a=np.zeros(2))
    for name in ("o.npy", "p.npy", "z.npz"):
        for mmap in (False, True):
            with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
                load_array(tmp_path / name, mmap=mmap)
    assert not mark.exists()


def test_scored_arrays_that_inflate_are_refused_by_their_sizes(tmp_path):
    """71 MB of zeros in a file of about 70 KB are refused; flat images, which compress well too, are read."""
    np.savez_compressed(tmp_path / "bomb.npz", arr_0=np.zeros((1 << 26) + (1 << 22), np.uint8))
    with pytest.raises(UsageError, match=r"bomb\.npz.*would inflate to"):
        read_npz(tmp_path / "bomb.npz", ("arr_0",))
    flat = np.full((8, 64, 64, 3), 7, np.uint8)
    np.savez_compressed(tmp_path / "flat.npz", arr_0=flat)
    np.testing.assert_array_equal(read_npz(tmp_path / "flat.npz", ("arr_0",))["arr_0"], flat)
