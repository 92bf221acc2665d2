"""`semdict condition`: what is fine-tuned and what stays, conditions of the decoder, kill and resume, errors."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file

from semdict.cli import main
from semdict.pipeline.common.errors import UsageError, WeightsError
from semdict.pipeline.config.schema import Condition
from semdict.pipeline.shards import Block, ShardSpec, write_shards
from semdict.train.engine.logging import read_log
from semdict.train.engine.model_file import load_model, save_model
from semdict.train.engine.rng import batch_generator
from semdict.train.masked.class_conditional_model import (
    ConditionalConfig,
    ConditionalReconstruction,
    ConditionalTransformer,
)
from semdict.train.masked.model import MaskedTokenTransformer, model_config
from semdict.train.masked.objectives.mage import Masking
from semdict.train.masked.released import load_released
from tests import tiny
from tests.test_pretrain import CODES, ENV, WORDS, write_tokens

TRAINED = {"decoder_embed", "decoder_position", "decoder_blocks", "decoder_norm"}  # of the pretrained model
SHAPE = {"width": 32, "depth": 1, "heads": 2, "decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2, "grid": 4}


def base(family: str = "lease", seed: int = 1) -> MaskedTokenTransformer:
    """Untrained, but with the long rows of a trained word table: the frozen head cannot stretch its logits."""
    model = MaskedTokenTransformer(model_config(family, "tiny", CODES, **tiny.architecture(family), **SHAPE), seed)
    with torch.no_grad():
        model.token_emb.word.weight.mul_(5)
    return model


def conditional(words: int = WORDS, class_width: int = 0, classes: int = 4, family: str = "lease"):
    model = base(family)
    config = ConditionalConfig(replace(model.config, dropout=0.0), classes, class_width, words, 6 if words else 0)
    rng = torch.Generator().manual_seed(0)
    conditioned = ConditionalTransformer(config, MaskedTokenTransformer(config.base), seed=3)
    conditioned.base.load_state_dict(model.state_dict())
    vectors = torch.randn(classes, class_width, generator=rng) if class_width else None
    conditioned.fill(vectors, torch.randn(words, 6, generator=rng) if words else None)
    with torch.no_grad():  # rows of a missing class and missing centroids
        for row in (conditioned.no_class, conditioned.no_word):
            if row is not None:
                row.normal_(generator=rng)
    return conditioned


@pytest.fixture(scope="module")
def tokens():
    rng = torch.Generator().manual_seed(5)
    return torch.randint(0, CODES, (6, 16), generator=rng), torch.randint(0, WORDS, (6, 16), generator=rng)


def batch_of(tokens) -> dict:
    gen, disc = tokens
    return {"gen": gen, "disc": disc, "label": torch.tensor([0, 1, 2, 3, -1, 2]), "row": torch.arange(6)}


@pytest.mark.parametrize("family", ["lease", "mage"])
@pytest.mark.parametrize("class_width", [0, 5])
def test_the_decoder_attends_to_the_condition_rows(tokens, family, class_width):
    """The whole pass written out: frozen latents, decoder input, class row, centroid rows at their cells' positions."""
    model = conditional(class_width=class_width, family=family).eval()
    (gen, disc), b = tokens, model.base
    inputs = gen.masked_fill(torch.arange(16) % 3 == 0, b.mask_token)
    unknown = inputs == b.mask_token
    labels = torch.tensor([0, 1, 2, 3, 4, 2])  # 4 = no class
    disc = disc.clone()
    disc[1] = -1
    got = model.conditioned(labels, disc).logits_at(inputs, unknown)
    u = b.decoder_embed(b.encode(inputs))
    position = b.decoder_position.weight
    x = b.decoder_input(u, unknown) + position[:17]
    vectors = F.normalize(model.class_vectors, dim=1) * 5**0.5 if class_width else None
    rows = [model.no_class if n == 4 else model.class_embed(vectors[n] if class_width else torch.tensor(n))
            for n in labels.tolist()]  # fmt: skip
    cells = [[model.no_word if w < 0 else model.word_embed(model.centroids[w]) for w in row] for row in disc.tolist()]
    beside = torch.stack([torch.stack(row) for row in cells]) + position[1:17]
    x = torch.cat([x, torch.stack(rows)[:, None], beside], dim=1)
    assert x.shape[1] == 1 + 16 + 1 + 16
    for block in b.decoder_blocks:
        x = block(x)
    want = b.token_logits(b.decoder_norm(x))[:, 1:17][unknown]
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(model.logits(inputs, labels, disc)[unknown], want, atol=1e-5)
    assert not torch.allclose(got, b.logits_at(inputs, unknown), atol=1e-3), "the condition changes the logits"


def test_every_word_is_projected_once_where_that_is_cheaper(tokens):
    model = conditional()
    words = tokens[1]
    assert words.numel() > WORDS >= words[:1, :10].numel()
    apart = torch.stack([model.word_embed(model.centroids[row]) for row in words])
    assert torch.allclose(model.word_rows(words), apart + model.base.decoder_position.weight[1:17], atol=1e-6)


def test_only_the_decoder_and_the_new_rows_take_gradients(tokens):
    model = conditional().train()
    objective = ConditionalReconstruction(0.3, 0.3, Masking(), 0.1)
    loss, _ = objective(model, batch_of(tokens), torch.Generator().manual_seed(0))
    loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    parts = {name.split(".")[1] if name.startswith("base.") else name.split(".")[0] for name in moved}
    assert parts == {*TRAINED, "class_embed", "no_class", "word_embed", "no_word"}
    assert all(p.requires_grad == (name.split(".")[1] in TRAINED)
               for name, p in model.named_parameters() if name.startswith("base."))  # fmt: skip


@pytest.mark.parametrize("class_width", [0, 5])
def test_missing_conditions_have_no_influence(tokens, class_width):
    """Without a class no class embedding matters, without words no centroid; an image never sees its neighbour's."""
    model, (gen, disc) = conditional(class_width=class_width).eval(), tokens
    inputs = gen.masked_fill(torch.arange(16) % 2 == 0, model.base.mask_token)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    null = torch.full_like(labels, model.null_class)
    before = [model.logits(inputs, null), model.logits(inputs, null, disc), model.logits(inputs, labels, disc)]
    alone = torch.cat([model.logits(inputs[n : n + 1], labels[n : n + 1], disc[n : n + 1]) for n in range(6)])
    assert torch.allclose(alone, before[2], atol=1e-5)
    other = labels.roll(1)
    assert not torch.allclose(model.logits(inputs, other, disc), before[2], atol=1e-3)
    assert not torch.allclose(before[0], before[1], atol=1e-3)
    with torch.no_grad():
        model.class_embed.weight.normal_()
    assert torch.equal(model.logits(inputs, null, disc), before[1])
    assert not torch.allclose(model.logits(inputs, labels, disc), before[2], atol=1e-3)
    model.centroids.normal_()
    assert torch.equal(model.logits(inputs, null), before[0])


def test_numbers_beyond_the_model_are_named(tokens):
    model, plain = conditional(), conditional(words=0)
    zeros, (gen, disc) = torch.zeros(6, dtype=torch.long), tokens
    for tested, labels, words, message in [
        (model, zeros + 5, disc, "label 5 is unknown to the model, which takes 0 to 4"),
        (model, zeros - 1, None, "label -1"),
        (model, zeros, disc + WORDS, r"word \d+ is unknown to the model, which takes -1 to 11"),
        (plain, zeros, disc, "condition.centroids"),
    ]:
        with pytest.raises(UsageError, match=message):
            tested.logits(gen, labels, words)


def test_a_file_rebuilds_the_model(tokens, tmp_path):
    model = conditional(class_width=5).eval()
    save_model(tmp_path / "model.pt", model, {"step": 3})
    for path in (tmp_path, tmp_path / "model.pt"):
        again, file = load_model(path, ConditionalTransformer)
        assert file.about == {"step": 3} and again.config == model.config and not again.training
        labels = torch.tensor([0, 1, 2, 3, 4, 2])
        assert torch.equal(again.logits(tokens[0], labels, tokens[1]), model.logits(tokens[0], labels, tokens[1]))
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"kind": "semdict-conditional", "config": model.config.to_dict(), "model": {}}, tmp_path / "none.pt")
    save_model(tmp_path / "plain.pt", base(), {})
    for name, message in {"half": "half.pt", "none": "does not fit", "plain": "semdict condition --model"}.items():
        with pytest.raises(WeightsError, match=message):
            load_model(tmp_path / f"{name}.pt", ConditionalTransformer)


def test_the_frozen_encoder_has_no_dropout(tokens):
    model = conditional()
    config = replace(model.config, base=replace(model.config.base, dropout=0.5))
    shaky = ConditionalTransformer(config)
    shaky.load_state_dict(model.state_dict())
    with_dropout = shaky.train().conditioned(torch.zeros(6, dtype=torch.long), None)
    latents = [with_dropout.encode(tokens[0]) for _ in range(2)]
    hidden = torch.ones_like(tokens[0], dtype=torch.bool)
    assert torch.equal(latents[0], latents[1]) and torch.equal(latents[0], model.base.eval().encode(tokens[0]))
    assert not torch.equal(*(with_dropout.decode(latents[0], hidden) for _ in range(2))), "the decoder has"


def test_conditions_are_dropped_independently_and_by_row(tokens):
    telling = ConditionalReconstruction(0.3, 0.6, Masking(), 0.1)
    labels, words = torch.zeros(4000, dtype=torch.long), torch.zeros(4000, 16, dtype=torch.long)
    rng = [batch_generator(7, start, 4000) for start in (0, 0, 2000)]
    all_labels, all_words = telling.drop(labels, words, 9, rng[0])
    no_label, no_word = all_labels == 9, (all_words == -1).all(1)
    assert torch.equal(no_word, (all_words == -1).any(1)), "an image's words go all together"
    for share, want in ((no_label, 0.3), (no_word, 0.6), (no_label & no_word, 0.18)):
        assert abs(float(share.float().mean()) - want) < 0.03
    halves = [telling.drop(labels[:2000], words[:2000], 9, generator) for generator in rng[1:]]
    assert torch.equal(torch.cat([half[0] for half in halves]), all_labels)
    assert torch.equal(torch.cat([half[1] for half in halves]), all_words)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "set"
    write_tokens(path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch, shards) -> Path:
    """A folder with params.yaml and a pretrained model, which is the current one."""
    monkeypatch.chdir(tmp_path)
    tree = tiny.preset("demo")
    condition = {
        "epochs": 5, "warmup_epochs": 1, "batch": 12, "base_lr": 0.3, "dropout": 0.0, "precision": "float32",
        "held_out": ["train"],
    }  # fmt: skip
    runtime = {"device": "cpu", "log_every": 1, "save_every": 3, "tensorboard": False}
    tree = tiny.replaced(tree, condition=condition, runtime=runtime)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    about = {"token_set": {"recipe": {"seed": 0}}, "cfg": {"epochs": 1}}
    save_model(tmp_path / "runs" / "base" / "model.pt", base(), about)
    return tmp_path


def command(shards: Path, *options: str) -> list[str]:
    return ["condition", "--model", "runs/base", "--shards", str(shards), *options]


def test_a_run_learns_its_conditions_and_changes_the_decoder_only(folder, shards, capsys):
    """The tokens' own entropies are the floors: 0 by class and word, ln 2 by class; nothing else of the model moves."""
    values = ("epochs=800", "batch=24", "base_lr=0.1", "label_smoothing=0.0")
    options = [text for value in values for text in ("--set", f"condition.{value}")]
    options += ["--set", "runtime.log_every=50", "--set", "runtime.save_every=0"]
    assert main(command(shards, *options)) == 0
    out = folder / "runs" / "demo" / "base-conditional"
    model, file = load_model(out, ConditionalTransformer)
    before = load_model(folder / "runs" / "base", MaskedTokenTransformer)[0].state_dict()
    after = model.base.state_dict()
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == TRAINED
    metrics = json.loads((folder / "reports" / "demo" / "base-conditional" / "metrics.json").read_text())
    losses = metrics["held_out"]
    assert (
        losses["conditional"] < 0.1
        and 0.98 * np.log(2) < losses["class_only"] < 0.85
        and losses["class_only"] < losses["unconditional"]
    )
    assert metrics["classes"] == 4 and losses["images"] == 49 and file.about["model"]["name"] == "base"
    chance = metrics["chance"]["loss"]  # in the layout of `semdict pretrain`, which `semdict report` reads
    assert chance == pytest.approx(np.log(CODES)) and metrics["final"]["loss"] < 0.6 * chance
    assert torch.allclose(model.centroids.norm(dim=1), torch.full((WORDS,), 6**0.5), atol=1e-5)
    nothing = torch.full((5, 16), model.base.mask_token)  # codes of class c are 4c and 4c + 1
    chances = model.logits(nothing, torch.arange(5)).softmax(-1).mean(1).reshape(5, 4, 4)[..., :2].sum(-1)
    assert (chances.diagonal() > 0.8).all() and chances[4].max() < 0.8, chances
    assert main(command(shards, *options, "--resume")) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert main(command(shards, "--resume")) == 2
    assert "epochs: 800 -> 5" in capsys.readouterr().err


def test_kill_9_and_resume_is_bit_exact(folder, shards):
    options = ("--set", "condition.epochs=30", "--set", "condition.dropout=0.1")
    module = [sys.executable, "-m", "semdict.train.masked.condition", *command(shards, *options)[1:]]
    process = subprocess.Popen(module, env=ENV, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob("work/condition-*/checkpoints/step-00000006.pt")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "runs" / "demo").exists()
    assert main(command(shards, *options, "--resume")) == 0
    assert main(command(shards, *options, "--out", "whole", "--reports", "r")) == 0
    paths = (folder / "runs" / "demo" / "base-conditional", folder / "whole")
    broken, whole = (load_model(path, ConditionalTransformer)[0].state_dict() for path in paths)
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    curves = [[row["loss"] for row in read_log(path / "log.jsonl")] for path in paths]
    assert curves[0] == curves[1] and len(curves[0]) == 120


@pytest.mark.slow
def test_two_processes_reproduce_the_curve(folder, shards):
    assert main(command(shards)) == 0
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    module = [*runner, "-m", "semdict.train.masked.condition", *command(shards, "--out", "two", "--reports", "r")[1:]]
    process = subprocess.run(module, env=ENV, stderr=subprocess.PIPE, text=True, timeout=180, check=False)
    assert process.returncode == 0, process.stderr
    one, two = (
        read_log(path / "log.jsonl") for path in (folder / "runs" / "demo" / "base-conditional", folder / "two")
    )
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=2e-4)


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_class_embeddings_come_from_a_file(folder, shards, suffix):
    table, path = np.random.default_rng(0).normal(size=(7, 10)).astype(np.float16), folder / f"clip.{suffix}"
    np.save(path, table) if suffix == "npy" else save_file({"text": torch.from_numpy(table)}, path)
    options = ("--set", "condition.centroids=false", "--set", "condition.epochs=1")
    assert main(command(shards, *options, "--set", f"condition.class_embeddings={path}")) == 0
    model, _ = load_model(folder / "runs" / "demo" / "base-conditional", ConditionalTransformer)
    want = F.normalize(torch.from_numpy(table).float(), dim=1) * 10**0.5
    assert model.null_class == 7 and model.word_embed is None and torch.allclose(model.class_vectors, want)
    path.rename(folder / f"moved.{suffix}")
    again = command(shards, *options, "--embeddings", f"moved.{suffix}", "--resume")
    assert main(again) == 0, "the bytes count, not the path"


class Trap:
    """Unpickling it would leave a file behind."""

    def __reduce__(self):
        return os.system, ("touch sprung",)


def write_wrong(folder: Path) -> None:
    np.save(folder / "few.npy", np.zeros((3, 5), np.float32))
    np.save(folder / "flat.npy", np.zeros(5, np.float32))
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, folder / "two.safetensors")
    np.save(folder / "nan.npy", np.full((4, 5), np.nan, np.float32))
    np.save(folder / "trap.npy", np.array([Trap()], object), allow_pickle=True)
    torch.save(Trap(), folder / "trap.pt")
    save_model(folder / "runs" / "conditional" / "model.pt", conditional(), {})
    write_tokens(folder / "other", seed=1)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--set", "condition.class_embeddings=few.npy"), 2, ("few.npy has 3 rows", "labels up to 3")),
        (("--set", "condition.class_embeddings=flat.npy"), 1, ("flat.npy", "(classes, width)")),
        (("--set", "condition.class_embeddings=two.safetensors"), 1, ("two.safetensors holds 2 tensors", "a, b")),
        (("--embeddings", "none.npy"), 1, ("none.npy does not exist",)),
        (("--embeddings", "nan.npy"), 1, ("nan.npy", "finite")),
        (("--embeddings", "trap.npy"), 1, ("trap.npy", "was not loaded")),
        (("--embeddings", "trap.pt"), 1, ("trap.pt was refused", "nothing in it was executed")),
        (("--model", "trap.pt"), 1, ("trap.pt was refused",)),
        (("--model", "runs/conditional"), 1, ("conditional",)),
        (("--set", "condition.label_dropouts=0.1"), 2, ("condition.label_dropouts is unknown", "label_dropout")),
        (("--set", "condition.held_out=[test]"), 1, ("no split 'test'",)),
        (("--shards", "other"), 1, ("other", "seed: 0 -> 1")),
        (("--shards", "nowhere"), 2, ("nowhere",)),
        (("--model", "runs/none"), 1, ("runs/none", "does not exist")),
    ],
)
def test_mistakes_are_named(folder, shards, capsys, options, status, words):
    write_wrong(folder)
    assert main(command(shards, *options)) == status
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not (folder / "sprung").exists()
    assert not (folder / "runs" / "demo").exists()


def write_random(path: Path, label: list[int], grid: int, codes: int, words: int | None) -> None:
    """Random tokens of images with these labels."""
    rng, n = np.random.default_rng(0), len(label)
    gen, disc = (size and rng.integers(0, size, (n, 1, grid**2)).astype(np.uint16) for size in (codes, words))
    texts = {name: [""] * n for name in ("label_name", "reason")}
    index = pa.table({"key": [str(row) for row in range(n)], "split": ["train"] * n, **texts})
    spec = ShardSpec(n, [{"name": "centre"}], (grid, grid), codes, words, {"seed": 0}, "f")
    centroids = words and rng.normal(size=(words, 6)).astype(np.float32)
    block = Block(gen, disc, np.array(label, np.int32), np.zeros(n, np.uint8))
    write_shards(path, spec, [block], index, centroids=centroids)


@pytest.mark.golden
def test_a_released_checkpoint_can_be_conditioned(folder, golden, capsys):
    """Published ids and tables that are longer than the grid; what is not the decoder stays as it is."""
    write_random(folder / "set", [0, 1, 2] * 3, 16, 1024, None)
    file = str(golden / "lease_tiny.pth")
    options = ["condition", "--model", file, "--num-heads", "4", "--decoder-num-heads", "6", "--shards", "set"]
    short = ["--set", "condition.batch=4", "--set", "condition.epochs=2"]
    assert main([*options, *short]) == 1
    assert "no discriminative tokens" in capsys.readouterr().err
    assert main([*options, *short, "--set", "condition.centroids=false"]) == 0
    model, _ = load_model(folder / "runs" / "demo" / "lease_tiny-conditional", ConditionalTransformer)
    before, after = load_released(file, 4, 6).state_dict(), model.base.state_dict()
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == TRAINED
    assert model.logits(torch.full((1, 256), model.base.mask_token), torch.tensor([2])).shape == (1, 256, 1024)


def test_tokens_without_labels_are_refused(folder, capsys):
    write_random(folder / "bare", [-1, -1], 4, CODES, WORDS)
    assert main(["condition", "--model", "runs/base", "--shards", "bare", "--set", "condition.batch=2"]) == 2
    assert "bare has no labels in ['train']" in capsys.readouterr().err


def test_defaults_are_table_a5():
    c = Condition(**tiny.base()["condition"])
    assert (c.base_lr, c.weight_decay, c.betas, c.batch, c.epochs) == (1.5e-4, 0.05, [0.9, 0.95], 4096, 300)
    assert (c.warmup_epochs, c.clip, c.label_smoothing, c.dropout) == (5, 3.0, 0.1, 0.1)
    assert (c.mask.min, c.mask.max, c.mask.mode, c.mask.std) == (0.5, 1.0, 0.55, 0.25)
