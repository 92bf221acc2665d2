"""Model files: every kind is opened by one function, equal models are equal bytes, a replaced file is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import semdict
from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import sha256_file
from semdict.train.ar.model import ArConfig, ArModel
from semdict.train.engine.model_file import load_model, save_model
from semdict.train.eval.classifier import Classifier
from semdict.train.masked.class_conditional_model import ConditionalConfig, ConditionalTransformer
from semdict.train.masked.model import MaskedTokenTransformer, model_config
from semdict.train.vcq.tokenizer import PRESETS, Tokenizer1d


def masked(seed: int = 0) -> MaskedTokenTransformer:
    return MaskedTokenTransformer(model_config("sorcen", "tiny", 16, grid=4, width=16, depth=1, heads=2), seed)


MODELS = {
    "pretrained": masked,
    "conditional": lambda: ConditionalTransformer(ConditionalConfig(masked().config, 3, 5, 7, 6)),
    "classifier": lambda: Classifier(masked(), 4),
    "tokenizer": lambda: Tokenizer1d(replace(PRESETS["tiny"], schedule="power")),
    "ar": lambda: ArModel(ArConfig(1, 16, 2, (2, 4, 8), 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_is_opened_by_load_model(tmp_path, name):
    model, file = MODELS[name](), tmp_path / ("tokenizer.pt" if name == "tokenizer" else "model.pt")
    save_model(file, model, {"step": 3})
    for path in (tmp_path, file):
        loaded = semdict.load_model(str(path))
        assert type(loaded) is type(model) and loaded.config_dict() == model.config_dict() and not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        state = loaded.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    read, saved = load_model(tmp_path, type(model))
    assert type(read) is type(model) and saved.about == {"step": 3} and saved.sha256 == sha256_file(file)


def test_equal_models_are_equal_bytes(tmp_path):
    about = {"settings": {"betas": (0.9, 0.95), "precision": "float32"}, "model": "float32"}
    save_model(tmp_path / "a" / "model.pt", masked(), about)
    copied = json.loads(json.dumps(about))  # equal values, other objects: pickle writes shared objects once
    save_model(tmp_path / "b" / "other-name.pt", masked(), copied)
    assert (tmp_path / "a" / "model.pt").read_bytes() == (tmp_path / "b" / "other-name.pt").read_bytes()
    save_model(tmp_path / "c.pt", masked(seed=1), about)
    assert (tmp_path / "a" / "model.pt").read_bytes() != (tmp_path / "c.pt").read_bytes()


def write_card(folder: Path, sha256: str) -> None:
    (folder / "run.json").write_text(json.dumps({"files": {"model.pt": sha256}}))


def test_a_file_that_its_run_did_not_publish_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    save_model(path, masked(), {})
    write_card(tmp_path, sha256_file(path))
    load_model(tmp_path, MaskedTokenTransformer)
    save_model(path, masked(seed=1), {})
    with pytest.raises(WeightsError, match=r"model\.pt has SHA-256 .*run\.json beside it lists .*replaced"):
        load_model(tmp_path, MaskedTokenTransformer)
    path.rename(tmp_path / "elsewhere.pt")  # a name that run.json does not list
    load_model(tmp_path / "elsewhere.pt", MaskedTokenTransformer)


def test_one_flipped_bit_is_found_with_and_without_a_run(tmp_path):
    path = tmp_path / "model.pt"
    save_model(path, masked(), {})
    write_card(tmp_path, sha256_file(path))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"model\.pt"):
            load_model(path, MaskedTokenTransformer)
        (tmp_path / "run.json").unlink(missing_ok=True)


def test_other_files_are_named_with_the_command_that_writes_the_right_one(tmp_path):
    save_model(tmp_path / "model.pt", masked(), {})
    torch.save({"weight": torch.zeros(2)}, tmp_path / "plain.pt")
    torch.save({"kind": "semdict-unheard-of"}, tmp_path / "odd.pt")
    torch.save({"kind": ArModel.KIND, "config": {"depth": 1}, "model": {}}, tmp_path / "cut.pt")
    for name, cls, message in [
        ("model.pt", ArModel, "was not written by `semdict ar train`: its kind is 'semdict-pretrained'"),
        ("plain.pt", ArModel, "it has no kind, its entries are"),
        ("cut.pt", ArModel, "does not fit its configuration"),
        ("none.pt", MaskedTokenTransformer, "does not exist"),
    ]:
        with pytest.raises(WeightsError, match=message):
            load_model(tmp_path / name, cls)
    with pytest.raises(WeightsError, match=r"unknown kind 'semdict-unheard-of'; known: semdict-pretrained"):
        semdict.load_model(str(tmp_path / "odd.pt"))


def test_the_table_of_kinds_is_complete():
    classes = {type(make()) for make in MODELS.values()}
    assert {cls.KIND for cls in classes} == set(semdict._MODELS)
    assert all(issubclass(cls, nn.Module) and cls.COMMAND.startswith("semdict ") for cls in classes)
