"""The tokenizer: parameter counts to the unit, what depends on what, and that codes carry the image."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from semdict.pipeline.common.errors import WeightsError
from semdict.train.engine.lr_schedule import ramp
from semdict.train.engine.model_file import save_model
from semdict.train.engine.optim import parameter_groups
from semdict.train.vcq.schedule import KINDS
from semdict.train.vcq.tokenizer import (
    PRESETS,
    Tokenizer1d,
    TokenizerConfig,
    load_vcq_tokenizer,
)

TINY = PRESETS["tiny"]
PLAIN = replace(TINY, latent_queries=False)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def worked_out(encoder, decoder, k, d, queries=True):
    """Parameters of a 256-pixel, 16-patch, 256-token tokenizer by hand; depth, width per stack."""
    (de, we), (dd, wd) = encoder, decoder
    stacks = de * (12 * we**2 + 13 * we) + dd * (12 * wd**2 + 13 * wd) + 4 * we + 4 * wd
    pixels = 16 * 16 * 3
    ends = (pixels + 1) * we + (we + 1) * d + (d + 1) * wd + (wd + 1) * pixels + 84 + k * d
    tables = 256 * we + 256 * wd  # patch positions of the encoder, latent positions of the decoder
    if queries:
        tables += (1 + 1 + 2 * 256) * we + (1 + 1 + 257) * wd
    return stacks + ends + tables


def parameter_count(config) -> int:
    with torch.device("meta"):  # allocates nothing
        return sum(p.numel() for p in Tokenizer1d(config).parameters())


@pytest.mark.parametrize(
    ("preset", "d", "queries", "millions"),
    [
        ("base", 8, True, 172.43), ("base", 12, True, 172.50), ("base", 16, True, 172.57), ("base", 32, True, 172.86),
        ("base", 64, True, 173.43), ("base", 8, False, 171.83), ("base", 12, False, 171.91),
        ("base", 64, False, 172.84), ("large", 8, True, 389.97), ("large", 12, True, 390.03),
        ("large", 32, True, 390.29), ("large", 64, True, 390.70), ("large_496", 8, True, 490.74),
    ],
)  # fmt: skip
def test_parameter_counts(preset, d, queries, millions):
    config = replace(PRESETS[preset], dim=d, latent_queries=queries)
    count = parameter_count(config)
    assert round(count / 1e6, 2) == millions
    assert count == worked_out(config.encoder[:2], config.decoder[:2], config.k_max, d, queries)


def test_counts_do_not_depend_on_the_schedule():
    assert len({parameter_count(replace(TINY, schedule=kind)) for kind in KINDS}) == 1


@pytest.mark.parametrize("config", [TINY, PLAIN])
def test_shapes_and_ranges(config):
    model = Tokenizer1d(config).eval()
    images = torch.rand(3, 3, 32, 32, generator=rng())
    out = model(images)
    assert out.images.shape == images.shape
    ids_BL = model.encode(images)
    assert ids_BL.dtype == torch.int64
    assert torch.equal(ids_BL, out.ids)
    assert bool((ids_BL < model.codebook_sizes).all())
    torch.testing.assert_close(model.decode(ids_BL), out.images.detach().clamp(0, 1), atol=1e-5, rtol=1e-5)
    assert model.codebook_size == 64
    quantized = model.features(images, quantized=True)
    torch.testing.assert_close(quantized, model.quantizer.lookup(ids_BL))
    torch.testing.assert_close(model.features(images), F.normalize(out.latents, dim=-1))


@pytest.mark.parametrize("config", [TINY, PLAIN])
def test_everything_depends_on_everything(config):
    model = Tokenizer1d(config).eval()
    images = torch.rand(1, 3, 32, 32, generator=rng(), requires_grad=True)
    for t in (0, 7, 15):
        (gradient,) = torch.autograd.grad(model.encoder(images)[0, t].square().sum(), images)
        cells = gradient.view(3, 4, 8, 4, 8).abs().sum((0, 2, 4))
        assert bool((cells > 0).all())
    codes = torch.randn(1, 16, config.dim, generator=rng(), requires_grad=True)
    weights = torch.randn(1, 3, 32, 32, generator=rng(1))
    (gradient,) = torch.autograd.grad((model.decoder(codes) * weights).sum(), codes)
    assert bool((gradient.abs().sum(-1) > 0).all())


def test_pixels_land_in_their_own_cell():
    """Before smoothing, cell (r, c) of the picture is row r * side + c of the output, in place."""
    decoder = Tokenizer1d(TINY).decoder
    pixels = torch.arange(16 * 3 * 64, dtype=torch.float32).view(1, 16, 192)
    image = decoder._unpatchify(pixels)
    for cell in (0, 1, 5, 15):
        r, c = divmod(cell, 4)
        assert torch.equal(image[0, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8], pixels[0, cell].view(3, 8, 8))


def test_plain_reading_needs_one_token_per_patch():
    with pytest.raises(ValueError, match="16 patches, but tokens is 8"):
        Tokenizer1d(replace(PLAIN, tokens=8))
    with pytest.raises(ValueError, match="not a multiple"):
        Tokenizer1d(replace(TINY, patch=7))


@pytest.mark.slow
def test_eight_images_can_be_learnt_and_the_codes_carry_them():
    config = TokenizerConfig(16, 4, 8, (2, 64, 2), (2, 64, 2), k_max=64)
    model = Tokenizer1d(config)
    coarse = torch.rand(8, 3, 4, 4, generator=rng(5))
    images = F.interpolate(coarse, size=(16, 16), mode="nearest")
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    for step in range(400):
        out = model(images, ramp(step, 200, 100))
        loss = (out.images - images).abs().mean() + out.vq_loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    l1 = float((model(images).images.detach() - images).abs().mean())
    with torch.no_grad():
        blind = model.decoder(torch.zeros(8, 8, config.dim)).clamp(0, 1)
    assert l1 < 0.12  # one constant picture reaches 0.234
    assert float((blind - images).abs().mean()) > 1.5 * l1


def test_bf16_autocast_leaves_the_quantizer_alone():
    model = Tokenizer1d(TINY).eval()
    latents = torch.randn(4, 16, TINY.dim, generator=rng()).bfloat16()
    want = model.quantizer.search(model.quantizer.project(latents.float()))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.rand(2, 3, 32, 32, generator=rng()))
        got = model.quantizer(latents)
    assert torch.equal(got.ids, want)
    assert torch.equal(out.ids, model.quantizer.search(model.quantizer.project(out.latents.float())))
    assert out.vq_loss.dtype == torch.float32
    assert out.latents.dtype == torch.bfloat16


def test_an_id_that_a_position_lacks_is_named():
    model = Tokenizer1d(TINY)
    ids_BL = torch.zeros(2, 16, dtype=torch.int64)
    ids_BL[1, 3] = 40
    with pytest.raises(ValueError, match="id 40 at row 1, position 3"):
        model.decode(ids_BL)


def test_weight_decay_spares_norms_biases_tokens_and_codebook():
    decayed, spared = parameter_groups(Tokenizer1d(TINY), 1e-4, decay_tables=False)
    names = {name for name, _ in decayed["params"]}
    assert decayed["weight_decay"] == 1e-4
    assert spared["weight_decay"] == 0
    assert not [n for n in names if "norm" in n or n.endswith("bias") or "pos_" in n or "codebook" in n]
    assert {"encoder.latents", "decoder.mask_token", "quantizer.codebook"} <= {n for n, _ in spared["params"]}
    assert "encoder.blocks.0.attn.qkv.weight" in names


def test_same_seed_same_weights():
    state, again = Tokenizer1d(TINY, seed=3).state_dict(), Tokenizer1d(TINY, seed=3).state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(state["quantizer.codebook"], Tokenizer1d(TINY, seed=4).quantizer.codebook)


def test_file_round_trip(tmp_path):
    model = Tokenizer1d(replace(TINY, schedule="power", power=2.0), seed=1).eval()
    save_model(tmp_path / "t.pt", model, {"step": 7})
    again = load_vcq_tokenizer(tmp_path / "t.pt")
    images = torch.rand(2, 3, 32, 32, generator=rng())
    assert again.config == model.config
    assert torch.equal(again.encode(images), model.encode(images))
    assert len(again.identity["sha256"]) == 64
    torch.save({"format": "other"}, tmp_path / "o.pt")
    with pytest.raises(WeightsError, match="not written by `semdict vcq train`"):
        load_vcq_tokenizer(tmp_path / "o.pt")
    contents = torch.load(tmp_path / "t.pt", weights_only=True)
    contents["config"]["dim"] = 5
    torch.save(contents, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="does not fit"):
        load_vcq_tokenizer(tmp_path / "w.pt")


@pytest.mark.parametrize("queries", [True, False])
def test_mid_grey_enters_as_nothing_and_leaves_a_new_tokenizer(queries):
    """Choice O20: neither brightness nor random pixels drown what differs between images."""
    tokens = PRESETS["tiny"].tokens if queries else PRESETS["tiny"].patches
    model = Tokenizer1d(replace(PRESETS["tiny"], latent_queries=queries, tokens=tokens))
    embedded = model.encoder.patch_embed(torch.full((1, 3, 32, 32), 0.5))
    assert float(embedded.abs().max()) < 1e-5
    with torch.no_grad():
        out = model(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert float((out.images - 0.5).abs().mean()) < 0.1
