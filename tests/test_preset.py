"""Presets: base and overlays resolve into a complete params.yaml; yours is kept; a wrong preset changes nothing."""

import shutil
from pathlib import Path

import pytest
import yaml

from semdict.cli import main
from semdict.pipeline.common.errors import ParamsError, UsageError
from semdict.pipeline.common.publish import occupied
from semdict.pipeline.config.command import watched_folders, write_params
from semdict.pipeline.config.params import load_params, validate
from semdict.pipeline.config.presets import complete, preset_names, render, resolve
from semdict.pipeline.config.yaml import parse_yaml, read_yaml
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
NAMES = preset_names(ROOT / "presets")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the presets, the graph and a params.yaml of the user's own, not under DVC."""
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    shutil.copy2(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    (tmp_path / "params.yaml").write_text("preset: mine\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_resolves_into_a_complete_valid_file(name):
    """The written text has the values of base and overlay, read by a parser that knows nothing of presets."""
    text, folder = render(name, ROOT / "presets"), ROOT / "presets"
    params = validate(parse_yaml(text, name), name)
    assert params.preset == name
    assert params == validate(resolve(name, folder), name)
    assert yaml.safe_load(text)["pretrain"]["lambda"] == params.pretrain.contrast_weight


def test_params_yaml_of_the_repository_is_the_demo_preset():
    assert (ROOT / "params.yaml").read_text() == render("demo", ROOT / "presets")


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_lines_that_differ_from_the_base_are_marked(name):
    base = tiny.base()
    section, path = None, []
    for line in render(name, ROOT / "presets").splitlines():
        code, _, comment = line.partition(" # ")
        if not code or code.startswith("#"):
            continue
        depth, key = (len(code) - len(code.lstrip())) // 2, code.strip().split(":")[0]
        path = [*path[:depth], key]
        section = base
        for part in path:
            section = section[part]
        value = parse_yaml(code.strip().split(":", 1)[1], "line")
        if not isinstance(section, dict) or value is not None:
            assert (value != section) == comment.startswith(f"[{name}]"), line


def test_every_default_of_the_base_has_a_place_in_the_schema_and_the_other_way_round():
    demo = tiny.preset("demo")
    free = {("manifest", "images"), ("features", "kwargs"), ("evaluate", "knn", "second")}  # keys of the user's own

    def keys(tree, above=()):
        for key, value in tree.items():
            yield (*above, key)
            if isinstance(value, dict) and (*above, key) not in free:
                yield from keys(value, (*above, key))

    dumped = validate(demo, "demo").model_dump(by_alias=True)
    assert list(keys(tiny.base())) == list(keys(dumped)), "the schema has the order of presets/base.yaml"


def test_an_overlay_extends_another_preset():
    base, large = (resolve(name, ROOT / "presets") for name in ("in1k-vcq-base", "in1k-vcq-large"))
    assert (base["pixels"]["crop"], large["pixels"]["crop"]) == ("adm", "adm")
    assert large["ar"] == {**base["ar"], "size": "l", "steps": 500_000, "batch": 2048, "lr": 4e-4, "final_lr": 1e-5,
                           "warmup": 62_500, "hold": 62_500}  # fmt: skip


def test_presets_in_a_circle_and_under_another_name_are_refused(here):
    (here / "presets" / "a.yaml").write_text("preset: a\nextends: b\n")
    (here / "presets" / "b.yaml").write_text("preset: b\nextends: a\n")
    (here / "presets" / "c.yaml").write_text("preset: d\n")
    with pytest.raises(ParamsError, match="circle"):
        resolve("a")
    with pytest.raises(ParamsError, match="must be the file's name"):
        resolve("c")


def test_an_unknown_name_lists_the_presets_and_changes_nothing(here, capsys):
    assert main(["preset", "in1"]) == 2
    assert f"no preset 'in1'; there are: {', '.join(NAMES)}" in capsys.readouterr().err
    assert (here / "params.yaml").read_text() == "preset: mine\n"
    assert not (here / "params.yaml.before").exists()


@pytest.mark.parametrize(("key", "value"), [("kk", 3), ("k", 0)])
def test_a_wrong_preset_is_refused_before_anything_changes(here, capsys, key, value):
    tree = read_yaml(here / "presets" / "in1k.yaml")
    tree["kmeans"] = {key: value}
    (here / "presets" / "in1k.yaml").write_text(yaml.safe_dump(tree))
    assert main(["preset", "in1k"]) == 2
    errors = capsys.readouterr().err
    assert "presets/in1k.yaml" in errors
    assert f"kmeans.{key}" in errors
    assert (here / "params.yaml").read_text() == "preset: mine\n"


def test_yours_is_kept_and_the_same_preset_again_keeps_it(here):
    params, text = here / "params.yaml", render("demo")
    write_params(text, params)
    write_params(text, params)
    assert params.read_text() == text
    assert (here / "params.yaml.before").read_text() == "preset: mine\n"


def test_complete_adds_what_is_missing_and_keeps_every_value(here):
    text = render("demo").replace("  k: 256 ", "  k: 300 ")
    lines = [line for line in text.splitlines() if not line.startswith(("  tau:", "  iterations:"))]
    (here / "params.yaml").write_text("\n".join(line for line in lines if "    tau:" not in line) + "\n")
    with pytest.raises(ParamsError, match=r"kmeans\.iterations is missing"):
        load_params(here / "params.yaml")
    text = complete(here / "params.yaml")
    assert "  k: 300 # [yours]" in text
    (here / "params.yaml").write_text(text)
    params = load_params(here / "params.yaml")
    assert (params.kmeans.k, params.kmeans.iterations, params.pretrain.lease.tau) == (300, 20, 0.1)
    assert params.model_dump(exclude={"kmeans"}) == validate(resolve("demo"), "demo").model_dump(exclude={"kmeans"})


def test_complete_needs_a_known_preset(here):
    with pytest.raises(UsageError, match="preset 'mine' is none of"):
        complete(here / "params.yaml")


def test_outside_a_project_it_says_so(here, capsys):
    (here / "dvc.yaml").unlink()
    assert main(["preset", "in1k"]) == 2
    assert "has no dvc.yaml; run it in the project's folder" in capsys.readouterr().err
    assert (here / "params.yaml").read_text() == "preset: mine\n"


def test_without_dvc_the_folders_are_what_is_missing(here, capsys):
    assert main(["preset", "in1k"]) == 2
    assert "not inside of a DVC repository" in capsys.readouterr().err


def test_a_folder_is_made_for_files_that_the_user_brings(here):
    folders = watched_folders(validate(resolve("in1k"), "in1k"))
    assert folders == [Path("weights/vqgan"), Path("weights/perceptual")]
    assert watched_folders(validate(resolve("demo"), "demo")) == [], "files that another pipeline makes"


@pytest.mark.parametrize(
    ("watched", "good"),
    [("w/a/vqgan.ckpt", True), ("w/a", True), ("w", True), ("w/b", False), (".", False), ("weights/README.md", False)],
)
def test_dvc_watches_the_file_or_a_folder_around_it(here, watched, good):
    (here / "params.yaml").write_text(render("in1k"))
    change = ["vqgan.weights=w/a/vqgan.ckpt", f"inputs.vqgan={watched}"]
    if good:
        assert load_params(here / "params.yaml", change).inputs.vqgan == watched
        return
    with pytest.raises(ParamsError, match=r"set inputs.vqgan: w/a/vqgan.ckpt, or a folder around it"):
        load_params(here / "params.yaml", change)


def test_an_empty_folder_is_nothing_and_all_else_is_something(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full" / "inner").mkdir(parents=True)
    result = {name: occupied(tmp_path / name) for name in ("missing", "empty", "file", "full")}
    assert result == {"missing": False, "empty": False, "file": True, "full": True}
