"""`semdict evaluate` on a small project: its scores equal those of a direct computation."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.pipeline.shards import open_shards
from semdict.pipeline.tokenizers import load_tokenizer
from semdict.train.engine.model_file import load_model
from semdict.train.engine.rng import Stream, permutation
from semdict.train.eval.knn import knn
from semdict.train.eval.linear_head import HeadConfig, linear_probe
from semdict.train.masked.model import MaskedTokenTransformer
from tests import tiny

MODEL = {"size": "tiny", "width": 32, "depth": 2, "heads": 2, "decoder_width": 32, "decoder_depth": 1,
         "decoder_heads": 2, "epochs": 1, "warmup_epochs": 0, "batch": 6, "precision": "float32"}  # fmt: skip
RUNTIME = {"device": "cpu", "tensorboard": False, "workers": 1}
EVALUATE = {"batch": 5, "probe": {"epochs": 3, "batch": 8, "base_lr": 4.0},
            "knn": {"k": 5}, "few_shot": {"shots": [2, 3], "seeds": [0, 1], "epochs": 2, "batch": 4}}  # fmt: skip


def images(root: Path, split: str, classes: int, each: int, start: int) -> None:
    for n in range(classes * each):
        path = root / "images" / split / f"c{n % classes}" / f"i{n:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tiny.draw_image(start + n)).save(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Images, shards with two views, a trained model."""
    root = tmp_path_factory.mktemp("world")
    folders = {split: str(root / "images" / split) for split in ("train", "val")}
    tiny.make_world(root, manifest={"images": folders}, encode={"views": ["centre", "flip"]})
    images(root, "train", 3, 4, 0)
    images(root, "val", 3, 2, 50)
    tree = yaml.safe_load((root / "params.yaml").read_text())
    tree = tiny.replaced(tree, pretrain=MODEL, evaluate=EVALUATE, runtime=RUNTIME)
    (root / "params.yaml").write_text(yaml.safe_dump(tree))
    tiny.run_until_centroids(root)
    assert tiny.semdict(root, "encode") == 0
    assert tiny.semdict(root, "pretrain", "--objective", "mage") == 0
    return root


@pytest.fixture
def project(world, tmp_path) -> Path:
    """A copy that a test may score in and damage."""
    root = tmp_path / "world"
    shutil.copytree(world, root, ignore=shutil.ignore_patterns("work"))
    return root


def evaluate(root: Path, action: str, *options: str) -> int:
    return tiny.semdict(root, "evaluate", action, "--model", "runs/tiny/mage", *options)


def report(root: Path, name: str) -> dict:
    scores = json.loads((root / "reports" / "tiny" / "mage" / name).read_text())
    assert all(isinstance(value, float) for score, value in scores.items() if score != "protocol")  # what DVC shows
    return {**scores, "protocol": scores["protocol"][0]}


def table(root: Path, name: str) -> list[dict]:
    with (root / "reports" / "tiny" / "mage" / name).open() as file:
        return list(csv.DictReader(file))


def plain_features(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, V, E) features and labels of a split, straight from the model."""
    shards = open_shards(root / "shards" / "tiny")
    model, _ = load_model(root / "runs" / "tiny" / "mage", MaskedTokenTransformer)
    rows = np.flatnonzero(np.asarray(shards.index["split"].to_pylist()) == split)
    gen = torch.from_numpy(shards.gen[:][rows].astype(np.int64))
    with torch.no_grad():
        views = [model.features(gen[:, view]) for view in range(gen.shape[1])]
    return torch.stack(views, dim=1).numpy(), shards.label[:][rows]


def test_probe(project):
    assert evaluate(project, "probe") == 0
    scores = report(project, "probe.json")
    (x, y), (xt, yt) = plain_features(project, "train"), plain_features(project, "val")
    want = linear_probe(x, y, xt[:, 0], yt, HeadConfig(3, 8, 4.0))
    assert scores["top1"] == pytest.approx(want.top1) and scores["loss"] == pytest.approx(want.loss, rel=1e-4)
    protocol = scores["protocol"]
    train, test = protocol["train"], protocol["test"]
    assert protocol["source"] == "tokens" and train["views"] == ["centre", "flip"] and test["images"] == 6
    assert test["views"] == ["centre"] and train["images"] == 12 and protocol["classes"] == 3
    assert (protocol["epochs"], protocol["base_lr"], protocol["seed"]) == (3, 4.0, 0) and train["features"] == "cached"
    assert len(protocol["model"]["sha256"]) == 64 and train["same_recipe_as_training"] == "same"
    rows = table(project, "probe_confusion.csv")
    assert [row["actual"] for row in rows] == [f"c{label}" for label in yt]
    assert [row["predicted"] for row in rows] == [f"c{label}" for label in want.predicted]
    curve = table(project, "probe_curve.csv")
    assert [row["epoch"] for row in curve] == ["1", "2", "3"] and float(curve[-1]["top1"]) == pytest.approx(want.top1)


def test_features_are_kept_between_measures(project):
    assert evaluate(project, "probe") == 0
    made = {p: p.stat().st_mtime_ns for p in project.glob("work/features-*/*.npy")}
    assert len(made) == 3  # centre and flip of train, centre of val
    assert evaluate(project, "knn") == 0 and evaluate(project, "few-shot") == 0
    assert {p: p.stat().st_mtime_ns for p in project.glob("work/features-*/*.npy")} == made


def test_knn_and_a_second_dataset(project):
    mapping = project / "map.yaml"
    mapping.write_text("c0: c2\nc1: [c0, c2]\n")
    second = "evaluate.knn.second.again"
    set_ = ("--set", f"{second}.shards=shards/tiny", "--set", f"{second}.splits=[val]", "--set")
    assert evaluate(project, "knn", *set_, f"{second}.class_map=map.yaml") == 0
    scores = report(project, "knn.json")
    (x, y), (xt, yt) = plain_features(project, "train"), plain_features(project, "val")
    x, xt = x[:, 0], xt[:, 0]
    assert scores["top1"] == pytest.approx(100 * np.mean(knn(x, y, xt, 5)[:, 0].numpy() == yt))
    trained, mapped = y != 1, yt != 2  # no class maps to c1, c2 is not in the map
    predicted = knn(x[trained], y[trained], xt[mapped], 5)[:, 0].tolist()
    hits = [p in ({2}, {0, 2})[label] for p, label in zip(predicted, yt[mapped], strict=True)]
    assert scores["again_top1"] == pytest.approx(100 * np.mean(hits))
    protocol = scores["protocol"]["second"]["again"]
    assert (protocol["mapped_classes"], protocol["training_classes"]) == (2, 2)
    assert protocol["images_of_unmapped_classes"] == 2
    assert evaluate(project, "knn", *set_[:4]) == 0  # equal names need no map
    assert report(project, "knn.json")["again_top1"] == pytest.approx(report(project, "knn.json")["top1"])


@pytest.mark.slow
def test_umap_of_the_test_images_and_of_some_classes(project):
    """Coordinates of every image; the deviation by its definition; images of other classes are left out."""
    settings = ("--set", "evaluate.umap.neighbours=3", "--set", "evaluate.umap.classes=[c0,c2]")
    assert evaluate(project, "umap", *settings) == 0
    reports = project / "reports/tiny/mage"
    (x, y), (_, train_labels) = plain_features(project, "val"), plain_features(project, "train")
    points = pq.read_table(reports / "umap.parquet").to_pydict()
    assert points["label"] == y.tolist() and points["class"] == [f"c{label}" for label in y]
    distance = np.linalg.norm(x[:, 0] - x[:, 0].mean(axis=0), axis=1)
    assert points["deviation"] == pytest.approx(distance / np.sqrt((distance**2).mean()), rel=1e-4)
    assert np.isfinite([points["x"], points["y"]]).all() and len(set(points["x"])) == 6
    classes = pq.read_table(reports / "umap_classes.parquet").to_pydict()
    assert classes["label"] == [label for label in train_labels.tolist() if label != 1]
    for name in ("umap.png", "umap_classes.png"):
        assert len(Image.open(reports / name).convert("RGB").getcolors(1 << 24)) > 20
    assert report(project, "umap.json")["protocol"]["metric"] == "euclidean"
    kept = (reports / "umap.parquet").read_bytes()
    assert evaluate(project, "umap", *settings) == 0
    assert (reports / "umap.parquet").read_bytes() == kept, "the same seed, the same coordinates"


def test_umap_names_what_is_missing(project, capsys, monkeypatch):
    assert evaluate(project, "umap", "--set", "evaluate.umap.neighbours=50") == 2
    assert "7 images are too few for evaluate.umap.neighbours 50" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert evaluate(project, "umap") == 2
    assert "pip install 'semdict[umap]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("c0: c7", "'c7' is no class of the training set; there are 3, the first: c0, c1, c2"),
        ("c0: c00", "'c00' is no class of the training set; did you mean 'c0'?"),
        ("x9: c0", "'x9' is no class of the second dataset again"),
        ("c0: []", "maps to nothing"),
        ("[c0]", "must hold a mapping"),
        ("{", "neither YAML nor JSON"),
        ("c0: c1\nc0: c2", "found duplicate key"),
        ("{" * 5000, "neither YAML nor JSON"),
    ],
)
def test_wrong_class_maps_are_refused(project, capsys, text, words):
    (project / "map.yaml").write_text(text)
    second = "evaluate.knn.second.again"
    options = ("--set", f"{second}.shards=shards/tiny", "--set", f"{second}.class_map=map.yaml")
    assert evaluate(project, "knn", *options) == 2
    assert words in capsys.readouterr().err and not (project / "reports/tiny/mage/knn.json").exists()


def test_few_shot(project):
    assert evaluate(project, "few-shot") == 0
    scores = report(project, "few_shot.json")
    runs = scores["protocol"]["runs"]
    assert scores["top1_2_shot"] == pytest.approx(np.mean(runs["2_shot"]))
    assert scores["std_3_shot"] == pytest.approx(np.std(runs["3_shot"], ddof=1))
    assert [row["shots"] for row in table(project, "few_shot.csv")] == ["2", "3"]
    assert scores["protocol"]["train"]["images"] == 9 and scores["protocol"]["seeds"] == [0, 1]
    assert evaluate(project, "few-shot") == 0 and report(project, "few_shot.json") == scores


def protocol_crop(path: Path) -> torch.Tensor:
    """Resize 292, centre crop 256, as torchvision does it on a PIL image."""
    from torchvision import transforms as T

    steps = [T.Resize(292, T.InterpolationMode.BICUBIC), T.CenterCrop(256), T.ToTensor()]
    return T.Compose(steps)(Image.open(path).convert("RGB"))


def test_images_instead_of_tokens(project):
    free = ("--set", "evaluate.source=images")
    assert evaluate(project, "knn", *free) == 0
    model, _ = load_model(project / "runs/tiny/mage", MaskedTokenTransformer)
    vqgan = load_tokenizer(project / "vqgan.ckpt")
    features, labels = {}, {}
    for split in ("train", "val"):
        paths = sorted((project / "images" / split).rglob("*.png"))
        with torch.no_grad():
            features[split] = model.features(vqgan.encode(torch.stack([protocol_crop(p) for p in paths]))).numpy()
        labels[split] = np.array([int(p.parent.name[1:]) for p in paths])
    ranked = knn(features["train"], labels["train"], features["val"], 5)
    assert report(project, "knn.json")["top1"] == pytest.approx(100 * np.mean(ranked[:, 0].numpy() == labels["val"]))
    assert report(project, "knn.json")["protocol"]["test"]["views"] == ["resize-292"]
    kept = next(p for p in project.glob("work/features-*/resize-292.npy") if len(np.load(p)) == 6)
    gap = np.abs(np.load(kept) - features["val"]).max(axis=1)  # the random VQGAN has codes that nearly tie
    assert gap.max() < 0.1 and np.sort(gap)[3] < 1e-4
    assert evaluate(project, "probe", *free) == 0
    protocol = report(project, "probe.json")["protocol"]
    assert protocol["source"] == "images" and protocol["train"]["features"] == "made every epoch"
    assert protocol["train"]["embedding_dropout"] == 0.1 and protocol["train"]["same_recipe_as_training"] == "same"
    loss = report(project, "probe.json")["loss"]
    assert evaluate(project, "probe", *free, "--set", "evaluate.batch=3") == 0
    assert report(project, "probe.json")["loss"] == pytest.approx(loss, rel=1e-3), "a nearly tied code may change"
    assert evaluate(project, "few-shot", *free) == 0
    assert report(project, "few_shot.json")["protocol"]["train"]["images"] == 9


def test_an_image_that_cannot_be_decoded_is_replaced(project):
    victim = sorted((project / "images" / "train").rglob("*.png"))[5]
    data = victim.read_bytes()
    victim.write_bytes(data[: len(data) // 2])  # its header is whole: the manifest accepts it
    assert tiny.semdict(project, "manifest", "--set", f"manifest.images.train={project}/images/train",
                        "--set", f"manifest.images.val={project}/images/val") == 0  # fmt: skip
    free = ("--set", "evaluate.source=images", "--set", f"manifest.images.train={project}/images/train",
            "--set", f"manifest.images.val={project}/images/val")  # fmt: skip
    assert evaluate(project, "probe", *free) == 0 and evaluate(project, "knn", *free) == 0
    assert report(project, "knn.json")["protocol"]["train"]["images"] == 11


@pytest.mark.parametrize(
    ("trained", "tested", "words"),
    [
        (["n01", "n02", "n03", "n04"], ["0", "1", "2", "10"], "4 of 4 test classes have no training images: '0', '1'"),
        (["0", "1", "2", "3"], ["1", "2", "3", "10"], "1 of 4 test classes have no training images: '10'"),
    ],
)
@pytest.mark.parametrize("measure", ["knn", "probe", "few-shot", "fine-tune"])
def test_a_test_class_without_training_images_is_refused(project, capsys, measure, trained, tested, words):
    folders = {"train": trained, "val": tested}
    for split, names in folders.items():
        for n, name in enumerate(names):
            (project / split / name).mkdir(parents=True)
            Image.fromarray(tiny.draw_image(n)).save(project / split / name / "i.png")
    options = [word for split in folders for word in ("--set", f"manifest.images.{split}={project / split}")]
    assert tiny.semdict(project, "manifest", *options) == 0
    assert evaluate(project, measure, *options, "--set", "evaluate.source=images") == 1
    error = capsys.readouterr().err
    assert words in error and f"training classes are {trained[0]!r}" in error
    scores = {path.name for path in project.glob("reports/tiny/mage/*.json")}
    assert scores == {"metrics.json"} and not list(project.glob("work/features-*"))


def test_classes_are_compared_by_name_and_label():
    from semdict.train.eval.common import same_classes
    from semdict.train.eval.features import FeatureSet

    def labelled(labels: list[int], names: list[str]) -> FeatureSet:
        return FeatureSet({}, np.array(labels), names)

    train = labelled([0, 2, 2], ["a", "b", "c"])
    assert same_classes(train, labelled([2, 0], ["a", "b", "c"])) == 3
    assert same_classes(train, labelled([2], ["a", "b", "c", "d"])) == 3, "a name without images does not matter"
    with pytest.raises(ShardError, match="1 of 2 test classes have no training images: 'b'; training"):
        same_classes(train, labelled([0, 1], ["a", "b", "c"]))
    with pytest.raises(ShardError, match="class 'c' has label 2 in training and 1 in the test set"):
        same_classes(train, labelled([0, 1], ["a", "c"]))


def test_a_second_dataset_is_not_mapped_to_a_class_without_training_images():
    from semdict.train.eval.class_map import load_class_map

    names, trained = ["a", "b", "c"], np.array([0, 2])
    with pytest.raises(UsageError, match="1 classes of again have no training images"):
        load_class_map("again", None, names, np.array([0, 1]), names, trained)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("probe", "--set", "evaluate.probe.batch=64"), 2, "batch 64 must be between 2 and the 12"),
        (("probe", "--set", "evaluate.test_splits=[test]"), 1, "no split 'test'"),
        (("probe", "--set", "evaluate.test_view=random-0"), 1, "no view 'random-0' among centre, flip"),
        (("probe", "--set", "evaluate.probe.epoch=3"), 2, "did you mean evaluate.probe.epochs"),
        (("probe", "--shards", "nowhere"), 2, "nowhere"),
        (("knn", "--set", "evaluate.knn.k=13"), 2, "k 13 must be between 1 and the 12"),
        (("few-shot", "--set", "evaluate.few_shot.shots=[5]"), 2, "4 training images, fewer than 5 shots"),
        (("few-shot", "--set", "evaluate.few_shot.shots=[2,2]"), 2, "names one twice"),
        (("knn", "--set", "evaluate.source=images", "--manifest", "no.parquet"), 1, "no.parquet does not exist"),
        (("knn", "--set", "evaluate.knn.second.a.splits=[x]"), 2, "either shards or manifest"),
    ],
)
def test_mistakes_are_named(project, capsys, options, status, words):
    assert evaluate(project, *options) == status
    assert words in capsys.readouterr().err


def test_a_model_of_other_tokens_is_refused(project, capsys):
    tiny.make_vqgan(project / "other.ckpt", seed=1)
    assert tiny.semdict(project, "encode", *tiny.other_vqgan("other.ckpt"), "--out", "other") == 0
    assert evaluate(project, "probe", "--shards", "other") == 1
    assert "gen.sha256" in capsys.readouterr().err
    assert evaluate(project, "probe", "--shards", "other", "--other-recipe") == 0
    assert report(project, "probe.json")["protocol"]["test"]["same_recipe_as_training"] == "other"
    images_ = ("--set", "evaluate.source=images", *tiny.other_vqgan("other.ckpt"))
    assert evaluate(project, "knn", *images_) == 1 and "gen.sha256" in capsys.readouterr().err


def test_help(capsys):
    for action in ("probe", "knn", "few-shot", "fine-tune"):
        with pytest.raises(SystemExit) as end:
            tiny.semdict(Path.cwd(), "evaluate", action, "--help")
        shown = capsys.readouterr().out
        assert end.value.code == 0 and f"semdict evaluate {action} --model" in shown and "--other-recipe" in shown
    assert tiny.semdict(Path.cwd(), "evaluate", "probed") == 2


def test_random_crops_are_new_every_epoch_and_belong_to_their_labels(world):
    from semdict.pipeline.images.batches import CropRecipe
    from semdict.pipeline.images.crops import Crop, ViewSpec, crop_views, expand_views
    from semdict.pipeline.images.decode import BadImage, Status
    from semdict.pipeline.manifest.table import load_manifest
    from semdict.train.eval.linear_probe import RandomCropFeatures
    from semdict.train.eval.sources import ImageSource
    from semdict.train.masked.encoder import load_encoder

    folders = {split: str(world / "images" / split) for split in ("train", "val")}
    path, vqgan = world / "data/tiny/manifest/manifest.parquet", load_tokenizer(world / "vqgan.ckpt")
    encoder, cpu = load_encoder(world / "runs/tiny/mage"), torch.device("cpu")
    crop = Crop("resize-larger", 256, 1.14)
    recipe = CropRecipe(crop, tuple(expand_views(["centre"])))
    source = ImageSource(path, folders, ["train"], recipe, vqgan, encoder, cpu, batch=2)
    manifest, seen = load_manifest(path), []

    def remember(pixels):
        seen.append(pixels)
        return torch.zeros(len(pixels), 256, dtype=torch.long)

    source.codes = lambda images: remember((images * 255).round().byte().permute(0, 2, 3, 1).numpy())
    batches = RandomCropFeatures(source, lambda tokens: tokens[:, :1].float(), 1, 5, seed=3)
    orders = []
    for epoch in range(2):
        labels = torch.cat([label for _, label in batches(epoch)])
        order = permutation(12, 3, Stream.CROP_ORDER, epoch)[:10]
        orders.append(order.tolist())
        assert labels.tolist() == source.labels[order].tolist()
        shown = np.concatenate(seen)
        for pixels, at in zip(shown, order, strict=True):
            row = int(source.rows[at])
            rgb = np.asarray(Image.open(world / "images" / "train" / Path(manifest.key(row)).relative_to("train")
                                        .with_suffix(".png")))  # fmt: skip
            want, _ = crop_views(rgb, crop, [ViewSpec("random", epoch)], manifest.key(row), 3)
            assert np.array_equal(pixels, want[0])
        seen.clear()
    assert orders[0] != orders[1] and batches.steps == 2
    few = RandomCropFeatures(source, lambda tokens: tokens[:, :1].float(), 1, 3, 0, within=np.array([4, 7, 9]))
    assert sorted(next(few(0))[1].tolist()) == sorted(source.labels[[4, 7, 9]].tolist())
    seen.clear()
    first = next(i for i in range(9) if source.labels[order[i]] != source.labels[order[i + 1]])
    bad = int(source.rows[order[first]])

    def load(row, view, seed):
        if row == bad:
            raise BadImage(Status.DAMAGED, "damaged")
        return np.full((256, 256, 3), row, np.uint8)

    source._crop = load
    labels = torch.cat([label for _, label in batches(1)]).tolist()
    shown = [int(row) for row in np.concatenate(seen)[:, 0, 0, 0]]  # every pixel is the row's number
    assert shown[first] == source.rows[order[first + 1]] and len(shown) == 10
    assert labels == source.labels[[source.rows.tolist().index(row) for row in shown]].tolist()
