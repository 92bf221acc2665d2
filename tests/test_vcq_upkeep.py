"""Code reset (choice O11) and LeCam regularisation, both off by default."""

import pytest
import torch
from torch import nn

from semdict.train.engine.loop import Clock
from semdict.train.engine.optim import adamw
from semdict.train.vcq.discriminator import LeCam, PatchGan
from semdict.train.vcq.objective import LossWeights, TokenizerObjective
from semdict.train.vcq.quantizer import VariableQuantizer
from semdict.train.vcq.schedule import codebook_sizes
from semdict.train.vcq.usage import CodeReset, CodeResetStep

L, D, K = 8, 4, 64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def quantizer(seed=0):
    module = VariableQuantizer(codebook_sizes("cosine", L, 2, K), D, l2=False)
    module.reset_parameters(rng(seed))
    return module


def one_step(net, optimiser, z_BLD):
    out = net(z_BLD)
    optimiser.zero_grad()
    out.loss.backward()
    optimiser.step()
    return out.ids


def test_reset_reseeds_the_code_its_average_and_its_moments():
    net, average = quantizer(0), quantizer(1)
    optimiser = adamw(nn.ModuleList([net]), (0.9, 0.95), 0.0)
    reset = CodeResetStep(CodeReset(net.sizes_L, protected=2, patience=0.5), net, average, optimiser, seed=5)
    positions = torch.arange(L, dtype=torch.float32)[None, :, None].expand(16, L, D).clone()
    ids = one_step(net, optimiser, positions)
    before, average_before = net.codebook.detach().clone(), average.codebook.detach().clone()
    moments = optimiser.state[net.codebook]["exp_avg"]
    moments.fill_(1)
    reset.add(positions[:8], ids[:8])
    reset.add(positions[8:], ids[8:])
    reset(Clock(3))
    changed = (net.codebook.detach() != before).any(1)
    assert int(changed.sum()) == reset.reset.done > 10
    assert not changed[:2].any()
    assert not changed[ids.unique()].any(), "a code that was used stays"
    codes = torch.nonzero(changed).flatten()
    assert bool((net.sizes_L[net.codebook.detach()[codes, 0].long()] > codes).all()), "from a position that reaches it"
    assert torch.equal(average.codebook[codes], net.codebook[codes])
    assert torch.equal(average.codebook[~changed], average_before[~changed])
    assert not moments[codes].any()
    assert bool((moments[~changed] == 1).all())
    assert not reset.outputs


def test_reset_continues_from_its_state():
    z, ids = torch.randn(4, L, D, generator=rng(2)), torch.zeros(4, L, dtype=torch.int64)
    whole, part = (CodeReset(codebook_sizes("cosine", L, 2, K), 2, patience=6.0) for _ in range(2))
    first, second = quantizer(), quantizer()
    died = [whole.step(first, z, ids, rng(step)) for step in range(6)]
    for step in range(3):
        part.step(second, z, ids, rng(step))
    again = CodeReset(first.sizes_L, 2, patience=6.0)
    again.load_state_dict(part.state_dict())
    for step in range(3, 6):
        assert torch.equal(again.step(second, z, ids, rng(step)), died[step])
    assert again.done == whole.done > 0
    assert torch.equal(first.codebook, second.codebook)


def test_lecam_by_hand_and_from_its_state():
    lecam = LeCam(decay=0.5)
    assert float(lecam(torch.tensor([2.0, 0.0]), torch.tensor([-1.0]))) == pytest.approx((9 + 1) / 2 + 4)
    assert lecam.means == {"real": 1.0, "fake": -1.0}
    other = LeCam(decay=0.5)
    other.load_state_dict(lecam.state_dict())
    real, fake = torch.tensor([3.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    loss = other(real, fake)  # means: real 2, fake 0
    assert other.means == {"real": 2.0, "fake": 0.0}
    assert float(loss.detach()) == pytest.approx(9 + 1)
    loss.backward()
    assert (float(real.grad), float(fake.grad)) == (6.0, -2.0), "no gradient through the means"


def test_lecam_is_part_of_the_discriminators_loss_only_when_weighed():
    images, fakes = torch.rand(2, 3, 32, 32, generator=rng()), torch.rand(2, 3, 32, 32, generator=rng(1))
    net = PatchGan(channels=8)

    def losses(weight):
        objective = TokenizerObjective(LossWeights(perceptual=0.0, start=0, lecam=weight), None)
        return objective.discriminator(fakes, images, net, 0, rng(2))

    (plain, terms), (loss, more) = losses(0.0), losses(0.25)
    assert "lecam" not in terms
    assert float((loss - plain).detach()) == pytest.approx(0.25 * float(more["lecam"]), rel=1e-4)
    assert float(more["lecam"]) > 0
