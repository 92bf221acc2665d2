"""Learning rate, discriminator, augmentation, perceptual losses and the objective."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from semdict.pipeline.common.errors import WeightsError
from semdict.train.engine.lr_schedule import ramp, warmup_hold_linear
from semdict.train.vcq.discriminator import (
    PatchGan,
    cutout,
    diff_augment,
    hinge_discriminator,
    hinge_generator,
    recolour,
    translate,
)
from semdict.train.vcq.objective import LossWeights, TokenizerObjective
from semdict.train.vcq.perceptual import LpipsVgg, PerceptualLoss, PerceptualSource, choose_perceptual, load_perceptual
from semdict.train.vcq.tokenizer import Reconstruction


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(batch=4, side=32, seed=0):
    return torch.rand(batch, 3, side, side, generator=rng(seed))


def test_learning_rate_of_the_paper():
    lr = warmup_hold_linear(1e-4, 3e-5, 13_000, 65_000, 1_300_000)
    assert [lr(s) for s in (0, 13_000, 65_000, 1_300_000)] == pytest.approx([0, 1e-4, 1e-4, 3e-5])
    assert lr(6_500) == pytest.approx(5e-5)
    assert lr(40_000) == pytest.approx(1e-4)
    assert lr((65_000 + 1_300_000) / 2) == pytest.approx(6.5e-5)
    assert lr(2_000_000) == pytest.approx(3e-5)
    large = warmup_hold_linear(4e-4, 1e-5, 62_500, 0, 500_000)
    assert large(62_500) == pytest.approx(4e-4)
    assert large(281_250) == pytest.approx(2.05e-4)
    assert warmup_hold_linear(1.0, 0.5, 0, 10, 10)(10) == 1.0
    with pytest.raises(ValueError, match="out of order"):
        warmup_hold_linear(1.0, 0.5, 0, 11, 10)


def test_ramp():
    assert [ramp(s, 20, 10) for s in (0, 19, 20, 25, 30, 99)] == [0, 0, 0, 0.5, 1, 1]
    assert [ramp(s, 20) for s in (19, 20)] == [0, 1]


def test_discriminator_size_and_shape():
    net = PatchGan()
    assert sum(p.numel() for p in net.parameters()) == 2_765_633
    assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 6, 6)
    assert not [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    a, b = pictures(1), pictures(1, seed=1)
    torch.testing.assert_close(net(torch.cat([a, b]))[:1], net(a))  # no statistics across the batch


def test_augmentation_identity_and_independence():
    x = pictures() * 2 - 1
    assert diff_augment(x, rng(), p=0) is x
    once, again, other = diff_augment(x, rng(1)), diff_augment(x, rng(1)), diff_augment(x, rng(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    same = diff_augment(x[:1].expand(4, -1, -1, -1), rng(3))
    assert not torch.equal(same[0], same[1])
    half = diff_augment(x[:1].expand(400, -1, -1, -1), rng(4), p=0.5)
    kept = (half == x[:1]).flatten(1).all(1).double().mean()
    assert 0.4 < float(kept) < 0.6


def test_augmentation_is_differentiable():
    x = (pictures(2, 6) * 2 - 1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: diff_augment(y, rng(1)), (x,))


def test_translation_moves_by_whole_pixels_and_fills_with_zero():
    x = pictures(1, 8)
    still = translate(x, torch.tensor([[0.5, 0.5]]), 0.25)
    assert torch.equal(still, x)
    down = translate(x, torch.tensor([[0.999999, 0.5]]), 0.25)
    assert torch.equal(down[:, :, 2:], x[:, :, :-2])
    assert not down[:, :, :2].any()
    left = translate(x, torch.tensor([[0.5, 0.0]]), 0.25)
    assert torch.equal(left[..., :-2], x[..., 2:])
    assert not left[..., -2:].any()


def test_recolouring_by_hand():
    x = pictures(1)
    middle = torch.tensor([[0.5, 0.5, 0.5]])
    torch.testing.assert_close(recolour(x, middle), x)
    torch.testing.assert_close(recolour(x, torch.tensor([[1.0, 0.5, 0.5]])), x + 0.5)
    torch.testing.assert_close(recolour(x, torch.tensor([[0.5, 0.0, 0.5]])), x.mean(1, keepdim=True).expand_as(x))
    torch.testing.assert_close(recolour(x, torch.tensor([[0.5, 0.5, 0.0]])), x.mean() + (x - x.mean()) / 2)


def test_cutout_zeroes_one_square_inside_the_image():
    ones = torch.ones(500, 3, 20, 20)
    out = cutout(ones, torch.rand(500, 2, generator=rng()), 0.2)
    gone = (out[:, 0] == 0).flatten(1).sum(1)
    assert int(gone.max()) == 16
    assert int(gone.min()) >= 4  # a centre on the corner leaves a quarter
    assert bool((out[:, 0] == out[:, 1]).all())


def test_hinge():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.5])
    assert float(hinge_discriminator(real, fake)) == pytest.approx(0.5 * (0.5 + 0.75))
    assert float(hinge_generator(fake)) == pytest.approx(0.75)


class Pixels(PerceptualLoss):
    name = "pixels"

    def maps(self, images):
        return [images]


def reconstruction(images, seed=3):
    fake = torch.rand(images.shape, generator=rng(seed)).requires_grad_()
    return fake, Reconstruction(fake, torch.zeros(1), torch.zeros(1), torch.tensor(0.25))


def test_objective_adds_the_papers_weights():
    images = pictures(2)
    net = PatchGan(channels=8)
    objective = TokenizerObjective(LossWeights(start=0, ramp=0, augment=0.0), Pixels())
    fake, out = reconstruction(images)
    loss, terms = objective.generator(out, images, net, 5, rng())
    want = (fake - images).abs().mean() + F.mse_loss(fake, images) - 0.1 * net(fake * 2 - 1).mean() + 0.25
    torch.testing.assert_close(loss, want)
    assert set(terms) == {"l1", "vq", "perceptual", "adversarial"}
    loss.backward()
    assert fake.grad.any()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())


def test_adversarial_part_waits_for_its_step():
    images = pictures(2)
    net = PatchGan(channels=8)
    objective = TokenizerObjective(LossWeights(start=10, ramp=4), Pixels())
    fake, out = reconstruction(images)
    assert objective.discriminator(fake, images, net, 9, rng()) is None
    assert "adversarial" not in objective.generator(out, images, net, 9, rng())[1]
    early, full = (objective.generator(out, images, net, s, rng()) for s in (12, 14))
    plain = objective.generator(out, images, net, 9, rng())[0]
    torch.testing.assert_close((early[0] - plain) * 2, full[0] - plain, atol=1e-5, rtol=1e-3)
    loss, terms = objective.discriminator(fake, images, net, 10, rng())
    loss.backward()
    assert fake.grad is None
    assert all(p.grad.any() for p in net.parameters() if p.ndim > 1)
    assert set(terms) == {"discriminator", "real", "fake"}


def test_discriminator_learns_to_tell():
    net, objective = PatchGan(channels=8), TokenizerObjective(LossWeights(start=0), Pixels())
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    real, fake = pictures(8), torch.full((8, 3, 32, 32), 0.5)
    losses = []
    for step in range(30):
        loss, _ = objective.discriminator(fake, real, net, step, rng(step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.8
    assert losses[-1] < 0.2


def test_perceptual_loss_is_never_silently_none(tmp_path):
    with pytest.raises(ValueError, match="there is no perceptual loss"):
        TokenizerObjective(LossWeights(), None)
    off = TokenizerObjective(LossWeights(perceptual=0.0), None)
    assert off.describe()["perceptual"] == "off (weight 0)"
    kinds = {"lpips-vgg": "vgg.pth", "logits": "c.pth"}
    missing = [PerceptualSource(kind, str(tmp_path / name)) for kind, name in kinds.items()]
    with pytest.raises(WeightsError, match=r"(?s)vgg\.pth does not exist.*convnext_small"):
        choose_perceptual(missing)
    with pytest.raises(WeightsError, match=r"vgg\.pth does not exist"):
        load_perceptual(missing[0])
    with pytest.raises(WeightsError, match="unknown"):
        load_perceptual(PerceptualSource("vgg", "x"))
    with pytest.raises(WeightsError, match="no source"):
        choose_perceptual([])


def test_warm_perceptual_hands_over():
    first, second = Pixels(), Pixels()
    first.name = "first"
    objective = TokenizerObjective(LossWeights(), second, first, 10)
    assert objective.perceptual_at(9) is first
    assert objective.perceptual_at(10) is second
    assert objective.describe()["warm_perceptual"] == "first until step 10"
    with pytest.raises(ValueError, match="warm"):
        TokenizerObjective(LossWeights(), second, None, 10)


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """Random weights in torchvision's VGG-16 layout."""
    widths = [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512]
    tensors, layer, before = {}, 0, 3
    for width in widths:
        if width:
            tensors[f"features.{layer}.weight"] = torch.randn(width, before, 3, 3, generator=rng(layer)) * 0.03
            tensors[f"features.{layer}.bias"] = torch.zeros(width)
            before = width
        layer += 2 if width else 1
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(tensors, path)
    return path


def test_lpips_equals_the_package(vgg):
    loss = load_perceptual(PerceptualSource("lpips-vgg", str(vgg)))
    assert isinstance(loss, LpipsVgg)
    assert loss.name.startswith("lpips-vgg:vgg16.pth@")
    a, b = pictures(2, 64).requires_grad_(), pictures(2, 64, 1).requires_grad_()
    got = loss(a, b)
    want = loss.net(a.detach(), b.detach(), normalize=True).mean()  # the package's own forward on [0, 1] images
    torch.testing.assert_close(got, want)
    got.backward()
    assert a.grad.any()
    assert b.grad is None
    assert all(p.grad is None for p in loss.parameters())
    assert float(loss(a, a).detach()) < 1e-9
    assert not loss.train().training


def test_other_bytes_or_layout_are_refused(vgg, tmp_path):
    with pytest.raises(WeightsError, match="SHA-256"):
        load_perceptual(PerceptualSource("lpips-vgg", str(vgg), sha256="0" * 64))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="not torchvision's VGG-16"):
        load_perceptual(PerceptualSource("lpips-vgg", str(tmp_path / "x.pth")))


def test_local_networks(tmp_path):
    """A ViT of its own image size for features, a small ConvNeXt for logits; both depend on the image."""
    model = "vit_tiny_patch16_224"
    vit = timm.create_model(model, num_classes=3, img_size=64)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    features = load_perceptual(PerceptualSource("features", str(tmp_path / "vit.pth"), model=model))
    assert features.prepare.size == (64, 64)
    convnext = timm.create_model("convnext_atto", num_classes=5)
    torch.save(convnext.state_dict(), tmp_path / "c.pth")
    source = PerceptualSource("logits", str(tmp_path / "c.pth"), model="convnext_atto")
    logits = choose_perceptual([PerceptualSource("lpips-vgg", "nowhere.pth"), source])
    assert logits.maps(pictures(1, 64))[0].shape == (1, 5)
    for loss in (features, logits):
        a, b = pictures(1, 64).requires_grad_(), pictures(1, 64, 1)
        value = loss(a, b)
        value.backward()
        assert float(value.detach()) > 0
        assert a.grad.any()
        assert float(loss(b, b).detach()) == 0
    with pytest.raises(WeightsError, match="does not fit"):
        load_perceptual(PerceptualSource("features", str(tmp_path / "c.pth"), model=model))
