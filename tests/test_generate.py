"""`semdict generate`: every task, guidance, kill and resume, torchrun, and refusals."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image

from semdict.cli import main
from semdict.pipeline.config.schema import Generate
from semdict.pipeline.shards import Block, ShardSpec, write_shards
from semdict.pipeline.tokenizers import load_tokenizer
from semdict.train.engine.model_file import load_model, save_model
from semdict.train.masked.class_conditional_model import (
    ConditionalConfig,
    ConditionalTransformer,
)
from semdict.train.masked.context import load_context
from semdict.train.masked.generate import Generation
from semdict.train.masked.model import MaskedTokenTransformer, model_config
from semdict.train.masked.objectives import OBJECTIVES
from semdict.train.masked.samplers import open_sampler
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
ROWS = 5


def write_model(path: Path, codes: int = tiny.CODES) -> None:
    """An untrained MAGE of one block whose head is not flat."""
    shape = {"width": 16, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    model = MaskedTokenTransformer(model_config("mage", "tiny", codes, **shape), seed=2)
    with torch.no_grad():
        model.token_emb.word.weight.mul_(3)
    path.mkdir(parents=True, exist_ok=True)
    save_model(path / "model.pt", model, {"cfg": {"epochs": 1}, "token_set": {"recipe": {"crop": {"name": "a"}}}})


def write_conditional(path: Path, words: int, disc: str = "d", **dropouts: float) -> None:
    """The model of `write_model` with three classes, and centroids of `words` words."""
    base = load_model(path.parent / "mage", MaskedTokenTransformer)[0]
    model = ConditionalTransformer(ConditionalConfig(base.config, 3, 0, words, 6 if words else 0), base, seed=1)
    rng = torch.Generator().manual_seed(0)
    model.fill(None, torch.randn(words, 6, generator=rng))
    with torch.no_grad():
        model.class_embed.weight.mul_(3)
        model.no_class.normal_(generator=rng)
    recipe = {"crop": {"name": "a"}, "disc": {"name": disc}}
    about = {"cfg": {"label_dropout": 0.1, "word_dropout": 0.1, **dropouts}, "token_set": {"recipe": recipe}}
    path.mkdir(parents=True, exist_ok=True)
    save_model(path / "model.pt", model, about)


def write_tokens(path: Path, recipe: dict) -> np.ndarray:
    """Random tokens of five images; the third has a bad status. Returns the good ones, (4, 256)."""
    rng = np.random.default_rng(0)
    gen = rng.integers(0, tiny.CODES, (ROWS, 1, 256)).astype(np.uint16)
    status = np.array([0, 0, 3, 0, 0], np.uint8)
    disc = rng.integers(0, tiny.WORDS, gen.shape).astype(np.uint16)
    gen[2], disc[2] = 65535, 65535
    index = pa.table({name: [name] * ROWS for name in ("key", "label_name", "reason")} | {"split": ["val"] * ROWS})
    index = index.select(["key", "split", "label_name", "reason"])
    spec = ShardSpec(
        ROWS, [{"name": "centre"}], (16, 16), tiny.CODES, tiny.WORDS, {**recipe, "disc": {"name": "d"}}, "f"
    )
    write_shards(path, spec, [Block(gen, disc, np.arange(ROWS, dtype=np.int32) % 3, status)], index)
    return gen[status == 0, 0].astype(np.int64)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    tiny.make_vqgan(root / "vqgan.ckpt")
    write_model(root / "runs" / "mage")
    write_model(root / "runs" / "wide", codes=128)
    for name, words, dropouts in (("classes", 0, {}), ("words", tiny.WORDS, {}), ("always", 0, {"label_dropout": 0.0})):
        write_conditional(root / "runs" / name, words, **dropouts)
    write_conditional(root / "runs" / "strange", tiny.WORDS, disc="e")
    np.save(root / "tokens.npy", write_tokens(root / "shards" / "tiny", {"crop": {"name": "a"}}))
    write_tokens(root / "shards" / "other", {"crop": {"name": "b"}})
    cfg = {"images": 4, "steps": 3, "batch": 3, "shown": 4}
    tree = tiny.replaced(tiny.params(root), generate=cfg, runtime={"device": "cpu"})
    (root / "params.yaml").write_text(yaml.safe_dump(tree))
    return root


@pytest.fixture(autouse=True)
def here(world, monkeypatch):
    monkeypatch.chdir(world)


def generate(*options: str) -> int:
    return main(["generate", "--model", "runs/mage", *options])


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())])


def tokens(folder: Path) -> np.ndarray:
    return np.load(folder / "tokens.npz")["gen"].astype(np.int64)


def originals(folder: Path) -> np.ndarray:
    """Tokens of the images that a folder's samples started from."""
    whole = np.load("tokens.npy")
    return whole[np.searchsorted([0, 1, 3, 4], np.load(folder / "tokens.npz")["rows"])]


def differ(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def test_files_of_an_output(world, capsys):
    assert generate("--out", "a") == 0
    card = json.loads((world / "a" / "generate.json").read_text())
    assert (card["steps"], card["temperature"], card["seed"], card["last"]) == (3, 6.0, 0, "sampled")
    assert card["uint8"] == "truncate" and len(card["model_sha256"]) == 64
    assert sorted(p.name for p in (world / "a").iterdir()) == ["generate.json", "grid.png", "images", "tokens.npz"]
    sampled = tokens(world / "a")
    decoded = load_tokenizer(world / "vqgan.ckpt").decode(torch.from_numpy(sampled)).clamp(0, 1) * 255
    exact = decoded.permute(0, 2, 3, 1).numpy()
    assert differ(pixels(world / "a"), np.floor(exact)) <= 1
    assert np.mean(pixels(world / "a") != np.floor(exact)) < 0.01, "cut off, not rounded"
    assert generate("--out", "rounded", "--set", "generate.uint8=round") == 0
    assert np.mean(pixels(world / "rounded") != np.floor(exact + 0.5)) < 0.01
    assert len(np.unique(sampled)) > 20 and len({tuple(row) for row in sampled}) == 4


def test_the_tokenizer_decodes_a_few_images_at_a_time(world, monkeypatch):
    assert generate("--out", "at-once") == 0
    monkeypatch.setattr("semdict.train.masked.generate.DECODED", 1)
    assert generate("--out", "apart") == 0
    assert differ(pixels(world / "at-once"), pixels(world / "apart")) <= 1


def test_tokens_depend_on_the_seed_and_not_on_the_batch(world):
    for name, change in {"b1": "batch=1", "b4": "batch=4", "seed": "seed=1"}.items():
        assert generate("--out", name, "--set", f"generate.{change}") == 0
    assert np.array_equal(tokens(world / "b1"), tokens(world / "b4"))
    assert differ(pixels(world / "b1"), pixels(world / "b4")) <= 1, "convolutions round by batch size"
    assert (tokens(world / "b1") != tokens(world / "seed")).any(axis=1).all()


@pytest.mark.parametrize("task", ["inpaint", "outpaint", "reconstruct"])
def test_known_tokens_are_those_of_the_image(world, task):
    assert generate("--task", task, "--out", task, "--set", "generate.box=[2,3,5,6]") == 0
    sampled = np.load(world / task / "tokens.npz")["gen"]
    whole = originals(world / task)
    inside = np.zeros((16, 16), bool)
    inside[2:7, 3:9] = True
    same = sampled == whole
    if task == "reconstruct":
        assert (same.sum(1) >= 64).all() and (same.sum(1) < 100).all()
    else:
        known = ~inside if task == "inpaint" else inside
        assert same[:, known.ravel()].all() and not same[:, ~known.ravel()].all(axis=1).any()
    assert Image.open(world / task / "grid.png").size[1] > 3 * 128


def test_real_images_are_a_mix_of_the_split(world):
    """More images are the same and more; all of them once."""
    four, two = (load_context(Path("shards/tiny"), "val", n, []).rows for n in (4, 2))
    assert sorted(four) == [0, 1, 3, 4] and np.array_equal(four[:2], two)


def test_a_complete_folder_is_kept(world, capsys):
    assert generate("--out", "kept") == 0
    before = tiny.digest(world / "kept")
    assert generate("--out", "kept") == 2
    assert "exists" in capsys.readouterr().err
    assert generate("--out", "kept", "--resume", "--set", "generate.batch=1") == 0
    assert "nothing to do" in capsys.readouterr().err and tiny.digest(world / "kept") == before
    assert generate("--out", "kept", "--resume", "--set", "generate.seed=5") == 2


LONG = ("--set", "generate.images=24", "--set", "generate.batch=1", "--set", "generate.steps=12")


def start(*options: str, processes: int = 1) -> subprocess.Popen:
    """`semdict generate` as a program of its own, under torchrun where there are several processes."""
    runner = [sys.executable, "-m", "semdict", "generate"] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "-m", "semdict.train.masked.generate",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*runner, "--model", "runs/mage", *options], env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """Images of a run that nothing interrupts."""
    before = Path.cwd()
    os.chdir(world)
    try:
        assert generate("--out", "whole", *LONG) == 0
    finally:
        os.chdir(before)
    return world / "whole"


def test_a_killed_run_continues_with_the_next_image(world, whole):
    process = start("--out", "killed", *LONG)
    while not list(world.glob("work/generate-*/chunk-000003.npz")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    (folder,) = world.glob("work/generate-*")
    finished = [int(path.stem.removeprefix("chunk-")) for path in folder.glob("chunk-*.npz")]
    assert 4 <= len(finished) < 24 and not (world / "killed").exists()
    kept = {f"{n:06d}.png": (folder / f"result/images/{n:06d}.png").stat().st_mtime_ns for n in finished}
    (folder / f"chunk-{finished[0]:06d}.npz").write_bytes(b"damaged")
    assert generate("--out", "killed", "--resume", *LONG) == 0
    assert tiny.digest(world / "killed") == tiny.digest(whole)
    again = {name for name, made in kept.items() if (world / "killed/images" / name).stat().st_mtime_ns != made}
    assert again == {f"{finished[0]:06d}.png"}, "only the damaged batch is made again"
    assert not list(world.glob("work/generate-*")) and not list(world.glob("**/*.part"))


def test_without_resume_an_interrupted_run_starts_again(world, whole, monkeypatch):
    """Ctrl-C leaves the work folder; the next run without --resume uses nothing of it."""
    compute = Generation.batch

    def interrupted(self, folder: Path, numbers: list[int]):
        if numbers == [2]:
            raise KeyboardInterrupt
        return compute(self, folder, numbers)

    with monkeypatch.context() as patch:
        patch.setattr(Generation, "batch", interrupted)
        assert generate("--out", "anew", *LONG) == 130
    (folder,) = world.glob("work/generate-*")
    assert list(folder.glob("chunk-*.npz"))
    (folder / "result" / "images" / "000099.png").write_bytes(b"left over")
    assert generate("--out", "anew", *LONG) == 0
    assert tiny.digest(world / "anew") == tiny.digest(whole)


def test_another_run_is_not_replaced_at_the_end(world, monkeypatch, capsys):
    """Two runs with one --out: the second to finish stays in its work folder."""
    finish = Generation.finish

    def overtaken(self, sampling) -> None:
        monkeypatch.setattr(Generation, "finish", finish)
        assert generate("--out", "race", "--set", "generate.seed=7") == 0
        finish(self, sampling)

    monkeypatch.setattr(Generation, "finish", overtaken)
    assert generate("--out", "race") == 2
    assert "race exists" in capsys.readouterr().err
    assert json.loads((world / "race" / "generate.json").read_text())["seed"] == 7
    (folder,) = world.glob("work/generate-*")
    assert (folder / "result" / "generate.json").is_file()
    assert generate("--out", "elsewhere", "--resume") == 0 and not folder.exists()


def test_processes_share_the_images(world, whole):
    process = start("--out", "shared", *LONG, processes=2)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error
    assert tiny.digest(world / "shared") == tiny.digest(whole)
    assert error.count("24 images in shared") == 1


def test_a_family_without_an_objective_is_named(world, capsys, monkeypatch):
    """A model of an objective that is not in the table, as after a downgrade."""
    monkeypatch.delitem(OBJECTIVES, "mage")
    assert generate("--out", "new") == 2
    assert "objectives has 'mage'; known: lease, sorcen" in capsys.readouterr().err
    without = (world / "params.yaml").read_text().replace("- mage\n", "")
    (world / "without.yaml").write_text(without)
    params = ("--params", "without.yaml")
    assert generate("--out", "new", *params) == 2
    assert "objective 'mage' is unknown" in capsys.readouterr().err
    assert generate("--out", "new", "--set", "generate.last=argmax", *params) == 0
    assert json.loads((world / "new" / "generate.json").read_text())["last"] == "argmax"


def sampled_by(name: str, task: str, *options: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokens and labels of a call on runs/`name`."""
    out = "-".join([name, task, *options]).replace("/", "_")
    cfg = [word for option in options for word in ("--set", f"generate.{option}")]
    assert main(["generate", "--model", f"runs/{name}", "--task", task, "--out", out, *cfg]) == 0
    sampled = np.load(Path(out) / "tokens.npz")
    labels = sampled.get("labels")
    if "rows" in sampled:
        assert np.array_equal(labels, sampled["rows"] % 3), "the classes of the images themselves"
    return sampled["gen"].astype(np.int64), labels


def test_classes_are_sampled_in_turn_and_matter(world):
    everything, labels = sampled_by("classes", "class")
    assert labels.tolist() == [0, 1, 2, 0]
    chosen, labels = sampled_by("classes", "class", "classes=[2,0]")
    assert labels.tolist() == [2, 0, 2, 0]
    assert (everything == chosen).all(axis=1).tolist() == [False, False, True, True]
    assert np.array_equal(sampled_by("classes", "class", "classes=[2,0]", "batch=1")[0], chosen)
    assert (sampled_by("classes", "class", "scale=3.0")[0] != everything).any(axis=1).all()
    nothing, labels = sampled_by("classes", "unconditional")
    assert labels.tolist() == [3] * 4 and (nothing != everything).any(axis=1).all()


def test_a_model_with_centroids_is_conditioned_on_real_images(world):
    with_words, labels = sampled_by("words", "class")
    assert sorted(labels) == [0, 0, 1, 1], "the classes of the good rows"
    without, labels = sampled_by("words", "class", "words=false")
    assert labels.tolist() == [0, 1, 2, 0] and (with_words[:2] != without[:2]).any(axis=1).all()
    only, labels = sampled_by("words", "class", "classes=[1]", "images=2")
    assert labels.tolist() == [1, 1] and only.shape == (2, 256)


def test_a_conditional_model_keeps_known_tokens(world):
    sampled, labels = sampled_by("words", "inpaint", "box=[0,0,4,16]")
    assert np.array_equal(sampled[:, 64:], originals(world / "words-inpaint-box=[0,0,4,16]")[:, 64:])
    assert sorted(labels) == [0, 0, 1, 1]


@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_guidance_contrasts_conditional_and_unconditional_logits(world, scale):
    """Against two separate whole passes, and no guidance is the class alone."""
    cfg = Generate(**{**tiny.base()["generate"], "scale": scale, "images": 4})
    sampler = open_sampler(Path("runs/words"), None, None, cfg, "class", torch.device("cpu"))
    known = load_context(Path("shards/tiny"), "val", 4, [])
    tokens = torch.from_numpy(known.gen).masked_fill(torch.arange(256) % 2 == 0, sampler.vocab.mask)
    unknown = tokens == sampler.vocab.mask
    model = load_model("runs/words", ConditionalTransformer)[0]
    with torch.no_grad():
        got = sampler.logits_at([1, 3], known)(tokens[[1, 3]], unknown[[1, 3]])
        conditional = model.conditioned(
            torch.from_numpy(known.labels[[1, 3]]).long(), torch.from_numpy(known.disc[[1, 3]])
        )
        unconditional = model.conditioned(torch.tensor([3, 3]), torch.full((2, 256), -1))
        cond, uncond = (one.logits_at(tokens[[1, 3]], unknown[[1, 3]]) for one in (conditional, unconditional))
    assert not torch.allclose(cond, uncond, atol=1e-2)
    assert torch.allclose(got, (1 + scale) * cond - scale * uncond, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "runs/wide"), ("64 codes", "128", "--vqgan")),
        (("--model", "runs/none"), ("runs/none", "does not exist")),
        (("--task", "inpaint", "--set", "generate.images=5"), ("generate.images is 5", "4 images")),
        (("--task", "inpaint", "--set", "generate.split=train"), ("no split 'train'", "val")),
        (("--task", "inpaint", "--set", "generate.box=[0,0,17,1]"), ("generate.box", "16 x 16")),
        (("--task", "inpaint", "--shards", "shards/other"), ("shards/other", "crop")),
        (("--task", "outpaint", "--shards", "nowhere"), ("nowhere",)),
        (("--task", "class"), ("runs/mage has no classes", "semdict condition")),
        (
            ("--model", "runs/classes", "--task", "class", "--set", "generate.classes=[0,3]"),
            ("classes: 3", "3 classes"),
        ),
        (("--model", "runs/always", "--task", "class", "--set", "generate.scale=1.0"), ("label_dropout 0", "scale: 0")),
        (("--model", "runs/always"), ("label_dropout 0",)),
        (("--model", "runs/strange", "--task", "class"), ("another codebook", "disc.name: e -> d")),
        (("--model", "runs/words", "--task", "class", "--shards", "nowhere"), ("nowhere",)),
        (
            ("--model", "runs/words", "--task", "class", "--set", "generate.classes=[2]"),
            ("0 images of the classes [2]",),
        ),
        (("--vqgan", "none.ckpt"), ("none.ckpt does not exist",)),
        (("--set", "generate.step=3"), ("generate.step is unknown", "generate.steps")),
    ],
)
def test_mistakes_are_named_and_leave_nothing(world, capsys, options, words):
    assert generate("--out", "wrong", *options) in (1, 2)
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not list(world.glob("wrong*"))


@pytest.mark.golden
def test_sampling_from_a_released_checkpoint(world, golden, tmp_path):
    """Published layouts, their own tokenizer, ids and last step."""
    options = ["--num-heads", "4", "--decoder-num-heads", "6", "--vqgan", str(golden / "vqgan_tiny.ckpt")]
    cfg = ["--set", "generate.images=1", "--out", str(tmp_path / "out")]
    assert main(["generate", "--model", str(golden / "lease_tiny.pth"), *options, *cfg]) == 0
    card = json.loads((tmp_path / "out" / "generate.json").read_text())
    assert (card["family"], card["last"]) == ("lease", "argmax")
    assert np.load(tmp_path / "out" / "tokens.npz")["gen"].max() < 1024


def test_models_saved_for_the_tests_load(world):
    assert load_model(world / "runs" / "mage", MaskedTokenTransformer)[0].codebook_size == tiny.CODES
