"""Sampling: the cache changes nothing, an image does not depend on its batch, guidance has the right limits."""

from dataclasses import replace

import pytest
import torch

from semdict.train.ar.sampling import choose, sample, uniforms
from semdict.train.engine.guidance import MODES, Guidance, combine, cosine_ramp, scales, size_ratio
from semdict.train.vcq.schedule import codebook_sizes
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
    counts = torch.bincount(choose(logits.expand(len(draws), -1), draws), minlength=5).double() / len(draws)
    torch.testing.assert_close(counts, logits.double().softmax(-1), atol=2e-5, rtol=0)
    edge = choose(
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
