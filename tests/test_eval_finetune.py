"""Fine-tuning: layer-wise rates, drop path, reproducible augmentation, and the command from start to resume."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.images.decode import BadImage, DecodeSpec, Status
from semdict.pipeline.manifest.table import load_manifest
from semdict.train.data.augment import TimmAugmentation, make_transform
from semdict.train.data.images import ImageLoader, ImageRows
from semdict.train.engine.layers import drop_path
from semdict.train.engine.logging import read_log
from semdict.train.engine.model_file import load_model, save_model
from semdict.train.engine.rng import Stream, batch_generator, numpy_seed
from semdict.train.eval.classifier import Classifier, layer_groups
from semdict.train.eval.finetune import Classify
from tests import tiny
from tests.test_eval_cli import evaluate, report, table, world  # noqa: F401
from tests.test_eval_features import small_model

FINETUNE = {"epochs": 2, "batch": 6, "base_lr": 0.01, "warmup_epochs": 1, "precision": "float32"}


def classifier(**changes) -> Classifier:
    return Classifier(small_model(depth=3), 5, **changes)


def test_layer_decay_groups():
    model = classifier()
    groups = layer_groups(model, 0.05, 0.65)
    names = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in names_of(group)}
    assert set(names) == {name for name, _ in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(names)
    expected = {
        "encoder.token_emb.word.weight": (0.65**4, 0.05),
        "encoder.token_emb.position.weight": (0.65**4, 0.05),
        "encoder.blocks.0.attn.qkv.weight": (0.65**3, 0.05),
        "encoder.blocks.0.norm1.weight": (0.65**3, 0.0),
        "encoder.blocks.2.mlp.fc2.weight": (0.65, 0.05),
        "encoder.blocks.2.mlp.fc2.bias": (0.65, 0.0),
        "norm.weight": (1.0, 0.0),
        "head.weight": (1.0, 0.05),
    }
    for name, want in expected.items():
        assert names[name] == pytest.approx(want), name


def names_of(group: dict) -> list[str]:
    return [name for name, _ in group["params"]]


def test_what_only_pretraining_uses_is_gone():
    model = classifier()
    assert not [name for name, _ in model.named_parameters() if "decoder" in name or "token_head" in name]
    assert all(parameter.requires_grad for parameter in model.parameters())
    F.cross_entropy(model(torch.randint(0, 40, (4, 16))), torch.arange(4)).backward()
    used = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"encoder.token_emb.word.weight", "encoder.blocks.0.attn.qkv.weight", "norm.bias", "head.weight"} <= used
    assert all(parameter.grad is not None for parameter in model.parameters())  # or torchrun would complain


def test_the_head_reads_what_the_probe_reads():
    encoder, tokens = small_model(depth=3).eval(), torch.randint(0, 40, (4, 16))
    want = encoder.features(tokens)
    model = Classifier(encoder, 5).eval()
    with torch.no_grad():
        np.testing.assert_allclose(model(tokens), model.head(want), atol=1e-6)
        assert model.head.weight.abs().max() < 1e-4 and not model.head.bias.any()


def test_no_drop_path_is_the_same_bits():
    a, b = small_model().train(), small_model().train()
    for block in b.blocks:
        block.drop_path = 0.0
    tokens = torch.randint(0, 40, (4, 16))
    torch.manual_seed(3)
    want = a.encode(tokens)
    torch.manual_seed(3)
    assert torch.equal(b.encode(tokens), want)
    for block in b.blocks:
        block.drop_path = 0.9
    assert torch.equal(b.eval().encode(tokens), a.eval().encode(tokens))
    assert [name for name, _ in a.named_parameters()] == [name for name, _ in b.named_parameters()]


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    kept = drop_path(torch.ones(4000, 3, 2), 0.25)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(kept.amin((1, 2)), kept.amax((1, 2))) and kept.mean() == pytest.approx(1, abs=0.03)
    rates = [block.drop_path for block in classifier(drop_path=0.1).encoder.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1])
    model = classifier(dropout=0.2, embedding_dropout=0.3)
    block = model.encoder.blocks[1]
    assert (block.attn.dropout, block.attn.drop.p, block.mlp.drop.p, model.encoder.token_emb.drop.p) == (
        0.2, 0.2, 0.2, 0.3,
    )  # fmt: skip


def test_saved_and_loaded(tmp_path):
    model = classifier().eval()
    save_model(tmp_path / "c.pt", model, {"a": 1})
    again, file = load_model(tmp_path / "c.pt", Classifier)
    tokens = torch.randint(0, 40, (4, 16))
    assert torch.equal(model(tokens), again(tokens)) and file.about == {"a": 1}
    torch.save({"kind": "other"}, tmp_path / "o.pt")
    with pytest.raises(WeightsError, match="fine-tune"):
        load_model(tmp_path / "o.pt", Classifier)


@pytest.fixture(scope="module")
def ready(world) -> Path:  # noqa: F811
    tree = yaml.safe_load((world / "params.yaml").read_text())
    tree["evaluate"]["finetune"] |= FINETUNE
    tree["runtime"] |= {"log_every": 1, "save_every": 1, "tensorboard": False}
    (world / "finetune.yaml").write_text(yaml.safe_dump(tree))
    return world


def training_images(root: Path) -> ImageRows:
    manifest = load_manifest(root / "data/tiny/manifest/manifest.parquet")
    folders = {split: str(root / "images" / split) for split in ("train", "val")}
    return ImageRows(manifest, folders, manifest.rows_of(["train"]), DecodeSpec())


def test_augmentation_depends_on_seed_epoch_and_row_alone(ready):
    rgb = training_images(ready).load(3, 256, np.copy)

    def augmentation(seed: int = 0, rand_augment: str = "rand-m9-mstd0.5-inc1", scale: float = 0.2):
        return TimmAugmentation(seed, rand_augment, (scale, 1.0), 256)

    augment = augmentation()
    first = augment(rgb, 0, 3).copy()
    augment(rgb, 0, 5)
    np.random.rand(7), torch.rand(3)
    assert np.array_equal(augmentation()(rgb, 0, 3), first) and first.dtype == np.uint8 and first.shape == (256, 256, 3)
    others = augment(rgb, 1, 3), augment(rgb, 0, 4), augmentation(seed=1)(rgb, 0, 3)
    assert not any(np.array_equal(other, first) for other in others)
    bare = augmentation(rand_augment="", scale=1.0)
    whole = [bare(rgb, epoch, 3) for epoch in range(12)]  # nothing but the flip is left
    as_is = [np.array_equal(one, whole[0]) for one in whole]
    flipped = [np.array_equal(one[:, ::-1], whole[0]) for one in whole]
    assert any(flipped) and sum(as_is) + sum(flipped) >= 9  # a crop may miss the border by a pixel


@pytest.mark.parametrize("magnitude", [0, 9, 10])
def test_every_operation_works_at_every_magnitude(magnitude):
    """Noise on magnitude 9 reaches 10, where timm asks Pillow to keep 0 bits of a colour."""
    transform = make_transform("rand-m9-mstd0.5-inc1", (0.2, 1.0), 256)
    operations = [one for part in transform.transforms for one in getattr(part, "ops", ())]
    assert len(operations) == 15
    image = Image.fromarray(tiny.draw_image(3))
    for operation in operations:
        operation.magnitude, operation.magnitude_std, operation.prob = magnitude, 0, 1.0
        augmented = np.asarray(operation(image))
        assert augmented.shape == (80, 96, 3), operation
        assert augmented.any() == (operation.name != "PosterizeIncreasing" or magnitude < 10), operation


def test_batches_continue_anywhere_and_are_shared_by_ranks(ready):
    images, augment = training_images(ready), TimmAugmentation(0, "rand-m9-mstd0.5-inc1", (0.2, 1.0), 64)

    def loader(rank: int = 0, ranks: int = 1, workers: int = 1) -> ImageLoader:
        return ImageLoader(images, augment, 4, 0, rank, ranks, workers=workers, processes=True)

    whole = loader()
    batches = [next(whole) for _ in range(5)]
    whole.close()
    rows = torch.cat([batch["row"] for batch in batches[:3]])
    assert whole.steps_per_epoch == 3 and len(rows.unique()) == 12
    labels = torch.cat([batch["label"] for batch in batches[:3]])
    assert labels.tolist() == images.manifest.label[rows.numpy()].tolist()
    later = loader(workers=2)
    later.load_state_dict({**whole.state_dict(), "step": 3})
    for want in batches[3:]:
        got = next(later)
        assert all(torch.equal(got[name], want[name]) for name in want)
    later.close()
    parts = [loader(rank, 2) for rank in range(2)]
    shares = [next(part) for part in parts]
    assert torch.equal(torch.cat([share["images"] for share in shares]), batches[0]["images"])
    for part in parts:
        part.close()


@pytest.mark.parametrize("processes", [False, True])
def test_an_image_that_cannot_be_decoded_is_replaced_by_the_next(ready, processes):
    images = training_images(ready)
    whole = ImageLoader(images, Corner(), 4, 0, workers=2, processes=processes)
    order = torch.cat([next(whole)["row"] for _ in range(3)]).tolist()
    bad = order[5]
    broken = Broken(images.manifest, images.images, images.rows, DecodeSpec(), bad)
    loader = ImageLoader(broken, Corner(), 4, 0, workers=2, processes=processes)
    assert next(loader)["row"].tolist() == order[:4] and loader.replaced == set()
    second = next(loader)
    assert second["row"].tolist() == [order[4], order[6], order[6], order[7]]
    assert torch.equal(second["images"][1], second["images"][2])
    assert loader.state_dict()["replaced"] == [bad]
    again = ImageLoader(broken, Corner(), 4, 0, workers=2, processes=processes)
    again.load_state_dict(loader.state_dict())
    assert again.replaced == {bad}


class Broken(ImageRows):
    """Images one of which cannot be decoded."""

    def __init__(self, *fields) -> None:
        *rest, self.bad = fields
        super().__init__(*rest)

    def load(self, row, size, crop) -> np.ndarray:
        if row == self.bad:
            raise BadImage(Status.DAMAGED, "broken")
        return super().load(row, size, crop)


class Corner:
    """An augmentation that is the same in every epoch."""

    size = 64

    def __call__(self, rgb: np.ndarray, epoch: int, row: int) -> np.ndarray:
        return rgb[:64, :64].copy()


class Codes:
    """Stands for a source: the mean brightness of an image as its tokens."""

    def codes(self, images):
        self.seen = images
        return (images.mean((1, 2, 3)) * 39).long()[:, None].expand(-1, 16)


def test_mixing_is_timms_and_belongs_to_the_step():
    source, model = Codes(), classifier()
    objective = Classify(source, 5, 0.8, 1.0, 0.1)
    batch = {"images": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), "label": torch.tensor([0, 1, 2, 3])}
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    losses, shown = [], []
    for seed in (1, 1, 2):
        loss, _ = objective(model, batch, batch_generator(seed, 0, 4), None)
        losses.append(loss.item())
        shown.append(source.seen)
    assert torch.equal(shown[0], shown[1]) and not torch.equal(shown[0], shown[2])
    assert not torch.equal(shown[0], batch["images"].float() / 255) and shown[0].max() <= 1
    assert np.array_equal(np.random.get_state()[1], before)  # NumPy's own state is put back
    from timm.data.mixup import Mixup

    rng = batch_generator(1, 0, 4)
    np.random.seed(numpy_seed(rng.initial_seed(), Stream.MIXING, 0))
    images, target = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)(batch["images"].float() / 255, batch["label"])
    torch.nn.init.normal_(model.eval().head.weight)
    loss, _ = objective(model, batch, rng, None)
    logp = model(source.codes(images)).log_softmax(1)
    assert loss.item() == pytest.approx(-(target * logp).sum(1).mean().item(), rel=1e-5)  # smoothed once
    plain = Classify(source, 5, 0.0, 0.0, 0.1)
    loss, _ = plain(model.eval(), batch, batch_generator(1, 0, 4), None)
    assert torch.equal(source.seen, batch["images"].float() / 255)
    want = F.cross_entropy(model(source.codes(source.seen)), batch["label"], label_smoothing=0.1)
    assert loss.item() == pytest.approx(want.item())


def finetune(root: Path, *options: str) -> int:
    return evaluate(root, "fine-tune", "--params", "finetune.yaml", *options)


def test_the_command_trains_scores_and_resumes(ready, capsys, monkeypatch):
    from semdict.train.engine import loop

    assert finetune(ready, "--run", "runs/whole") == 0
    scores, whole = report(ready, "finetune.json"), load_model(ready / "runs/whole/model.pt", Classifier)[0]
    protocol = scores["protocol"]
    assert (
        protocol["source"] == "images"
        and protocol["drop_path"] == 0.1
        and protocol["mixup"] == 0.8
        and protocol["epochs"] == 2
    )
    assert protocol["test"]["views"] == ["resize-292"] and protocol["test"]["images"] == 6 and protocol["classes"] == 3
    rows = table(ready, "finetune_confusion.csv")
    right = np.mean([row["actual"] == row["predicted"] for row in rows])
    assert len(rows) == 6 and scores["top1"] == pytest.approx(100 * right)
    log = read_log(ready / "runs/whole/log.jsonl")
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in log if "test_top1" in row] == [2]
    assert finetune(ready, "--run", "runs/whole", "--resume") == 0 and "nothing to do" in capsys.readouterr().err

    real, count = loop._Fit._save, []

    def stops(self):
        real(self)
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop._Fit, "_save", stops)
    assert finetune(ready, "--run", "runs/cut") == 130
    monkeypatch.undo()
    assert finetune(ready, "--run", "runs/cut", "--resume") == 0
    cut = load_model(ready / "runs/cut/model.pt", Classifier)[0]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), cut.state_dict().values(), strict=True))
    assert report(ready, "finetune.json") == scores


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--set", "evaluate.finetune.batch=5"), 2, "5 a micro-batch is odd"),
        (("--set", "evaluate.finetune.batch=64"), 2, "larger than the training set (12 images)"),
        (("--set", "evaluate.finetune.warmup_epochs=3"), 2, "more than epochs 2"),
        (("--set", "evaluate.finetune.rand_augment=trivial"), 2, "rand_augment"),
        (tiny.other_vqgan("no.ckpt"), 1, "no.ckpt"),
    ],
)
def test_mistakes_are_named(ready, capsys, options, status, words):
    assert finetune(ready, "--run", "runs/none", *options) == status
    assert words in capsys.readouterr().err and not (ready / "runs/none").exists()
