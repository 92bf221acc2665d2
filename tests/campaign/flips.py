"""Flipped bits: one bit of one file changes, a command reads it, and either refuses it or publishes the same bytes."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.campaign import child
from tests.campaign.case import Case, Verdict, concerns, fault_of, rng_of
from tests.campaign.compare import Snapshot
from tests.campaign.world import CLASSES, LEASE, ROWS, STEPS, TAR, Step, clone

EACH = 24  # flips of every kind of file for every command that reads it


@dataclass(frozen=True)
class Target:
    """files: patterns of the files of one kind. readers: names of STEPS or READERS. left: the run that was killed.

    compared: the outputs that must stay the same, if not all: a weights file's own SHA-256 is in some.
    """

    files: tuple[str, ...]
    readers: tuple[str, ...]
    killed: str = ""
    compared: tuple[str, ...] = ()
    prints: bool = False  # the result is what the command prints


# Commands besides STEPS. An output of () is what is printed.
READERS = {
    "shards info": Step("shards info shards/tiny", ()),
    "shards verify": Step("shards verify shards/tiny", ()),
    "verify vcq": Step("shards verify shards/tiny-vcq", ()),
    "reconstruct": Step(f"generate --task reconstruct --model {LEASE} --out restored", ("restored",)),
    "outpaint": Step(f"generate --task outpaint --model {LEASE} --out restored", ("restored",)),
    "evaluate images": Step(f"evaluate probe --model {LEASE} --out scores/images --set evaluate.source=images",
                            ("scores/images",)),
    "fid of npz": Step("evaluate fid --samples ar-samples/samples.npz --out scores/npz.json", ("scores/npz.json",)),
    "encode tars": Step(f"encode --manifest packed/tar.parquet {TAR} --out "
                        "shards/packed --reports reports/packed", ("shards/packed", "reports/packed")),
    "encode parquet": Step(f"encode --manifest packed/rows.parquet {ROWS} "
                           "--out shards/packed --reports reports/packed", ("shards/packed", "reports/packed")),
    "given centroids": Step("kmeans --set kmeans.centroids=data/tiny/kmeans/centroids.npy --set "
                            "inputs.centroids=data/tiny/kmeans/centroids.npy --out given.npy --reports given",
                            ("given.npy", "given.npy.sha256", "given")),
}  # fmt: skip
SHARDS = ("shards info", "export pt", "export webdataset", "export hf", "pretrain lease", "condition", "reconstruct",
          "outpaint", "entropy", "evaluate probe", "evaluate knn", "evaluate few-shot")  # fmt: skip
TARGETS = {
    "shards": Target(("shards/tiny/**/*",), SHARDS),
    "shards, verified": Target(("shards/tiny/**/*",), ("shards verify",), prints=True),
    "shards of vcq": Target(("shards/tiny-vcq/**/*",), ("ar train", "entropy")),
    "codebook": Target(("data/tiny/kmeans/*",), ("encode", "given centroids", "import")),
    "sampled features": Target(("data/tiny/features.zarr/**/*",), ("kmeans",)),
    "model": Target((f"{LEASE}/model.pt",), ("generate", "condition", "evaluate probe", "evaluate fine-tune",
                                            "evaluate images", "reconstruct")),
    "conditional model": Target((f"{CLASSES}/model.pt",), ("generate class",)),
    "1-D tokenizer": Target(("runs/tiny/vcq/tokenizer.pt",), ("vcq encode", "ar sample", "vcq evaluate")),
    "autoregressive model": Target(("runs/tiny/ar/model.pt", "runs/tiny/ar/nll.json"), ("ar sample", "entropy")),
    "run card": Target((f"{LEASE}/run.json",), ("generate", "evaluate probe")),
    "checkpoint": Target(("work/pretrain*/**/*",), ("pretrain lease",), killed="pretrain lease"),
    "checkpoint of vcq": Target(("work/vcq*/**/*",), ("vcq train",), killed="vcq train"),
    "checkpoint of ar": Target(("work/ar*/**/*",), ("ar train",), killed="ar train"),
    "checkpoint of condition": Target(("work/condition*/**/*",), ("condition",), killed="condition"),
    "chunks": Target(("work/encode*/*.npz",), ("encode",), killed="encode"),
    "chunks of features": Target(("work/sample_features*/*.npz",), ("sample-features",), killed="sample-features"),
    "sampled batches": Target(("work/generate*/**/*.npz",), ("generate",), killed="generate"),
    "manifest": Target(("data/tiny/manifest/*",), ("sample-features", "encode", "vcq train", "vcq encode",
                                                   "evaluate reference", "evaluate fid", "evaluate nearest",
                                                   "evaluate images")),
    "manifest's cache": Target(("work/manifest-cache/**/*",), ("manifest",), killed="manifest"),
    "encoder features": Target(("work/features*/*",), ("evaluate knn",), killed="evaluate knn"),
    "images": Target(("images/**/*.png",), ("sample-features", "encode", "vcq train", "vcq encode", "evaluate images",
                                           "evaluate reference", "evaluate fid", "evaluate nearest",
                                           "evaluate fine-tune")),
    "images in a tar": Target(("packed/images.tar",), ("encode tars",)),
    "images in parquet": Target(("packed/images.parquet",), ("encode parquet",)),
    "samples": Target(("samples/images/*.png",), ("evaluate fid", "evaluate nearest")),
    "samples in npz": Target(("ar-samples/samples.npz",), ("fid of npz", "vcq evaluate")),
    "exported pt": Target(("tokens.pt",), ("import",), compared=("shards/imported/tokens.zarr/gen",
                                                                "shards/imported/tokens.zarr/disc")),
    "exported tars": Target(("tars/*",), ("pretrain streamed",)),
    "VQGAN": Target(("vqgan.ckpt",), ("encode",), compared=("shards/tiny/tokens.zarr/gen",
                                                            "reports/tiny/reconstructions.png")),
    "teacher": Target(("teacher.pth",), ("sample-features", "encode"),
                      compared=("data/tiny/features.zarr", "shards/tiny/tokens.zarr/disc")),
}  # fmt: skip


def step_of(name: str) -> Step:
    return STEPS.get(name) or READERS[name]


def prepare(target: Target, step: Step, world: Path, killed: Path, folder: Path) -> Path:
    """A copy of the world in which the step has not run, with the work that the killed run left."""
    root = folder / "world"
    shutil.rmtree(root, ignore_errors=True)
    clone(world, root, step.outs)
    if target.killed:
        shutil.copytree(killed / target.killed.replace(" ", "-"), root / "work")
    return root


def leave_unfinished(world: Path, folder: Path) -> None:
    """folder/STEP: the work folder of each step that TARGETS needs unfinished, killed in the middle of its events.

    The two that keep a cache for later runs are run to their end instead.
    """
    for name in sorted({target.killed for target in TARGETS.values()} - {""}):
        step, root = STEPS[name], folder / "world"
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(folder / name.replace(" ", "-"), ignore_errors=True)
        clone(world, root, step.outs)
        events = len(child.run(step.again, root).events)
        if name not in ("manifest", "evaluate knn"):
            shutil.rmtree(root)
            clone(world, root, step.outs)
            child.run(step.again, root, kill_at=events * 6 // 10)
        (root / "work").rename(folder / name.replace(" ", "-"))
        shutil.rmtree(root)


def cases(world: Path, folder: Path, only: str = "") -> Iterator[Case]:
    """EACH flips for every kind of file and every command that reads it."""
    killed = folder / "killed"
    if concerns(only, "flips"):
        leave_unfinished(world, killed)
    for kind, target in TARGETS.items():
        for reader in target.readers:
            if not concerns(only, f"flips/{kind}/{reader}"):
                continue
            step, root = step_of(reader), prepare(target, step_of(reader), world, killed, folder)
            outcome = child.run(step.again, root)
            if outcome.status:
                raise RuntimeError(f"`semdict {step.words}` fails without any fault: {outcome.err[-2000:]}")
            reference = Result.of(target, step, root, world, outcome)
            shutil.rmtree(root)
            for number in range(EACH):
                name = f"flips/{kind}/{reader}/{number:03d}"
                yield Case(name, Flip(name, target, step, world, killed, reference))


@dataclass(frozen=True)
class Result:
    """What a reader makes of its input: published bytes, or what it prints."""

    digests: dict[str, str]
    printed: str

    @classmethod
    def of(cls, target: Target, step: Step, root: Path, world: Path, outcome: child.Outcome) -> "Result":
        digests = Snapshot(root, world).published(target.compared or step.outs)
        return cls(digests, outcome.out if not step.outs else "")


@dataclass(frozen=True)
class Flip:
    """One flipped bit of one file, and the command that reads it."""

    name: str
    target: Target
    step: Step
    world: Path
    killed: Path
    reference: Result

    def __call__(self, folder: Path) -> Verdict:
        root = prepare(self.target, self.step, self.world, self.killed, folder)
        flipped = flip(self.name, root, self.target)
        outcome = child.run(self.step.again, root)
        fault, text = fault_of(outcome)
        if fault:
            return Verdict("flipped", fault, f"{flipped}: {text}")
        if outcome.status:
            return Verdict("detected", peak=outcome.peak, seconds=outcome.seconds)
        result = Result.of(self.target, self.step, root, self.world, outcome)
        if result != self.reference or self.target.prints:
            names = [n for n in result.digests if result.digests[n] != self.reference.digests.get(n)]
            return Verdict("flipped", "silent", f"{flipped}: another result, exit status 0: {names[:3]}")
        return Verdict("harmless", peak=outcome.peak, seconds=outcome.seconds)


def flip(name: str, root: Path, target: Target) -> str:
    """Flip one bit, of a file and at a place that follow from the name; returns both. Times of the file stay."""
    rng = rng_of(name)
    files = sorted({path for pattern in target.files for path in root.glob(pattern) if path.is_file()})
    files = [path for path in files if path.stat().st_size and not path.name.startswith(".")]
    path = files[rng.integers(len(files))]
    data, times = bytearray(path.read_bytes()), path.stat()
    at = int(rng.integers(len(data) * 8))
    data[at // 8] ^= 1 << at % 8
    path.unlink()  # the file is a link to the world's own
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return f"{path.relative_to(root)} bit {at}"
