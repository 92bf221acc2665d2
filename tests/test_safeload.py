"""Files of others are data: nothing in them runs, harmless leftovers of training are tolerated."""

import argparse
import io
import pickle
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.safeload import load_array, load_checkpoint, load_tensors


class Bomb:
    """Unpickled carelessly, it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


class EvalBomb(Bomb):
    def __reduce__(self):
        return (eval, (f"open({str(self.mark)!r}, 'w')",))


@pytest.mark.parametrize("bomb", [Bomb, EvalBomb])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "inside namespace", "beside tensors"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, form, bomb):
    mark, path = tmp_path / "executed", tmp_path / "x.pth"
    evil = bomb(mark)
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"model": evil}))
    else:
        value = {"model": evil}
        if form == "inside namespace":
            value = {"model": {"w": torch.zeros(1)}, "args": argparse.Namespace(out=evil)}
        if form == "beside tensors":
            value = {"model": {"w": torch.zeros(1)}, "extra": [evil]}
        torch.save(value, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(WeightsError, match=r"x\.pth"):
        load_checkpoint(path)
    assert not mark.exists(), "code in the file was executed"
    pickle.loads(pickle.dumps(evil))
    assert mark.exists(), "this bomb proves nothing"


def test_the_refusal_says_what_and_the_way_out(tmp_path):
    torch.save({"model": EvalBomb(tmp_path / "executed")}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=r"nothing in it was executed.*eval.*state dict alone"):
        load_checkpoint(tmp_path / "x.pt")


def test_an_allowed_module_is_no_door_to_what_it_imports(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"cargparse\n_sys\n.")
        archive.writestr("archive/version", "3\n")
    with pytest.raises(WeightsError, match=r"argparse\._sys"):
        load_checkpoint(tmp_path / "x.pth")


def test_harmless_leftovers_load(tmp_path):
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


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "teacher"])
def test_state_dicts_are_found(tmp_path, wrap):
    tensors = {"module.a": torch.zeros(2), "module.b": torch.ones(1)}
    torch.save({wrap: tensors, "epoch": 1} if wrap else tensors, tmp_path / "x.pth")
    assert set(load_tensors(tmp_path / "x.pth")) == {"a", "b"}


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
    np.save(tmp_path / "o.npy", np.array([EvalBomb(mark)], dtype=object), allow_pickle=True)
    (tmp_path / "p.npy").write_bytes(pickle.dumps(EvalBomb(mark)))
    np.savez(tmp_path / "z.npz", a=np.zeros(2))
    for name in ("o.npy", "p.npy", "z.npz"):
        for mmap in (False, True):
            with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
                load_array(tmp_path / name, mmap=mmap)
    assert not mark.exists()
