"""The campaign's world: 15 images, weights and everything that the commands make of them, in one folder.

All paths in params.yaml are relative, so a copy of the folder is a world of its own.
"""

import io
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from tests import tiny

GRID_MODEL = {"size": "tiny", "width": 16, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_depth": 1,
              "decoder_heads": 2}  # fmt: skip
SHORT = {"warmup_epochs": 0, "epochs": 2, "batch": 3, "precision": "float32"}
SECTIONS = {
    "inputs": {"vqgan": "vqgan.ckpt", "features": "teacher.pth", "perceptual": "teacher.pth"},
    "runtime": {"device": "cpu", "workers": 1, "tensorboard": False, "log_every": 1, "save_every": 2},
    "manifest": {"images": {"train": "images/train", "val": "images/val"}},
    "pixels": {"size": 32, "crop": "resize"},
    "vqgan": {"weights": "vqgan.ckpt", "psnr_floor": 0.0, "psnr_images": 2},
    "features": {**tiny.TEACHER, "weights": "teacher.pth"},
    "sample_features": {"points": 800, "batch": 4, "chunk": 4},
    "kmeans": {"k": 8, "iterations": 3, "engine": "torch"},
    "encode": {"batch": 4, "chunk": 4, "precision_images": 2, "views": ["centre", "flip"]},
    "shards": {"chunk_rows": 4, "shard_rows": 8, "licence": "mit"},
    "pretrain": {**GRID_MODEL, **SHORT, "dropout": 0.0},
    "condition": {**SHORT, "epochs": 1},
    "generate": {"images": 6, "steps": 2, "batch": 3, "shown": 2, "box": [0, 0, 1, 1]},
    "vcq": {"size": "tiny", "image_size": 32, "patch": 16, "tokens": 4, "encoder": [1, 16, 2], "decoder": [1, 16, 2],
            "k_max": 16, "steps": 4, "batch": 3, "warmup": 1, "hold": 2, "discriminator_start": 1,
            "discriminator_ramp": 0, "discriminator_channels": 4, "precision": "float32", "measured_images": 2,
            "usage_images": 6, "reset_patience": 2.0, "reset_protected": 2,
            "perceptual": [{"kind": "features", "weights": "teacher.pth", **tiny.TEACHER, "layers": 1}]},
    "vcq_encode": {"batch": 4, "chunk": 4, "psnr_floor": 0.0, "psnr_images": 2, "precision_images": 2},
    "ar": {"size": "tiny", "depth": 1, "width": 16, "heads": 2, "steps": 4, "batch": 3, "warmup": 1, "hold": 2,
           "precision": "float32"},
    "ar_sample": {"per_class": 2, "batch": 3, "scale": 2.0},
    "vcq_evaluate": {"batch": 4, "shown": 2, "probe": {"first": [2, 4], "epochs": 1, "batch": 4, "warmup_epochs": 0}},
    "evaluate": {"batch": 4, "probe": {"epochs": 2, "batch": 4}, "knn": {"k": 3},
                 "few_shot": {"shots": [2], "seeds": [0], "epochs": 1, "batch": 4},
                 "finetune": {"epochs": 1, "batch": 4, "warmup_epochs": 0, "precision": "float32", "mixup": 0.0,
                              "cutmix": 0.0, "rand_augment": ""}},
    "scores": {"protocol": "teacher", "split": "val", "batch": 4, "kid_subsets": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One command: its words, and the paths that it publishes; `resume` = it is started again with --resume."""

    words: str
    outs: tuple[str, ...]
    resume: bool = False

    @property
    def again(self) -> list[str]:
        """The words of every start, the first included: trainers and samplers are run with --resume by DVC too."""
        return [*self.words.split(), *(["--resume"] if self.resume else [])]


TAR, ROWS = (
    f"--set manifest.images.train=packed/images.{kind} --set manifest.images.val=packed/images.{kind}"
    for kind in ("tar", "parquet")
)
LEASE, CLASSES = "runs/tiny/lease", "runs/tiny/classes"
# Every command that publishes something, in an order in which each finds its inputs.
STEPS = {
    "manifest": Step("manifest", ("data/tiny/manifest", "reports/tiny/manifest.json")),
    "sample-features": Step("sample-features", ("data/tiny/features.zarr",)),
    "kmeans": Step("kmeans", ("data/tiny/kmeans", "reports/tiny/kmeans.json", "reports/tiny/kmeans_objective.csv")),
    "encode": Step("encode", ("shards/tiny", "reports/tiny/encode.json", "reports/tiny/reconstructions.png")),
    "export pt": Step("shards export shards/tiny tokens.pt --to pt --view 0 --overwrite", ("tokens.pt",)),
    "export webdataset": Step("shards export shards/tiny tars --to webdataset --overwrite", ("tars",)),
    "export hf": Step("shards export shards/tiny hub --to hf --overwrite", ("hub",)),
    "import": Step("shards import tokens.pt shards/imported --centroids data/tiny/kmeans/centroids.npy --overwrite",
                   ("shards/imported",)),
    "pretrain lease": Step("pretrain --objective lease", (LEASE, "reports/tiny/lease"), resume=True),
    "pretrain sorcen": Step("pretrain --objective sorcen --set pretrain.sorcen.projector=[16,8] "
                            "--set pretrain.sorcen.predictor=[8,8]",
                            ("runs/tiny/sorcen", "reports/tiny/sorcen"), resume=True),
    "pretrain streamed": Step("pretrain --objective mage --shards tars --set pretrain.loader=streaming",
                              ("runs/tiny/mage", "reports/tiny/mage"), resume=True),
    "generate": Step(f"generate --model {LEASE} --out samples", ("samples",), resume=True),
    "condition": Step(f"condition --model {LEASE} --out {CLASSES}", (CLASSES, "reports/tiny/classes"), resume=True),
    "generate class": Step(f"generate --task class --model {CLASSES} --out class-samples", ("class-samples",),
                           resume=True),
    "vcq train": Step("vcq train", ("runs/tiny/vcq", "reports/tiny/vcq"), resume=True),
    "vcq encode": Step("vcq encode", ("shards/tiny-vcq", "reports/tiny/vcq-encode")),
    "ar train": Step("ar train", ("runs/tiny/ar", "reports/tiny/ar"), resume=True),
    "ar sample": Step("ar sample --out ar-samples", ("ar-samples",), resume=True),
    "entropy": Step("entropy shards/tiny shards/tiny-vcq --ar runs/tiny/ar", ("reports/tiny/entropy",)),
    "evaluate probe": Step(f"evaluate probe --model {LEASE} --out scores/probe", ("scores/probe",)),
    "evaluate knn": Step(f"evaluate knn --model {LEASE} --out scores/knn", ("scores/knn",)),
    "evaluate few-shot": Step(f"evaluate few-shot --model {LEASE} --out scores/few-shot", ("scores/few-shot",)),
    "evaluate fine-tune": Step(f"evaluate fine-tune --model {LEASE} --run runs/tiny/tuned --out scores/tuned",
                               ("runs/tiny/tuned", "scores/tuned"), resume=True),
    "evaluate fid": Step("evaluate fid --samples samples --out scores/fid.json", ("scores/fid.json",)),
    "evaluate nearest": Step("evaluate nearest --samples samples --out scores/nearest", ("scores/nearest",)),
    "evaluate reference": Step("evaluate reference --split val --out reference", ("reference",)),
    "vcq evaluate": Step("vcq evaluate --samples guided=ar-samples --out scores/vcq", ("scores/vcq",)),
    "report": Step("report --out report.html", ("report.html",)),
    "manifest of a tar": Step(f"manifest {TAR} --out packed/tar.parquet "
                              "--metrics packed/tar.json", ("packed/tar.parquet", "packed/tar.json")),
    "manifest of parquet": Step(f"manifest {ROWS} --out packed/rows.parquet "
                                "--metrics packed/rows.json", ("packed/rows.parquet", "packed/rows.json")),
}  # fmt: skip
JOURNAL = "journal.jsonl"  # times of all runs, to which every command adds a line
SCRATCH = ("work",)  # unfinished runs, locks, the manifest's cache: nothing in it is published


def make_inputs(root: Path) -> None:
    """Images, weights and params.yaml."""
    for number in range(15):
        split, label = ("train" if number < 9 else "val"), number % 3
        path = root / "images" / split / f"c{label}" / f"i{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tiny.draw_image(number, 40, 36)).save(path)
    tiny.make_vqgan(root / "vqgan.ckpt", levels=4)
    tiny.make_teacher(root / "teacher.pth")
    tree = tiny.merged(tiny.params(root), {"preset": "tiny", **SECTIONS})
    (root / "params.yaml").write_text(yaml.safe_dump(tree))
    pack(root / "images" / "train", root / "packed")


def pack(images: Path, out: Path) -> None:
    """The same images as a tar and as a parquet file."""
    out.mkdir()
    rows = []
    with tarfile.open(out / "images.tar", "w") as tar:
        for path in sorted(images.rglob("*.png")):
            label = int(path.parent.name[1:])
            for name, data in ((path.name, path.read_bytes()), (f"{path.stem}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            rows.append({"image": {"bytes": path.read_bytes(), "path": path.name}, "label": label})
    pq.write_table(pa.Table.from_pylist(rows), out / "images.parquet")


def clone(source: Path, target: Path, without: tuple[str, ...] = ()) -> None:
    """A copy of a world, hard links for its files; without the named outputs and without unfinished work."""
    left_out = {source / name for name in (*without, *SCRATCH)}

    def ignore(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name == JOURNAL or Path(folder) / name in left_out]

    shutil.copytree(source, target, ignore=ignore, copy_function=link)


def link(source: str, target: str) -> None:
    """A hard link: commands replace files, they never write into them, which the campaign checks at its end."""
    Path(target).hardlink_to(source)
