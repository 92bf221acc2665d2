"""The discriminator of the tokenizer, the differentiable augmentation in front of it, and the hinge losses."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.train.engine import dist
from semdict.train.engine.rng import rand_rows

# B images, C colours, H x W pixels; all images in [-1, 1]


class PatchGan(nn.Module):
    """PatchGAN (pix2pix, arXiv:1611.07004): one logit per receptive field of 70 x 70 pixels at 3 layers.

    Group norm instead of batch norm (choice O5), so that real and fake batches share no statistics. 2.77 M parameters.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm_groups: int = 32, seed: int = 0) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            stride = 2 if i < layers - 1 else 1
            parts += [nn.Conv2d(before, after, 4, stride, 1, bias=False)]
            parts += [nn.GroupNorm(math.gcd(norm_groups, after), after), nn.LeakyReLU(0.2)]
        parts.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.net = nn.Sequential(*parts)
        self._init(torch.Generator().manual_seed(seed))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 1, h, w) logits, positive for real."""
        return self.net(images)

    @torch.no_grad()
    def _init(self, rng: torch.Generator) -> None:
        """Normal(0, 0.02) for convolutions, normal(1, 0.02) for norms, as pix2pix."""
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.GroupNorm):
                mean = 1.0 if isinstance(part, nn.GroupNorm) else 0.0
                if not part.weight.is_meta:
                    nn.init.normal_(part.weight, mean, 0.02, generator=rng)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)


def diff_augment(
    images: Tensor, rng: torch.Generator, p: float = 1.0, shift: float = 0.125, cut: float = 0.2
) -> Tensor:
    """DiffAugment (arXiv:2006.10738): each image, with probability p, recoloured, shifted and cut out; differentiable.

    images: (B, 3, H, W) in [-1, 1]; empty pixels become 0, mid grey. shift and cut are shares of the side. Every image
    has its own random numbers from `rng`, so calls on real and fake images are independent (choice O6).
    """
    if p <= 0:
        return images
    uniform_BN = rand_rows(len(images), 8, rng=rng).to(images.device)
    changed = cutout(translate(recolour(images, uniform_BN[:, :3]), uniform_BN[:, 3:5], shift), uniform_BN[:, 5:7], cut)
    return torch.where((uniform_BN[:, 7] < p).view(-1, 1, 1, 1), changed, images)


def recolour(images: Tensor, uniform_B3: Tensor) -> Tensor:
    """Brightness +-0.5, saturation 0 to 2, contrast 0.5 to 1.5, from uniform numbers in [0, 1)."""
    bright, saturate, contrast = uniform_B3.to(images.dtype).view(-1, 3, 1, 1, 1).unbind(1)
    images = images + (bright - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (saturate * 2)
    level = images.mean((1, 2, 3), keepdim=True)
    return level + (images - level) * (contrast + 0.5)


def translate(images: Tensor, uniform_B2: Tensor, shift: float) -> Tensor:
    """Move each image by up to +-shift of its side in whole pixels, zeros where nothing was."""
    B, C, H, W = images.shape
    device = images.device
    reach = torch.tensor([round(H * shift), round(W * shift)], device=device)
    offset_B2 = torch.minimum((uniform_B2 * (2 * reach + 1)).long(), 2 * reach) - reach
    rows_BH = torch.arange(H, device=device) - offset_B2[:, :1]
    columns_BW = torch.arange(W, device=device) - offset_B2[:, 1:]
    inside = ((rows_BH >= 0) & (rows_BH < H))[:, None, :, None] & ((columns_BW >= 0) & (columns_BW < W))[:, None, None]
    cells_BHW = rows_BH.clamp(0, H - 1)[:, :, None] * W + columns_BW.clamp(0, W - 1)[:, None]
    moved = images.flatten(2).gather(2, cells_BHW.view(B, 1, -1).expand(-1, C, -1)).view(B, C, H, W)
    return moved * inside


def cutout(images: Tensor, uniform_B2: Tensor, cut: float) -> Tensor:
    """Zero one square of `cut` of the side per image, its centre anywhere in the image."""
    _, _, H, W = images.shape
    height, width = round(H * cut), round(W * cut)
    top_B1 = (uniform_B2[:, :1] * (H + 1 - height % 2)).long() - height // 2
    left_B1 = (uniform_B2[:, 1:] * (W + 1 - width % 2)).long() - width // 2
    rows_H, columns_W = torch.arange(H, device=images.device), torch.arange(W, device=images.device)
    in_rows_BH = (rows_H >= top_B1) & (rows_H < top_B1 + height)
    in_columns_BW = (columns_W >= left_B1) & (columns_W < left_B1 + width)
    return images * ~(in_rows_BH[:, None, :, None] & in_columns_BW[:, None, None])


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2, in float32 (Lim and Ye, arXiv:1705.02894)."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean of the discriminator's logits, in float32."""
    return -fake.float().mean()


class LeCam:
    """Pulls the discriminator's logits to running means of the other side's (Tseng et al., arXiv:2104.03310).

    mean relu(real - mean fake)^2 + mean relu(mean real - fake)^2, as the authors' code has it; the means start with the
    first batch. Over several ranks each sees the mean of all.
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = decay
        self.means: dict[str, float] = {}  # of the logits on "real" and "fake" images

    def __call__(self, real: Tensor, fake: Tensor) -> Tensor:
        """Scalar penalty; updates the means."""
        real, fake = real.float(), fake.float()
        batch_means = dist.mean(torch.stack([real.detach().mean(), fake.detach().mean()]).double()).tolist()
        for name, value in zip(("real", "fake"), batch_means, strict=True):
            self.means[name] = self.decay * self.means.get(name, value) + (1 - self.decay) * value
        return F.relu(real - self.means["fake"]).square().mean() + F.relu(self.means["real"] - fake).square().mean()

    def state_dict(self) -> dict[str, float]:
        """The means, for a checkpoint."""
        return dict(self.means)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with the means of `state_dict`."""
        self.means = dict(state)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter of `module` takes a gradient; those that did before do again afterwards."""
    taking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in taking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)
