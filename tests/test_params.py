"""params.yaml is checked before any work: every preset is valid, every mistake is named with its mend."""

from pathlib import Path

import pytest
import yaml

from semdict.cli import main
from semdict.pipeline.common.errors import ParamsError
from semdict.pipeline.config.params import load_params

ROOT = Path(__file__).resolve().parent.parent
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


@pytest.fixture
def tree() -> dict:
    return yaml.safe_load((ROOT / "presets" / "demo.yaml").read_text())


def write(tmp_path: Path, tree: dict) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_preset_is_complete_and_named_like_its_file(path):
    assert load_params(path).preset == path.stem


def test_params_yaml_is_the_demo_preset():
    assert (ROOT / "params.yaml").read_text() == (ROOT / "presets" / "demo.yaml").read_text()


@pytest.mark.parametrize(
    ("section", "wrong", "near"),
    [("kmeans", "itertions", "kmeans.iterations"), ("encode", "batch_size", "encode.batch"), (None, "kmean", "kmeans")],
)
def test_unknown_key_is_refused_with_the_nearest_one(tmp_path, tree, section, wrong, near):
    (tree[section] if section else tree)[wrong] = 1
    with pytest.raises(ParamsError, match=rf"{wrong} is unknown; did you mean {near}\?"):
        load_params(write(tmp_path, tree))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kmeans.k", "many"),
        ("kmeans.k", "256.5"),
        ("kmeans.k", "1"),
        ("encode.views", "[sideways]"),
        ("encode.scheduler", "localhost"),
        ("manifest.images", "{}"),
        ("manifest.max_bad_fraction", "1.5"),
        ("shards.shard_rows", "5000"),
        ("kmeans.centroids", "km.npy"),
    ],
)
def test_wrong_value_is_refused_by_name(tmp_path, tree, key, value):
    section = key.split(".")[0]
    with pytest.raises(ParamsError, match=section if section != "kmeans" else "kmeans|inputs"):
        load_params(write(tmp_path, tree), [f"{key}={value}"])


def test_a_rule_over_several_keys_says_what_to_set_and_no_more(tmp_path, tree):
    with pytest.raises(ParamsError) as caught:
        load_params(write(tmp_path, tree), ["kmeans.centroids=km.npy"])
    assert str(caught.value).endswith("params.yaml: inputs.centroids is presets/none, kmeans.centroids is km.npy: set "
                                      "inputs.centroids: km.npy, or a folder around it")  # fmt: skip
    with pytest.raises(ParamsError) as caught:
        load_params(write(tmp_path, tree), ["shards.shard_rows=5000"])
    assert str(caught.value).endswith("params.yaml: shards: shard_rows 5000 is not a multiple of chunk_rows 4096")


def test_override_changes_one_value_and_nothing_else(tmp_path, tree):
    plain, changed = load_params(write(tmp_path, tree)), load_params(write(tmp_path, tree), ["kmeans.k=300"])
    assert changed.kmeans.k == 300
    assert changed.model_dump(exclude={"kmeans"}) == plain.model_dump(exclude={"kmeans"})


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError, match=r"params\.yaml"):
        load_params(path)


def test_every_fault_is_named_at_once(tmp_path, tree):
    tree["kmeans"]["kk"] = 1
    tree["encode"]["batch"] = 0
    with pytest.raises(ParamsError) as caught:
        load_params(write(tmp_path, tree))
    assert "kmeans.kk" in str(caught.value)
    assert "encode.batch" in str(caught.value)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_what_check_shows_is_a_complete_params_file(tmp_path, capsys, path):
    assert main(["check", "--params", str(path), "--show"]) == 0
    shown = tmp_path / "params.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_params(shown) == load_params(path)
    assert yaml.safe_load(shown.read_text())["pretrain"]["lambda"] == load_params(path).pretrain.contrast_weight
