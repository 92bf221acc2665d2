"""A VQGAN of one's own: its layout, its codebook against plain float64 averages, and training from the command line."""

import json

import pytest
import torch
import yaml

from semdict.cli import main
from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.config.schema import VqganTrain
from semdict.pipeline.tokenizers import load_tokenizer
from semdict.pipeline.tokenizers.base import save_tokenizer
from semdict.pipeline.tokenizers.compact import CompactTokenizer
from semdict.pipeline.tokenizers.vqgan import Sizes
from semdict.train.engine.loop import Clock
from semdict.train.vqgan.model import MovingCodebook, Vqgan
from tests.tiny import TEACHER, base, digest, make_images, make_teacher, merged

SIZES = Sizes(
    stem=32, widths=(32, 64), blocks=1, decoder_blocks=1, z_channels=4, codes=16, dim=4, strided=False, patch=4
)


def make_model() -> CompactTokenizer:
    torch.manual_seed(0)
    model = CompactTokenizer(SIZES)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_tokenizer_is_recognised_and_gives_the_same_tokens(tmp_path, dtype):
    model, images = make_model(), torch.rand(2, 3, 32, 32)
    model.load_state_dict({name: tensor.to(dtype).float() for name, tensor in model.state_dict().items()})
    save_tokenizer(model, tmp_path / "tokenizer.pt", dtype)
    loaded = load_tokenizer(tmp_path)
    assert loaded.identity["layout"] == "compact"
    assert (loaded.stride, loaded.grid(32), loaded.codebook_size) == (8, (4, 4), 16)
    tokens = model.encode(images)
    assert torch.equal(loaded.encode(images), tokens)
    assert torch.equal(loaded.decode(tokens), model.decode(tokens))
    with pytest.raises(WeightsError, match="36 is not a multiple of the tokenizer's stride 8"):
        loaded.grid(36)


def test_colours_pass_through_the_network_in_proportion():
    """No norm stands outside the residual blocks: with those at zero the network is linear in the image."""
    model = make_model()
    for name, parameter in model.named_parameters():
        if ".conv2." in name or (name.endswith("bias") and "norm" not in name):
            torch.nn.init.zeros_(parameter)
    grey, dark = torch.full((1, 3, 32, 32), 0.75), torch.full((1, 3, 32, 32), 0.625)
    latents = [model.encode_features(images) for images in (grey, dark)]
    torch.testing.assert_close(latents[0], 2 * latents[1])  # 0.75 is 0.5, 0.625 is 0.25 in [-1, 1]


def test_quantization_is_blended_in_and_its_gradient_passes_straight_through():
    model, images = Vqgan(make_model(), commitment=0.25), torch.rand(2, 3, 32, 32)
    z = model.tokenizer.encode_features(images)
    off, on = model(images, 0.0), model(images, 1.0)
    torch.testing.assert_close(off.images, model.tokenizer.decode_features(z))
    assert off.vq_loss == 0
    torch.testing.assert_close(on.images, model.decode(on.ids))
    assert torch.equal(on.ids, model.encode(images))
    table_KD = model.tokenizer.codebook
    distance = (on.latents - table_KD[on.ids]).square().mean() / table_KD.var(dim=0).mean()
    torch.testing.assert_close(on.vq_loss, 0.25 * distance)
    on.images.square().sum().backward()
    assert model.tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.tokenizer.quantize.embedding.weight.grad is None


def test_the_codebook_is_the_moving_average_of_its_latents():
    """Against the published recursion in float64, with one code never used."""
    rng = torch.Generator().manual_seed(0)
    table_KD = torch.randn(4, 2, generator=rng)
    table_KD[3] = 100
    expected_KD, hits_K, sums_KD = table_KD.double(), torch.ones(4).double(), table_KD.double()
    codebook = MovingCodebook(table_KD, table_KD.clone(), start=0, stop=0, decay=0.9, seed=0)
    for step in range(5):
        latents_BLD = torch.randn(3, 8, 2, generator=rng)
        codebook.add(latents_BLD[:1])  # two micro-batches
        codebook.add(latents_BLD[1:])
        codebook(Clock(step))
        flat_ND = latents_BLD.flatten(0, 1).double()
        ids_N = torch.cdist(flat_ND, expected_KD).argmin(1)
        for k in range(4):
            members_MD = flat_ND[ids_N == k]
            hits_K[k] = 0.9 * hits_K[k] + 0.1 * len(members_MD) / 6
            sums_KD[k] = 0.9 * sums_KD[k] + 0.1 * members_MD.sum(0) / 6
        expected_KD = sums_KD / hits_K[:, None]
        torch.testing.assert_close(table_KD, expected_KD.float(), rtol=1e-4, atol=1e-5)


def test_the_codebook_starts_at_clusters_and_replaces_unused_codes():
    rng = torch.Generator().manual_seed(0)
    centres_KD = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    table_KD = torch.zeros(3, 2)
    average_KD = torch.zeros(3, 2)
    codebook = MovingCodebook(table_KD, average_KD, start=3, stop=100, decay=0.5, seed=4, every=1)
    for step in range(3):
        picks_N = torch.arange(300) % 3
        codebook.add((centres_KD[picks_N] + 0.1 * torch.randn(300, 2, generator=rng)).view(3, 100, 2))
        codebook(Clock(step))
    assert table_KD.any()
    assert torch.equal(table_KD, average_KD)
    used = torch.cdist(table_KD, centres_KD).argmin(1).unique()
    table_KD[0] = 1e4  # a code that no latent is near
    codebook.sums_KD[0], codebook.hits_K[0] = 1e2, 1e-2
    for step in range(3, 10):
        codebook.add((centres_KD[picks_N] + 0.1 * torch.randn(300, 2, generator=rng)).view(3, 100, 2))
        codebook(Clock(step))
    assert codebook.done >= 1
    assert len(used) >= 2
    assert table_KD.abs().max() < 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("vqgan")
    make_images(root / "images")
    make_teacher(root / "net.pth")
    network = str(root / "net.pth")
    source = {"kind": "features", "weights": network, **TEACHER, "layers": 1}
    changes = {
        "preset": "tiny",
        "inputs": {"vqgan": "none", "features": network},
        "runtime": {"save_every": 4, "log_every": 1, "tensorboard": False, "workers": 1},
        "manifest": {"images": {"train": str(root / "images" / "train")}},
        "vqgan": {"weights": "none"},
        "features": {**TEACHER, "weights": network},
        "kmeans": {"k": 2},
        "vcq": {"perceptual": []},
        "vqgan_train": {
            "image_size": 32, "widths": [32, 32], "decoder_blocks": 1, "codes": 16, "dim": 8, "quantize_start": 4,
            "perceptual": [source], "discriminator_start": 8, "discriminator_ramp": 0, "discriminator_channels": 8,
            "held_out": [], "steps": 12, "batch": 4, "warmup": 2, "hold": 10, "lr": 0.003, "ema": 0.5,
            "measured_images": 4, "stored": "float16", "augment": 1.0, "accumulate": 2,
        },
    }  # fmt: skip
    (root / "params.yaml").write_text(yaml.safe_dump(merged(base(), changes)))
    return root


def test_training_from_the_command_line_and_resuming(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    assert main(["manifest", "--params", "params.yaml", "--work", "work"]) == 0
    train = ["vqgan", "train", "--params", "params.yaml"]
    assert main([*train, "--work", "work"]) == 0
    metrics = json.loads((world / "reports/tiny/vqgan/metrics.json").read_text())
    assert {"l1", "l2", "vq", "perceptual", "adversarial", "discriminator_loss"} <= metrics["final"].keys()
    assert metrics["codes_used"] > 1
    tokenizer = load_tokenizer(world / "runs/tiny/vqgan")
    tokens = tokenizer.encode(torch.rand(1, 3, 32, 32))
    assert tokens.shape == (1, 16)
    again = ["--out", "runs/again", "--reports", "reports/again", "--work", "work2"]

    from semdict.train.engine import checkpoint

    write, written = checkpoint.save, []

    def stop_after_second(*args, **kwargs):
        result = write(*args, **kwargs)
        written.append(result)
        if len(written) == 2:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stop_after_second)
        assert main([*train, *again]) == 130
    assert main([*train, *again, "--resume"]) == 0
    assert "continuing" in capsys.readouterr().err
    assert digest(world / "runs/again/tokenizer.pt") == digest(world / "runs/tiny/vqgan/tokenizer.pt")


def test_an_image_size_that_the_stride_does_not_divide_is_refused():
    section = base()["vqgan_train"]
    with pytest.raises(ValueError, match="image_size 120 is not a multiple of the stride 16"):
        VqganTrain(**{**section, "image_size": 120})
