"""`semdict preset NAME`: the preset in force, yours kept, folders made; a wrong one changes nothing."""

import shutil
from pathlib import Path

import pytest
import yaml

from semdict.cli import main
from semdict.pipeline.common.errors import ParamsError
from semdict.pipeline.common.publish import occupied
from semdict.pipeline.config.params import load_params
from semdict.pipeline.config.presets import put_in_force, watched_folders

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the presets, the graph and a params.yaml of the user's own, not under DVC."""
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    shutil.copy2(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    (tmp_path / "params.yaml").write_text("preset: mine\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_unknown_name_lists_the_presets_and_changes_nothing(here, capsys):
    assert main(["preset", "in1"]) == 2
    assert "no preset 'in1'; there are: demo, in1k, in1k-vcq-base, in1k-vcq-large" in capsys.readouterr().err
    assert (here / "params.yaml").read_text() == "preset: mine\n"
    assert not (here / "params.yaml.before").exists()


def test_a_wrong_preset_is_refused_before_anything_changes(here, capsys):
    tree = yaml.safe_load((here / "presets" / "in1k.yaml").read_text())
    tree["kmeans"]["kk"] = 3
    (here / "presets" / "in1k.yaml").write_text(yaml.safe_dump(tree))
    assert main(["preset", "in1k"]) == 2
    assert "presets/in1k.yaml" in (told := capsys.readouterr().err)
    assert "kk" in told
    assert (here / "params.yaml").read_text() == "preset: mine\n"


def test_yours_is_kept_and_the_same_preset_again_keeps_it(here):
    params, source = here / "params.yaml", here / "presets" / "demo.yaml"
    put_in_force(source, params)
    put_in_force(source, params)
    assert params.read_bytes() == source.read_bytes()
    assert (here / "params.yaml.before").read_text() == "preset: mine\n"


def test_outside_a_project_it_says_so(here, capsys):
    (here / "dvc.yaml").unlink()
    assert main(["preset", "in1k"]) == 2
    assert "has no dvc.yaml; run it in the project's folder" in capsys.readouterr().err
    assert (here / "params.yaml").read_text() == "preset: mine\n"


def test_without_dvc_the_folders_are_what_is_missing(here, capsys):
    assert main(["preset", "in1k"]) == 2
    assert "not inside of a DVC repository" in capsys.readouterr().err


def test_a_folder_is_made_for_files_that_the_user_brings(here):
    folders = watched_folders(load_params(here / "presets" / "in1k.yaml"))
    assert folders == [Path("weights/vqgan"), Path("weights/perceptual")]
    assert watched_folders(load_params(here / "presets" / "demo.yaml")) == [], "files that another pipeline makes"


@pytest.mark.parametrize(
    ("watched", "good"),
    [("w/a/vqgan.ckpt", True), ("w/a", True), ("w", True), ("w/b", False), (".", False), ("presets/none", False)],
)
def test_dvc_watches_the_file_or_a_folder_around_it(here, watched, good):
    change = ["vqgan.weights=w/a/vqgan.ckpt", f"inputs.vqgan={watched}"]
    if good:
        assert load_params(here / "presets" / "in1k.yaml", change).inputs.vqgan == watched
        return
    with pytest.raises(ParamsError, match=r"set inputs.vqgan: w/a/vqgan.ckpt, or a folder around it"):
        load_params(here / "presets" / "in1k.yaml", change)


def test_an_empty_folder_is_nothing_and_all_else_is_something(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full" / "inner").mkdir(parents=True)
    found = {name: occupied(tmp_path / name) for name in ("missing", "empty", "file", "full")}
    assert found == {"missing": False, "empty": False, "file": True, "full": True}
