"""Objectives: their sums, gradients, teacher, ranks, and one overfitted batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semdict.pipeline.common.errors import UsageError
from semdict.train.engine.ema import Ema, beta
from semdict.train.engine.loop import Clock
from semdict.train.engine.rng import batch_generator
from semdict.train.masked.model import MaskedTokenTransformer, model_config
from semdict.train.masked.monitor import WithClassifier
from semdict.train.masked.objectives.lease import Lease
from semdict.train.masked.objectives.mage import Mage, Masking
from semdict.train.masked.objectives.sorcen import Sorcen
from tests.tiny import architecture

SHAPE = {"grid": 4, "width": 32, "depth": 2, "heads": 2, "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 2}
CODES, WORDS, DIM = 30, 24, 8
FLOOR = -(0.9 + 0.1 / CODES) * math.log(0.9 + 0.1 / CODES) - 0.1 * (CODES - 1) / CODES * math.log(0.1 / CODES)


def build_model(family, dropout=0.0, seed=0, **changes):
    heads = {"projector": (24, 12), "predictor": (16, 12)} if family == "sorcen" else {}
    fields = {**architecture(family, DIM), **SHAPE, **heads, **changes}
    config = model_config(family, "tiny", codes=CODES, dropout=dropout, **fields)
    return MaskedTokenTransformer(config, seed)


def batch(rows=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    gen = torch.randint(0, CODES, (rows, 16), generator=rng).to(torch.uint16)
    return {"gen": gen, "disc": torch.randint(0, WORDS, (rows, 16), generator=rng).to(torch.uint16)}


def codebook(seed=1):
    return torch.randn(WORDS, DIM, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def objective(family, model, **settings):
    return {"mage": Mage, "lease": lambda **k: Lease(codebook(), **k), "sorcen": lambda **k: Sorcen(model, **k)}[
        family
    ](**settings)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_mage_is_the_masked_cross_entropy():
    model = build_model("mage").eval()
    loss, scalars = Mage()(model, batch(), seeded(3))
    p = Mage().masked_pass(model, batch(), seeded(3))
    logp = model.token_logits(p.features[:, 1:]).log_softmax(-1)
    per_cell = 0.9 * -logp.gather(-1, p.tokens[..., None])[..., 0] - 0.1 * logp.mean(-1)
    assert loss.item() == pytest.approx(((per_cell * p.masked).sum() / p.masked.sum()).item(), rel=1e-6)
    assert set(scalars) == {"loss", "reconstruction"} and not scalars["loss"].requires_grad


@pytest.mark.parametrize("side", ["encoder", "decoder", "both"])
def test_lease_is_its_equation_written_out(side):
    """Reconstruction + lambda times contrast, every logit written out, gradients included."""
    model = build_model("lease", decoder_projection=DIM)
    settings = {"contrast": side, "neighbours": 3, "weight": 0.3, "tau": 0.2, "alpha": 0.15}
    ours = Lease(codebook(), **settings)
    loss, scalars = ours(model, batch(), seeded(3))
    got = gradients(model, loss)
    p, words = ours.masked_pass(model, batch(), seeded(3)), batch()["disc"].long()
    unit = F.normalize(codebook(), dim=1)
    want = ours.reconstruction(model, p)
    if side in ("encoder", "both"):
        total, count = 0.0, 0
        for b in range(6):
            for j, cell in enumerate(p.keep_idx[b].tolist()):
                if p.masked[b, cell]:
                    continue
                logp = (unit @ F.normalize(model.proj_to_dino(p.latents[b, j + 1]), dim=0) / 0.15).log_softmax(0)
                sims = unit @ unit[words[b, cell]]
                near = sims.argsort(descending=True)[:4]
                total, count = total - ((sims[near] / 0.2).softmax(0) * logp[near]).sum(), count + 1
        assert count == 6 * (16 - int(p.masked[0].sum()))
        want = want + 0.3 * total / count
        assert scalars["contrast_encoder"].item() == pytest.approx((total / count).item(), rel=1e-5)
    if side in ("decoder", "both"):
        logits = F.normalize(model.dec_to_dino(p.features[:, 1:][p.masked]), dim=1) @ unit.T / 0.15
        want = want + 0.3 * F.cross_entropy(logits, words[p.masked])
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for name, gradient in gradients(model, want).items():
        torch.testing.assert_close(got[name], gradient, atol=2e-6, rtol=1e-4)


def test_lease_with_everything_masked_has_no_contrast_and_finite_gradients():
    model = build_model("lease")
    everything = Masking(mode=1.0, std=1e-6, low=1.0, high=1.0)
    loss, scalars = Lease(codebook(), masking=everything)(model, batch(), seeded())
    assert scalars["contrast_encoder"] == 0
    assert all(torch.isfinite(g).all() for g in gradients(model, loss).values())


def test_lease_refuses_what_does_not_fit():
    with pytest.raises(UsageError, match="shards have none"):
        Lease(codebook())(build_model("lease"), {**batch(), "disc": None}, seeded())
    with pytest.raises(UsageError, match="encoder projects to 8 dimensions, the codebook has 5"):
        Lease(codebook()[:, :5])(build_model("lease"), batch(), seeded())
    with pytest.raises(UsageError, match="decoder projects to 0"):
        Lease(codebook(), contrast="both")(build_model("lease"), batch(), seeded())
    with pytest.raises(UsageError, match=r"24 neighbours.*24 words"):
        Lease(codebook(), neighbours=24)
    with pytest.raises(UsageError, match="'encodr'"):
        Lease(codebook(), contrast="encodr")


def test_sorcen_adds_up_and_only_the_student_learns():
    model = build_model("sorcen")
    ours = Sorcen(model, weight=0.7, uniform_weight=0.2)
    loss, scalars = ours(model, batch(), seeded())
    want = scalars["reconstruction"] + scalars["uniformity"] + 0.7 * scalars["echo_contrast"]
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    learnt = gradients(model, loss)
    assert {name for name, _ in model.named_parameters()} == set(learnt)
    assert not [p for p in ours.parameters() if p.requires_grad or p.grad is not None]


def test_sorcen_teacher_is_the_student_at_the_start_and_moves_only_after_a_step():
    model = build_model("sorcen")
    ours = Sorcen(model)
    before = {k: v.clone() for k, v in ours.teacher.state_dict().items()}
    for name, value in model.blocks.state_dict().items():
        assert torch.equal(before["parts.blocks." + name], value)
    for parameter in model.parameters():
        parameter.data += 1
    ours(model, batch(), seeded())
    model.eval()
    ours(model, batch(), seeded())
    moved = {k for k, v in ours.teacher.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {f"parts.projector.1.{k}" for k in ("running_mean", "running_var", "num_batches_tracked")}
    statistics = ours.teacher["projector"][1].running_mean.clone()
    ours.after_step(model, Clock(10), epochs=40)
    assert torch.equal(ours.teacher["projector"][1].running_mean, statistics)
    keep = 1 - 0.004 * (1 + math.cos(math.pi / 4)) / 2
    for name, value in ours.teacher.named_parameters():
        student = model.get_parameter(name.removeprefix("parts."))
        torch.testing.assert_close(value, keep * before[name] + (1 - keep) * student, atol=1e-6, rtol=0)


def test_sorcen_as_released_repeats_the_published_deviations():
    model = build_model("sorcen")
    ours = Sorcen(model, as_released=True)
    assert ours.echo_warmup == 11
    for name, value in model.blocks.named_parameters():
        if name.endswith("weight") and "norm" not in name:
            assert not torch.equal(ours.teacher["blocks"].get_parameter(name), value)  # its own initialisation
    before = {k: v.clone() for k, v in ours.teacher.named_parameters()}
    model.eval()
    with torch.no_grad():
        ours(model, batch(), seeded(), Clock(400))  # in evaluation too, and on 1600 epochs
    for name, value in ours.teacher.named_parameters():
        student = model.get_parameter(name.removeprefix("parts."))
        want = beta(400, 1600) * before[name] + (1 - beta(400, 1600)) * student
        torch.testing.assert_close(value, want, atol=1e-6, rtol=0)
    after = {k: v.clone() for k, v in ours.teacher.named_parameters()}
    ours.after_step(model, Clock(400), 500)
    assert all(torch.equal(v, after[k]) for k, v in ours.teacher.named_parameters())
    model.train()
    ours(model, batch(), seeded())[0].backward()
    learnt = {name for name, p in ours.named_parameters() if p.grad is not None}
    assert learnt == {name for name, _ in ours.named_parameters() if name.startswith("teacher.parts.projector")}


@pytest.mark.parametrize("as_released", [False, True])
def test_sorcens_batch_norm_sees_all_ranks_and_as_released_one(as_released):
    """The running mean of the projector after one pass beside another rank's rows, against that of a single process."""

    def running_mean(gather):
        model = build_model("sorcen")
        Sorcen(model, as_released=as_released, gather=gather)(model, batch(), seeded())
        return model.projector[1].running_mean

    alone, beside = running_mean(lambda rows: rows), running_mean(lambda rows: torch.cat([rows, rows.detach() * 3]))
    assert torch.equal(alone, beside) == as_released


@pytest.mark.parametrize("family", ["lease", "sorcen"])
def test_the_online_classifier_is_the_released_one(family):
    """Linear, ReLU, Linear; the CLS latent, which is moved far away here, is in Sorcen's mean and not in LEASE's."""
    model = build_model(family).eval()
    ours = WithClassifier(objective(family, model), model, 32, 3, seed=0)
    assert isinstance(ours.classifier[1], nn.ReLU)
    labelled = {**batch(), "label": torch.zeros(6, dtype=torch.int64)}
    losses = []
    for shift in (0.0, 100.0):

        def move_cls(norm, inputs, out, shift=shift):
            moved = out.clone()
            moved[:, 0] += shift
            ours._remember(norm, inputs, moved)

        model.norm._forward_hooks.clear()
        model.norm.register_forward_hook(move_cls)
        losses.append(float(ours(model, labelled, seeded(), Clock(50))[1]["online_loss"]))
    assert (losses[0] != losses[1]) == (family == "sorcen")


def test_sorcen_needs_its_heads():
    with pytest.raises(UsageError, match="projector and predictor"):
        Sorcen(build_model("mage"))


def test_echo_is_true_codes_in_the_warm_up_and_samples_after():
    model = build_model("sorcen").eval()
    ours = Sorcen(model, echo_warmup=3, top=4)
    p = ours.masked_pass(model, batch(), seeded())
    early, late = (ours.sample_echo(model, p, seeded(5), epoch) for epoch in (2.99, 3.0))
    shown = early != model.mask_token
    assert torch.equal(shown, late != model.mask_token)
    assert torch.equal(early[shown], p.tokens[shown])
    best = model.token_logits(p.features[:, 1:]).topk(5, dim=-1).indices
    likely = (best[..., 1:] == late[..., None]).any(-1)
    assert likely[shown].all() and not (best[..., 0] == late)[shown].any()
    side = int(shown[0].sum()) ** 0.5
    assert side in (2, 3, 4) and (shown.sum(1) == side**2).all()


def test_beta_reaches_one_at_the_end_of_any_run():
    assert beta(0, 7) == pytest.approx(0.996) and beta(7, 7) == 1 and beta(3.5, 7) == pytest.approx(0.998)


def test_average_has_its_own_storage_and_state():
    model = build_model("sorcen")
    ema = Ema(model, ("blocks",))
    model.blocks[0].norm1.weight.data.fill_(5)
    assert ema["blocks"][0].norm1.weight.max() == 1
    ema.update(model, 0.75)
    torch.testing.assert_close(ema["blocks"][0].norm1.weight, torch.full((32,), 2.0))
    again = Ema(build_model("sorcen", seed=9), ("blocks",))
    again.load_state_dict(ema.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ema.parameters(), strict=True))


@pytest.mark.parametrize("family", ["mage", "lease", "sorcen"])
def test_the_batch_and_the_global_generator_are_left_alone(family):
    model = build_model(family).eval()
    inputs, state = batch(), torch.get_rng_state()
    losses = [objective(family, model)(model, inputs, seeded(4), Clock(50))[0] for _ in range(2)]
    assert losses[0] == losses[1] != objective(family, model)(model, inputs, seeded(5), Clock(50))[0]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(inputs["gen"], batch()["gen"]) and torch.equal(inputs["disc"], batch()["disc"])


GROUPS = Masking(group=4)  # of six rows: the border of two ranks cuts a group in two


class Halves(nn.Module):
    """Two ranks in one process: an objective on each half of the batch, rows shared as a gather with gradient does."""

    def run(self, family, inputs, clock):
        model = build_model(family)
        losses, pooled = [], {}
        for final in (False, True):  # first pass records every rank's rows, second one sees them all
            losses = []
            for rank in (0, 1):
                calls = iter(range(99))

                def gather(rows, rank=rank, calls=calls, final=final):
                    call = next(calls)
                    if not final:
                        pooled[rank, call] = rows.detach()
                        return torch.cat([rows, rows])
                    other = pooled[1 - rank, call]
                    return torch.cat([rows, other] if rank == 0 else [other, rows])

                settings = {"gather": gather} if family == "sorcen" else {}
                settings["masking"] = GROUPS
                half = {k: v[3 * rank : 3 * rank + 3] for k, v in inputs.items()}
                ours = objective(family, model, **settings)
                losses.append(ours(model, half, batch_generator(7, 3 * rank, 6), clock)[0])
        return model, losses


@pytest.mark.parametrize("family", ["mage", "lease", "sorcen"])
def test_two_ranks_have_the_loss_of_one(family):
    inputs, clock = batch(), Clock(50)
    model, halves = Halves().run(family, inputs, clock)
    whole = build_model(family)
    want, _ = objective(family, whole, masking=GROUPS)(whole, inputs, batch_generator(7, 0, 6), clock)
    assert (sum(halves) / 2).item() == pytest.approx(want.item(), rel=2e-6)
    # a gather whose backward sums over ranks gives each rank twice the part that it gets here
    if family != "sorcen":
        got, full = gradients(model, sum(halves) / 2), gradients(whole, want)
        for name, gradient in full.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mage", "lease", "sorcen"])
def test_one_batch_is_overfitted(family):
    """Reconstruction falls from ln K to near the label-smoothing floor; the contrast falls well below ln K too."""
    model = build_model(family, width=48, decoder_width=48)
    ours = objective(family, model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    lr_schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, total_iters=300)  # small at the end
    inputs, first = batch(), None
    for step in range(300):
        loss, scalars = ours(model, inputs, seeded(1), Clock(step, 10))
        first = first or {k: v.item() for k, v in scalars.items()}
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        lr_schedule.step()
        ours.after_step(model, Clock(step, 10), 30)
    last = {k: v.item() for k, v in scalars.items()}
    assert first["reconstruction"] > 0.9 * math.log(CODES)
    assert last["reconstruction"] < FLOOR + 0.05, (last, FLOOR)
    if family == "lease":
        assert last["contrast_encoder"] < first["contrast_encoder"] - 1.0, (first, last)
    if family == "sorcen":
        assert last["echo_contrast"] < 0.6 * first["echo_contrast"], (first, last)
