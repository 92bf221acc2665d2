"""Sampling: the cache changes nothing, an image does not depend on its batch, guidance has the right limits."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from semdict.train.ar.sample import ArSampler
from semdict.train.ar.sampler import sample, sample_code, uniforms
from semdict.train.engine.guidance import MODES, Guidance, combine, cosine_ramp, scales, size_ratio
from semdict.train.engine.model_file import save_model
from semdict.train.vcq.schedule import codebook_sizes
from semdict.train.vcq.tokenizer import PRESETS, Tokenizer1d
from tests import tiny
from tests.test_ar_model import SIZES, TINY, alive, rng

CONSTANT = (64,) * 16


@pytest.mark.parametrize("guidance", [None, Guidance(3.0, 1.5), Guidance(2.0, mode="constant")])
def test_cached_equals_uncached(guidance):
    model = alive()
    labels_B, images = torch.tensor([0, 1, 5, 3, 2, 2]), [7, 8, 9, 10, 11, 12]
    a, b = (sample(model, labels_B, images, 3, 0.9, guidance, cache) for cache in (True, False))
    assert torch.equal(a, b)
    assert a.dtype == torch.int64


def test_an_image_does_not_depend_on_its_batch():
    model = alive()
    labels_B, images = torch.tensor([0, 1, 2, 3, 4]), [10, 11, 12, 13, 14]
    whole = sample(model, labels_B, images, seed=5, guidance=Guidance(1.0))
    parts = [
        sample(model, labels_B[i : i + n], images[i : i + n], 5, guidance=Guidance(1.0)) for i, n in ((0, 2), (2, 3))
    ]
    assert torch.equal(whole, torch.cat(parts))
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = sample(model, labels_B[order], [images[i] for i in order], seed=5, guidance=Guidance(1.0))
    assert torch.equal(shuffled, whole[order])
    assert not torch.equal(whole, sample(model, labels_B, images, seed=6, guidance=Guidance(1.0)))
    twins = sample(model, torch.zeros(2, dtype=torch.int64), [1, 2], seed=5)
    assert not torch.equal(twins[0], twins[1])


def test_samples_stay_below_each_codebook_size():
    model = alive()
    ids_BL = sample(model, torch.arange(625) % 6, list(range(625)), temperature=5.0)  # 625 * 16 = 10,000 draws
    assert bool((ids_BL < torch.tensor(SIZES)).all())
    assert bool((ids_BL.amax(0) >= torch.tensor(SIZES) // 2).all())  # and they do spread out


def test_choice_follows_the_distribution():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0])
    draws = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    counts = torch.bincount(sample_code(logits.expand(len(draws), -1), draws), minlength=5).double() / len(draws)
    torch.testing.assert_close(counts, logits.double().softmax(-1), atol=2e-5, rtol=0)
    edge = sample_code(
        torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]), torch.tensor([1 - 2**-53, 0.0], dtype=torch.float64)
    )
    assert edge.tolist() == [0, 1]


def test_first_position_has_the_models_frequencies():
    model = alive()
    n = 4000
    ids_BL = sample(model, torch.ones(n, dtype=torch.int64), list(range(n)), seed=1)
    p = model(torch.zeros(1, 16, dtype=torch.int64), torch.tensor([1]))[0, 0].softmax(-1)
    assert float((ids_BL[:, 0] == 0).double().mean()) == pytest.approx(float(p[0].detach()), abs=0.03)


def test_draws_belong_to_the_image():
    together, alone = uniforms(3, [5, 6], 16), uniforms(3, [6], 16)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(alone, uniforms(4, [6], 16))
    assert float(uniforms(0, list(range(400)), 16).mean()) == pytest.approx(0.5, abs=0.02)


def test_low_temperature_takes_the_mode():
    model = alive()
    labels_B, images = torch.tensor([0, 1]), [0, 1]
    ids_BL = sample(model, labels_B, images, temperature=1e-4)
    assert torch.equal(ids_BL, sample(model, labels_B, [8, 9], seed=9, temperature=1e-4))
    logits = model(ids_BL, labels_B)
    assert torch.equal(logits.argmax(-1), ids_BL)


def test_mask_off_may_leave_the_codebook():
    model = alive(replace(TINY, mask_vocab="off"))
    ids_BL = sample(model, torch.zeros(50, dtype=torch.int64), list(range(50)), temperature=5.0)
    assert bool((ids_BL >= torch.tensor(SIZES)).any())


def test_bad_requests_are_named():
    model = alive()
    one = torch.tensor([0])
    for labels, images, temperature, match in [(one, [0], 0.0, "temperature"), (one, [0, 1], 1.0, "2 image numbers")]:
        with pytest.raises(ValueError, match=match):
            sample(model, labels, images, temperature=temperature)
    with pytest.raises(ValueError, match=r"\[0, 5\]"):
        sample(model, torch.tensor([6]), [0])
    with pytest.raises(ValueError, match="mode"):
        Guidance(mode="cosine")


@pytest.mark.parametrize("mode", MODES)
def test_no_scale_is_no_guidance(mode):
    assert not scales(Guidance(0.0, 1.5, 0.0, mode), SIZES).any()
    model = alive()
    labels_B, images = torch.tensor([2, 4]), [0, 1]
    plain = sample(model, labels_B, images, seed=2)
    assert torch.equal(plain, sample(model, labels_B, images, seed=2, guidance=Guidance(0.0, 1.5, mode=mode)))
    if mode == "constant":
        assert not torch.equal(plain, sample(model, labels_B, images, 2, guidance=Guidance(9.0, mode=mode)))


def test_limits_of_equation_4():
    """s_t = 0 where K_t = K_min, s where K_t = K_max, in between the share of excess bits."""
    sizes = tuple(codebook_sizes("cosine").tolist())
    s_L = scales(Guidance(7.0, mode="ratio"), sizes)
    assert s_L[0] == s_L[1] == 0
    assert float(s_L[-1]) == 7.0
    assert bool((s_L.diff() >= 0).all())
    at = {5: 0.179, 10: 0.311, 50: 0.661, 128: 0.865}
    for t, ratio in at.items():
        assert float(size_ratio(sizes)[t]) == pytest.approx(ratio, abs=6e-4)
    ramped = scales(Guidance(7.0, 1.5), sizes)
    assert bool((ramped <= s_L).all())
    assert scales(Guidance(7.0, 2.0, mode="ratio_power"), sizes)[50] == pytest.approx(7 * 0.661**2, abs=0.02)


def test_one_codebook_size_is_vanilla_cosine_guidance_bit_for_bit():
    a, b = (scales(Guidance(20.0, 1.5, 0.5, mode), CONSTANT) for mode in ("ramp_ratio", "ramp"))
    assert torch.equal(a, b)
    assert torch.equal(scales(Guidance(4.0, mode="ratio"), CONSTANT), scales(Guidance(4.0, mode="constant"), CONSTANT))


def test_guidance_in_the_anchors_form():
    """g = 1 + s: uncond + g (cond - uncond), g_t = 1 + (g - 1) ramp_t."""
    cond, uncond = torch.randn(3, 9, generator=rng()), torch.randn(3, 9, generator=rng(1))
    s_L = scales(Guidance(3.0, 1.25, mode="ramp"), SIZES)
    g_L = 1 + (4.0 - 1) * cosine_ramp(16, 1.25)
    torch.testing.assert_close(1 + s_L, g_L)
    for s, g in zip(s_L.tolist(), g_L.tolist(), strict=True):
        torch.testing.assert_close(combine(cond, uncond, s), uncond + g * (cond - uncond))
        torch.testing.assert_close(combine(cond, uncond, s), (1 + s) * cond - s * uncond)
    assert torch.equal(combine(cond, uncond, 0.0), cond)
    assert torch.equal(combine(cond, cond, 17.3), cond)


def test_ramp():
    for power in (0.75, 1.0, 2.0):
        ramp_L = cosine_ramp(256, power)
        assert ramp_L[0] == 0
        assert bool((ramp_L.diff() > 0).all())
    assert float(cosine_ramp(256, 1.0)[128]) == pytest.approx(0.5)
    at = {5: 0.0000, 10: 0.0001, 50: 0.0183, 128: 0.278}
    for t, value in at.items():
        assert float(cosine_ramp(256, 1.5)[t]) == pytest.approx(value, abs=6e-4)


# --- the command ---


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tokenizer and a model for its tokens, neither trained, and params.yaml."""
    root = tmp_path_factory.mktemp("ar")
    save_model(root / "runs/tiny/vcq/tokenizer.pt", Tokenizer1d(PRESETS["tiny"], seed=1), {})
    about = {"token_set": {"recipe": {}}, "classes": ["a", "b", "c", "d", "e"]}
    save_model(root / "runs/tiny/ar/model.pt", alive(), about)
    changes = {"preset": "tiny", "runtime": {"device": "cpu"}, "ar_sample": {"per_class": 6, "batch": 1, "scale": 2.0}}
    (root / "params.yaml").write_text(yaml.safe_dump(tiny.merged(tiny.params(root), changes)))
    return root


def ar_sample(root: Path, *options: str) -> int:
    return tiny.semdict(root, "ar", "sample", *options)


def test_samples_are_those_of_the_model(world):
    assert ar_sample(world, "--out", "plain", "--set", "ar_sample.batch=30") == 0
    arrays = np.load(world / "plain" / "samples.npz")
    assert arrays["arr_1"].tolist() == [label for label in range(5) for _ in range(6)]
    guidance = Guidance(2.0, 1.5)
    want = sample(alive(), torch.from_numpy(arrays["arr_1"]), list(range(30)), 0, 1.0, guidance)
    assert np.array_equal(arrays["tokens"], want.numpy())
    assert arrays["arr_0"].shape == (30, 32, 32, 3) and arrays["arr_0"].dtype == np.uint8
    card = json.loads((world / "plain" / "sampling.json").read_text())
    assert (card["images"], card["per_class"], card["draw"]) == (30, 6, "guided") and len(card["model_sha256"]) == 64


def test_a_complete_folder_is_kept(world, capsys):
    assert ar_sample(world, "--out", "kept") == 0
    before = tiny.digest(world / "kept")
    assert ar_sample(world, "--out", "kept") == 2 and "exists" in capsys.readouterr().err
    assert ar_sample(world, "--out", "kept", "--resume") == 0
    assert "nothing to do" in capsys.readouterr().err and tiny.digest(world / "kept") == before
    assert ar_sample(world, "--out", "kept", "--resume", "--set", "ar_sample.seed=5") == 2
    assert ar_sample(world, "--out", "kept", "--resume", "--draw", "unguided") == 2


def test_a_killed_run_continues_with_the_next_image(world, monkeypatch):
    assert ar_sample(world, "--out", "whole") == 0
    command = [sys.executable, "-m", "semdict", "ar", "sample", "--out", "killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=world, env=environment, stderr=subprocess.PIPE, text=True)
    while not list(world.glob("work/ar-sample-*/chunk-000003.npz")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    (folder,) = world.glob("work/ar-sample-*")
    finished, computed, compute = len(list(folder.glob("chunk-*.npz"))), [], ArSampler.batch
    assert 4 <= finished < 30 and not (world / "killed").exists()
    monkeypatch.setattr(ArSampler, "batch", lambda self, numbers: (computed.append(numbers), compute(self, numbers))[1])
    assert ar_sample(world, "--out", "killed", "--resume") == 0
    assert tiny.digest(world / "killed") == tiny.digest(world / "whole")
    assert len(computed) == 30 - finished
    assert not list(world.glob("work/ar-sample-*")) and not list(world.glob("**/*.part"))
