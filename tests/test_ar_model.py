"""The AR model: counts, causality, cache, vocabularies, weight decay, and the entropy of its training set."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from semdict.train.ar.head import grouped_nll, masked_logits
from semdict.train.ar.model import (
    ArConfig,
    ArModel,
    KvCache,
    drop_labels,
    nll_bits,
    preset,
    rope_table,
    rotate,
)
from semdict.train.engine.optim import parameter_groups
from semdict.train.vcq.schedule import codebook_sizes

SIZES = tuple(codebook_sizes("cosine", 16, 2, 64).tolist())
TINY = preset("tiny", SIZES, classes=5)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(batch, sizes=SIZES, seed=0):
    return (torch.rand(batch, len(sizes), generator=rng(seed)) * torch.tensor(sizes)).long()


def alive(config=TINY, seed=0):
    """A model whose adaptive norms are not zero: every path carries signal."""
    model = ArModel(config, seed).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaln" in name:
                parameter.normal_(0, 0.5, generator=rng(seed + 1))
            elif parameter.ndim == 2:
                parameter.normal_(0, 0.2, generator=rng(seed + 2))
    return model


def parameter_count(config) -> int:
    with torch.device("meta"):  # allocates nothing
        return sum(p.numel() for p in ArModel(config).parameters())


@pytest.mark.parametrize(("name", "printed", "ours"), [("b", 115, 114.47), ("l", 343, 343.41), ("xl", 684, 683.77)])
def test_parameter_counts(name, printed, ours):
    config = preset(name, codebook_sizes("cosine"))
    count = parameter_count(config)
    assert round(count / 1e6, 2) == ours
    assert count / 1e6 == pytest.approx(printed, rel=0.005)
    E, V, depth = config.width, 16384, config.depth
    by_hand = 2 * V * E + 1001 * E + 6 * E * E + 6 * E + E + depth * (4 * E * E + 3 * E * config.hidden + 6 * E)
    assert count == by_hand
    small = {"b": 106.60, "l": 332.92, "xl": 670.66}
    assert round(parameter_count(preset(name, codebook_sizes("cosine", k_max=11264))) / 1e6, 2) == small[name]


def test_no_future_leaks():
    model = alive()
    ids_BL, labels_B = tokens(2), torch.tensor([1, 4])
    before = model(ids_BL, labels_B)
    for j, k in enumerate(SIZES):
        changed = ids_BL.clone()
        changed[:, j] = (changed[:, j] + 1) % k
        after = model(changed, labels_B)
        assert torch.equal(after[:, : j + 1], before[:, : j + 1])
        if j + 1 < len(SIZES):
            finite = before[:, j + 1 :].isfinite()
            assert bool(((after[:, j + 1 :] - before[:, j + 1 :])[finite]).abs().max() > 1e-4)


def test_position_and_class_reach_every_row():
    model = alive()
    ids_BL = torch.zeros(1, len(SIZES), dtype=torch.int64)
    rows = [model.hidden(ids_BL, torch.tensor([c]))[0] for c in range(6)]
    for other in rows[1:]:
        assert bool(((rows[0] - other).abs().amax(-1) > 1e-4).all())


@pytest.mark.parametrize("chunks", [[1] * 16, [1, 5, 1, 9], [16]])
def test_cache_equals_full_forward(chunks):
    model = alive()
    ids_BL, labels_B = tokens(4), torch.tensor([0, 3, 5, 5])  # classes mixed with "no class"
    want = model.hidden(ids_BL, labels_B)
    shared, cache = model.modulation(labels_B), KvCache(TINY, 4, torch.device("cpu"), torch.float32)
    start, parts = 0, []
    with torch.no_grad():
        for size in chunks:
            if start == 0 and size > 1:
                start_B1E = model.class_embed(labels_B)[:, None]
                x = torch.cat([start_B1E, model.embed(ids_BL[:, : size - 1])], 1)
                parts.append(model._run(x, shared, cache, 0))
            else:
                before = None if start == 0 else ids_BL[:, start - 1 : start + size - 1]
                parts.append(model.step(before, labels_B, shared, cache, start))
            start += size
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=1e-4)


def test_rotary_scores_depend_on_the_distance_alone():
    rope = rope_table(12, 8, 10000.0)
    q, k = torch.randn(1, 1, 1, 8, generator=rng()), torch.randn(1, 1, 1, 8, generator=rng(1))
    q, k = rotate(q.expand(1, 1, 12, 8), rope), rotate(k.expand(1, 1, 12, 8), rope)
    scores = (q @ k.mT)[0, 0]
    for distance in (0, 3, 7):
        torch.testing.assert_close(scores.diagonal(distance), scores[0, distance].expand(12 - distance))
    assert not torch.allclose(scores[0, 1], scores[0, 2])


@pytest.mark.parametrize(("mode", "trained", "sampled"), [("train", 1, 1), ("sample_only", 0, 1), ("off", 0, 0)])
def test_vocabulary_masks(mode, trained, sampled):
    model = alive(replace(TINY, mask_vocab=mode))
    full = (64,) * 16
    assert model.sizes("train") == (SIZES if trained else full)
    assert model.sizes("sample") == (SIZES if sampled else full)
    p = model(tokens(3), torch.tensor([0, 1, 2])).softmax(-1)
    torch.testing.assert_close(p.sum(-1), torch.ones(3, 16))
    beyond = torch.arange(64) >= torch.tensor(SIZES)[:, None]
    assert bool((p[:, beyond] == 0).all()) is bool(trained)


def test_masked_likelihood_is_never_worse():
    ids_BL, labels_B = tokens(6), torch.arange(6) % 5
    masked, full = (alive(replace(TINY, mask_vocab=m)).nll(ids_BL, labels_B) for m in ("train", "off"))
    assert bool((masked <= full + 1e-6).all())
    assert float((full - masked)[:, 0].min().detach()) > 0.5


@pytest.mark.parametrize("head_groups", [1, 4, 16])
@pytest.mark.parametrize("sizes", [SIZES, (64,) * 16])
def test_grouped_head_equals_masked_cross_entropy(head_groups, sizes):
    hidden = torch.randn(3, 16, 12, generator=rng(), requires_grad=True)
    weight = torch.randn(64, 12, generator=rng(1), requires_grad=True)
    ids_BL, up = tokens(3, sizes), torch.rand(3, 16, generator=rng(2))
    want = F.cross_entropy(masked_logits(hidden, weight, sizes).mT, ids_BL, reduction="none")
    gradients = torch.autograd.grad((want * up).sum(), (hidden, weight))
    got = grouped_nll(hidden, weight, ids_BL, sizes, head_groups)
    torch.testing.assert_close(got, want)
    for grouped, plain in zip(torch.autograd.grad((got * up).sum(), (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(grouped, plain, atol=1e-6, rtol=1e-5)


def test_an_id_without_a_code_costs_infinity():
    ids_BL = torch.zeros(1, 16, dtype=torch.int64)
    ids_BL[0, 0] = 63
    nll = grouped_nll(torch.randn(1, 16, 12), torch.randn(64, 12), ids_BL, SIZES, 4)
    assert nll[0, 0] == torch.inf
    assert bool(nll[0, 1:].isfinite().all())


def test_grouped_head_under_autocast_is_close():
    hidden, weight = torch.randn(3, 16, 12, generator=rng()), torch.randn(64, 12, generator=rng(1))
    ids_BL = tokens(3)
    want = grouped_nll(hidden, weight, ids_BL, SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        got = grouped_nll(hidden, weight, ids_BL, SIZES)
    assert got.dtype == torch.float32
    assert 0 < float((got - want).abs().max()) < 0.1


def test_label_dropout():
    labels_B = torch.arange(20_000) % 5
    dropped = drop_labels(labels_B, 0.1, 5, rng())
    assert float((dropped == 5).double().mean()) == pytest.approx(0.1, abs=0.01)
    kept = dropped != 5
    assert torch.equal(dropped[kept], labels_B[kept])
    assert torch.equal(dropped, drop_labels(labels_B, 0.1, 5, rng()))


def test_no_class_row_gets_the_gradient():
    model = alive()
    model.loss(tokens(2), torch.tensor([5, 5])).backward()
    rows = model.class_embed.weight.grad.abs().sum(1) > 0
    assert rows.tolist() == [False] * 5 + [True]


def test_weight_decay_groups():
    """The paper spares biases, norms and adaptive norms only; RAR's rule, which spares the tables too, is an option."""
    model = ArModel(TINY)
    decayed, spared = parameter_groups(model, 0.03)
    names = {name for name, _ in decayed["params"]}
    assert not [n for n in names if "norm" in n or "bias" in n or "adaln" in n]
    assert {"embed.weight", "class_embed.weight"} <= names
    as_rar = {name for name, _ in parameter_groups(model, 0.03, decay_tables=False)[0]["params"]}
    assert names - as_rar == {"embed.weight", "class_embed.weight"}
    assert {"layers.0.adaln_offset", "adaln.weight", "adaln.bias", "norm.weight"} <= {n for n, _ in spared["params"]}
    assert {"head.weight", "layers.1.qkv.weight", "layers.0.down.weight"} <= names
    assert sum(len(g["params"]) for g in (decayed, spared)) == len(list(model.parameters()))


def test_starts_as_the_identity_and_uniform_enough():
    model = ArModel(TINY).eval()
    ids_BL, labels_B = tokens(4), torch.arange(4)
    x = torch.cat([model.class_embed(labels_B)[:, None], model.embed(ids_BL[:, :-1])], 1)
    torch.testing.assert_close(model.hidden(ids_BL, labels_B), model.norm(x))
    bits_L, images = nll_bits(model, [(ids_BL, labels_B), (ids_BL[:1], labels_B[:1])])
    assert images == 5
    torch.testing.assert_close(bits_L, torch.tensor(SIZES).double().log2(), atol=0.5, rtol=0.1)


def test_dropout_only_in_training():
    model = alive()
    ids_BL, labels_B = tokens(2), torch.tensor([0, 1])
    assert torch.equal(model.hidden(ids_BL, labels_B), model.hidden(ids_BL, labels_B))
    model.train()
    assert not torch.equal(model.hidden(ids_BL, labels_B), model.hidden(ids_BL, labels_B))
    nll_bits(model, [(ids_BL, labels_B)])
    assert model.training
    with pytest.raises(ValueError, match="no tokens"):
        nll_bits(model, [])


def test_overfits_to_the_entropy_of_the_set_and_not_below():
    """32 distinct sequences, 4 classes of 8: the bits of one sequence tend to log2 32 - log2 4 = 3, not to 0."""
    sizes = tuple(codebook_sizes("cosine", 8, 2, 16).tolist())
    ids_BL, labels_B = tokens(32, sizes, seed=3), torch.arange(32) % 4
    assert len(ids_BL.unique(dim=0)) == 32
    config = ArConfig(2, 32, 2, sizes, 4, dropout=0.0, token_dropout=0.0, attention_dropout=0.0)
    model = ArModel(config)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.96), weight_decay=0.0)
    for step in range(200):
        for group in optimiser.param_groups:
            group["lr"] = 6e-3 * min(1, (step + 1) / 20, (200 - step) / 100)
        loss = model.loss(ids_BL, labels_B)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    bits_L, _ = nll_bits(model, [(ids_BL, labels_B)])
    assert 3 - 1e-3 < float(bits_L.sum()) < 3.4


def test_bad_configurations_are_named():
    with pytest.raises(ValueError, match="mask_vocab"):
        ArModel(replace(TINY, mask_vocab="yes"))
    with pytest.raises(ValueError, match="width 64"):
        ArModel(replace(TINY, heads=5))
    assert ArConfig().hidden == 2048
    assert [preset(n, SIZES).hidden for n in ("l", "xl")] == [2736, 3424]
