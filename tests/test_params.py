"""params.yaml is checked before any work: complete, bounded, one YAML dialect; every mistake is named with its mend."""

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from semdict.cli import main
from semdict.pipeline.common.errors import ParamsError
from semdict.pipeline.config.params import load_params
from semdict.pipeline.config.schema import Params
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tree() -> dict:
    return tiny.preset("demo")


def write(tmp_path: Path, tree: dict) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def one_line(error: ParamsError) -> str:
    """The message, which must be short and of one line."""
    text = str(error)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_params_yaml_of_the_repository_is_valid():
    assert load_params(ROOT / "params.yaml").preset == "demo"


@pytest.mark.parametrize(
    ("section", "wrong", "near"),
    [
        ("kmeans", "itertions", "kmeans.iterations"),
        ("encode", "batch_size", "encode.batch"),
        ("evaluate", "fine_tune", "evaluate.finetune"),  # the measure is called fine-tune
        (None, "kmean", "kmeans"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path, tree, section, wrong, near):
    (tree[section] if section else tree)[wrong] = 1
    with pytest.raises(ParamsError, match=rf"{wrong} is unknown; did you mean {near}\?"):
        load_params(write(tmp_path, tree))


def test_a_missing_key_is_refused_with_the_command_that_adds_it(tmp_path, tree):
    del tree["pretrain"]["lease"]["tau"]
    with pytest.raises(ParamsError, match=r"pretrain\.lease\.tau is missing; `semdict preset --complete`"):
        load_params(write(tmp_path, tree))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kmeans.k", "many"),
        ("kmeans.k", "256.5"),
        ("kmeans.k", "1"),
        ("encode.views", "[sideways]"),
        ("runtime.scheduler", "localhost"),
        ("manifest.images", "{}"),
        ("manifest.max_bad_fraction", "1.5"),
        ("shards.shard_rows", "5000"),
        ("kmeans.centroids", "km.npy"),
        ("pretrain.seed", "1" + "0" * 23),
        ("pretrain.epochs", "1" + "0" * 22),
        ("pretrain.base_lr", ".inf"),
        ("pretrain.base_lr", ".nan"),
        ("pretrain.base_lr", "-.inf"),
        ("vcq.perceptual", "[{kind: features, weights: w.pth}]"),
    ],
)
def test_a_wrong_value_is_refused_by_name(tmp_path, tree, key, value):
    section = key.split(".")[0]
    with pytest.raises(ParamsError, match=section if section != "kmeans" else "kmeans|inputs") as caught:
        load_params(write(tmp_path, tree), [f"{key}={value}"])
    one_line(caught.value)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-05", 1e-05), ("1e-5", 1e-5), ("1.0E-05", 1e-05), (".5", 0.5), ("2", 2.0)]
)
def test_numbers_are_read_as_dvc_writes_them(tmp_path, tree, text, value):
    """`dvc exp run -S pretrain.base_lr=0.00001` writes 1e-05, which YAML 1.1 reads as text."""
    assert load_params(write(tmp_path, tree), [f"pretrain.base_lr={text}"]).pretrain.base_lr == value


def test_yaml_is_that_of_version_1_2(tmp_path, tree):
    path = write(tmp_path, tree)
    assert load_params(path, ["kmeans.k=010"]).kmeans.k == 10, "not octal"
    assert load_params(path, ["pretrain.splits=[no, on]"]).pretrain.splits == ["no", "on"], "not booleans"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("preset: a\npreset: b\n", "duplicate key"),
        ("preset: !!int abc\n", "tags"),
        ("preset: !!python/object:os.system x\n", "tags"),
        (
            "a: &a [1, 1, 1]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefgh")),
            "aliases expand",
        ),
        ("a: &a [*a]\n", "aliases expand"),
        ("preset: 2001-99-99\n", "month must be"),
        ("a: " + "[" * 5000, "nested deeper"),
        ("a: [1\n", "not valid YAML"),
        ("", "must contain sections"),
        ("- a\n- b\n", "must contain sections"),
        ("\x00", "not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_parameters_is_refused_in_one_line(tmp_path, text, problem):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError, match=problem) as caught:
        load_params(path)
    assert "params.yaml" in one_line(caught.value)


@pytest.mark.parametrize("data", [b"preset: caf\xe9\n", "preset: a\n".encode("utf-16"), b"a: b\n" * (1 << 19)])
def test_bytes_that_are_no_text_and_huge_files_are_refused(tmp_path, data):
    path = tmp_path / "params.yaml"
    path.write_bytes(data)
    with pytest.raises(ParamsError, match=r"UTF-8|larger than") as caught:
        load_params(path)
    one_line(caught.value)


@pytest.mark.parametrize("override", ["kmeans.k=[", "kmeans.k", "=3", "kmeans..k=3", "kmeans.k.x=3", "preset.x=1"])
def test_an_override_that_cannot_be_read_is_refused_in_one_line(tmp_path, tree, override):
    with pytest.raises(ParamsError) as caught:
        load_params(write(tmp_path, tree), [override])
    assert "--set" in one_line(caught.value)


def test_a_long_value_is_not_repeated_in_full(tmp_path, tree):
    with pytest.raises(ParamsError) as caught:
        load_params(write(tmp_path, tree), [f"kmeans.k={'x' * 100_000}"])
    one_line(caught.value)


def test_a_rule_over_several_keys_says_what_to_set_and_no_more(tmp_path, tree):
    with pytest.raises(ParamsError) as caught:
        load_params(write(tmp_path, tree), ["kmeans.centroids=km.npy"])
    assert str(caught.value).endswith("params.yaml: inputs.centroids is weights/README.md, kmeans.centroids is km.npy: "
                                      "set inputs.centroids: km.npy, or a folder around it")  # fmt: skip
    with pytest.raises(ParamsError) as caught:
        load_params(write(tmp_path, tree), ["shards.shard_rows=5000", "shards.chunk_rows=4096"])
    assert str(caught.value).endswith("params.yaml: shards: shard_rows 5000 is not a multiple of chunk_rows 4096")


def test_an_override_changes_one_value_and_nothing_else(tmp_path, tree):
    plain, changed = load_params(write(tmp_path, tree)), load_params(write(tmp_path, tree), ["kmeans.k=300"])
    assert changed.kmeans.k == 300
    assert changed.model_dump(exclude={"kmeans"}) == plain.model_dump(exclude={"kmeans"})


def test_every_mistake_is_named_at_once(tmp_path, tree):
    tree["kmeans"]["kk"] = 1
    tree["encode"]["batch"] = 0
    with pytest.raises(ParamsError) as caught:
        load_params(write(tmp_path, tree))
    assert "kmeans.kk" in str(caught.value)
    assert "encode.batch" in str(caught.value)


def test_check_accepts_the_file_and_refuses_a_changed_key(tmp_path, tree, capsys):
    path = write(tmp_path, tree)
    assert main(["check", "--params", str(path)]) == 0
    assert "preset demo is valid" in capsys.readouterr().out
    assert main(["check", "--params", str(path), "--set", "kmeans.kk=3"]) == 2
    assert "did you mean kmeans.k?" in capsys.readouterr().err


def numbers(schema: dict, definitions: dict, path: str = ""):
    """(dotted key, JSON schema) of every number that a JSON schema describes."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[1]]
    for option in schema.get("anyOf", []):
        yield from numbers(option, definitions, path)
    if schema.get("type") in ("integer", "number"):
        yield path, schema
    for name, part in schema.get("properties", {}).items():
        yield from numbers(part, definitions, f"{path}.{name}")
    for part in [schema.get("items"), schema.get("additionalProperties")]:
        if isinstance(part, dict):
            yield from numbers(part, definitions, f"{path}[]")


def test_every_number_has_bounds():
    schema = Params.model_json_schema()
    described = list(numbers(schema, schema["$defs"]))
    assert len(described) > 150
    for path, number in described:
        assert {"minimum", "exclusiveMinimum"} & number.keys(), path
        assert {"maximum", "exclusiveMaximum"} & number.keys(), path


def test_the_schema_has_no_defaults_but_in_entries_that_users_add():
    def defaults(model, path=()):
        for name, field in model.model_fields.items():
            if not field.is_required():
                yield ".".join([*path, name])
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                yield from defaults(field.annotation, [*path, name])

    assert list(defaults(Params)) == []


@pytest.mark.parametrize(
    ("objectives", "conditioned", "message"),
    [
        (["lease", "sorce"], [], "objectives has 'sorce'; did you mean 'sorcen'"),
        (["mage", "mage"], [], "objectives names an objective twice: mage, mage"),
        (["lease"], ["mage"], "conditioned has 'mage'; known: lease"),
        ([], [], "objectives"),
    ],
)
def test_dvc_repro_trains_known_objectives_once_and_conditions_those(objectives, conditioned, message):
    tree = load_params(ROOT / "params.yaml").model_dump(by_alias=True)
    Params.model_validate(tree | {"objectives": ["lease", "mage"], "conditioned": ["lease"]})
    with pytest.raises(ValueError, match=message):
        Params.model_validate(tree | {"objectives": objectives, "conditioned": conditioned})
