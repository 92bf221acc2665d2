"""Tokenizer and AR model from the command line, on twelve drawn images: train, encode, train, sample, resume."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml

from semdict.cli import main
from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.images.decode import DecodeSpec
from semdict.pipeline.manifest.table import load_manifest
from semdict.pipeline.shards import open_shards, verify_shards
from semdict.train.ar.model import ArModel
from semdict.train.data.images import ImageLoader, ImageRows, RandomCrop, centre_crops, usable_rows
from semdict.train.engine.model_file import load_model
from semdict.train.vcq.tokenizer import load_vcq_tokenizer
from tests.tiny import TEACHER, base, digest, make_images, make_teacher, merged

VCQ = {
    "size": "tiny", "image_size": 256, "patch": 64, "tokens": 16, "encoder": [1, 32, 2], "decoder": [1, 32, 2],
    "steps": 6, "batch": 4, "warmup": 2, "hold": 3,
    "discriminator_start": 3, "discriminator_ramp": 0, "discriminator_channels": 8, "precision": "float32",
    "held_out": [], "measured_images": 4,
    "lecam_weight": 0.001, "reset_patience": 2.0, "reset_protected": 4,
}  # fmt: skip
AR = {
    "size": "tiny", "steps": 6, "batch": 4, "warmup": 2, "hold": 3, "precision": "float32", "held_out": [],
}  # fmt: skip
RUNTIME = {"save_every": 2, "log_every": 1, "tensorboard": False, "workers": 1}
PROBE = {"first": [2, 16], "epochs": 2, "batch": 6, "warmup_epochs": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, a random network for the perceptual loss, params.yaml; the manifest exists."""
    root = tmp_path_factory.mktemp("vcq")
    make_images(root / "images")
    make_teacher(root / "net.pth")
    source = {"kind": "features", "weights": str(root / "net.pth"), **TEACHER, "layers": 1}
    network = str(root / "net.pth")
    changes = {
        "preset": "tiny",
        "inputs": {"vqgan": "none", "features": network, "perceptual": network},
        "runtime": RUNTIME,
        "manifest": {"images": {"train": str(root / "images" / "train")}},
        "vqgan": {"weights": "none"},
        "features": {**TEACHER, "weights": network},
        "kmeans": {"k": 2},
        "vcq_encode": {"batch": 4, "chunk": 4, "views": ["centre", "flip"], "precision_images": 4, "psnr_floor": 0.0,
                       "psnr_images": 4},
        "vcq": {**VCQ, "perceptual": [source]},
        "ar": AR,
        "ar_sample": {"per_class": 2, "scale": 2.0, "batch": 3},
        "scores": {"protocol": "teacher", "split": "train", "batch": 4, "kid_subsets": 2},
        "vcq_evaluate": {"test_splits": ["train"], "batch": 5, "shown": 3, "probe": PROBE},
    }  # fmt: skip
    tree = merged(base(), changes)
    (root / "params.yaml").write_text(yaml.safe_dump(tree))
    return root


def command(root, *words, expect=0):
    status = main([*words, "--params", str(root / "params.yaml"), "--work", str(root / "work")])
    assert status == expect


@pytest.mark.slow
def test_from_images_to_samples(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    command(world, "manifest")
    command(world, "vcq", "train")
    card = json.loads((world / "runs/tiny/vcq/run.json").read_text())
    assert card["metrics"]["perceptual"].startswith("features-")
    assert card["metrics"]["psnr"] > 3
    assert {"l1", "vq", "perceptual", "adversarial"} <= card["metrics"]["final"].keys()
    assert {"discriminator_loss", "discriminator_lecam"} <= card["metrics"]["final"].keys()
    assert card["metrics"]["codes_reset"] > 0
    assert (world / "runs/tiny/vcq/reconstructions.png").stat().st_size > 1000
    usage = json.loads((world / "runs/tiny/vcq/usage.json").read_text())
    assert len(usage["at"]["used"]) == 16

    command(world, "vcq", "encode")
    shards = open_shards(world / "shards/tiny-vcq")
    tokenizer = load_vcq_tokenizer(world / "runs/tiny/vcq/tokenizer.pt")
    assert shards.gen_sizes.tolist() == list(tokenizer.quantizer.sizes)
    tokens = shards.gen[:]
    assert tokens.shape == (12, 2, 16)
    assert bool((tokens < shards.gen_sizes).all())
    assert verify_shards(world / "shards/tiny-vcq").ok

    elsewhere = ["--out", "elsewhere", "--reports", "elsewhere-report", "--scheduler", "local-2"]
    command(world, "vcq", "encode", *elsewhere)  # Dask workers leave the same bytes
    assert digest(world / "elsewhere") == digest(world / "shards/tiny-vcq")

    command(world, "ar", "train")
    model, file = load_model(world / "runs/tiny/ar", ArModel)
    assert model.config.sizes == tokenizer.quantizer.sizes
    assert model.null_class == 3
    assert file.about["classes"] == ["c0", "c1", "c2"]
    assert file.about["token_set"]["recipe"]["gen"]["sha256"] == tokenizer.identity["sha256"]
    nll = json.loads((world / "runs/tiny/ar/nll.json").read_text())
    assert len(nll["bits"]["train"]) == 16
    assert sum(nll["bits"]["train"]) < sum(np.log2(nll["sizes"])) + 1

    assert main(["ar", "sample", "--params", str(world / "params.yaml")]) == 0
    drawn = np.load(world / "runs/tiny/ar-samples-guided/samples.npz")
    assert drawn["arr_0"].shape == (6, 256, 256, 3)
    assert drawn["arr_1"].tolist() == [0, 0, 1, 1, 2, 2]
    assert main(["ar", "sample", "--draw", "unguided", "--params", str(world / "params.yaml")]) == 0
    unguided = json.loads((world / "runs/tiny/ar-samples-unguided/sampling.json").read_text())
    assert unguided["scale"] == 0
    assert unguided["temperature"] == unguided["unguided_temperature"]

    command(world, "vcq", "evaluate", "--samples", "guided=runs/tiny/ar-samples-guided")
    scores = json.loads((world / "reports/tiny/vcq/evaluate.json").read_text())
    assert scores["images"] == 12
    assert scores["psnr"] > 3
    assert scores["reconstruction_teacher_frechet_distance"] > 0
    assert scores["guided_teacher_frechet_distance"] > 0
    assert "protocol is teacher" in scores["missing"][0]["rfid_val50k"]
    probes = [name for name in scores if name.startswith("probe_")]
    assert len(probes) == 2 * 2 * 2 * 2, "k, before and after, mean and concat, top 1 and 5"
    with (world / "reports/tiny/vcq/utilisation.csv").open() as file:
        positions = list(csv.DictReader(file))
    assert [int(row["k"]) for row in positions] == list(tokenizer.quantizer.sizes)
    assert (world / "reports/tiny/vcq/reconstructions.png").stat().st_size > 1000
    assert not list((world / "work").glob("vcq-evaluate-*"))
    command(world, "vcq", "evaluate", "--samples", "runs/tiny/ar-samples-guided", expect=2)
    command(world, "vcq", "evaluate", "--set", "vcq_evaluate.probe.first=[17]", expect=2)

    command(world, "vcq", "train", "--resume")
    assert "nothing to do" in capsys.readouterr().err
    command(world, "vcq", "train", expect=2)


def test_image_loader_resumes_and_shares_rows(world, monkeypatch):
    monkeypatch.chdir(world)
    if not (world / "data/tiny/manifest/manifest.parquet").exists():
        command(world, "manifest")
    manifest = load_manifest(world / "data/tiny/manifest/manifest.parquet")
    folders = {"train": str(world / "images" / "train")}
    images = ImageRows(manifest, folders, usable_rows(manifest, ["train"]), DecodeSpec())

    def loader(**ranks):
        return ImageLoader(images, RandomCrop(32, 3), 4, seed=3, workers=1, floats=True, **ranks)

    whole = loader()
    batches = [next(whole) for _ in range(5)]  # 3 steps an epoch: into the second
    assert batches[0]["images"].shape == (4, 3, 32, 32)
    assert 0 <= float(batches[0]["images"].min()) < float(batches[0]["images"].max()) <= 1
    first_epoch = torch.cat([batch["row"] for batch in batches[:3]])
    assert sorted(first_epoch.tolist()) == list(range(12))

    early, later = loader(), loader()
    for _ in range(3):
        next(early)
    later.load_state_dict(early.state_dict())
    for want in batches[3:]:
        got = next(later)
        assert torch.equal(got["row"], want["row"])
        assert torch.equal(got["images"], want["images"])

    halves = [next(loader(rank=rank, world=2)) for rank in range(2)]
    assert torch.equal(torch.cat([half["images"] for half in halves]), batches[0]["images"])
    again = {int(row): image for batch in batches[3:] for row, image in zip(batch["row"], batch["images"], strict=True)}
    shown = {int(row): image for batch in batches[:3] for row, image in zip(batch["row"], batch["images"], strict=True)}
    assert any(not torch.equal(again[row], shown[row]) for row in again)  # another crop in another epoch
    assert centre_crops(images, 32, 5).shape == (5, 32, 32, 3)
    with pytest.raises(UsageError, match="larger than the training set"):
        ImageLoader(images, RandomCrop(32, 0), 13, seed=0)
