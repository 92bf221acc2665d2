"""Linear probe, few-shot subsets and k-NN on arrays, against scikit-learn and arithmetic in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semdict.pipeline.common.errors import SemdictError, UsageError
from semdict.train.eval.common import cosine_neighbours, top_accuracy
from semdict.train.eval.few_shot import balanced_subset, summary
from semdict.train.eval.knn import knn, vote
from semdict.train.eval.linear_head import (
    ArrayBatches,
    HeadConfig,
    LinearHead,
    decay_gradient,
    fit_head,
    lars,
    linear_probe,
)

WIDTH, CLASSES = 16, 4


def blobs(rows: int, seed: int = 0, spread: float = 1.2, views: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes of unequal scale per dimension, (N, V, E) float32, with labels."""
    centres = np.random.default_rng(99).normal(size=(CLASSES, WIDTH))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows)
    x = centres[labels][:, None] + spread * rng.normal(size=(rows, views, WIDTH))
    return (x * np.linspace(0.1, 10, WIDTH) + 3).astype(np.float32), labels


def hand_written(x: np.ndarray, y: np.ndarray, order: list[np.ndarray], head: LinearHead, cfg: HeadConfig) -> tuple:
    """The same training in float64, written out: batch norm, softmax, LARS (trust 0.001, momentum), half a cosine."""
    w, b = head.linear.weight.detach().double().numpy().copy(), head.linear.bias.detach().double().numpy().copy()
    vw, vb, steps = np.zeros_like(w), np.zeros_like(b), len(order)
    mean, var = np.zeros(x.shape[1]), np.ones(x.shape[1])
    for step, at in enumerate(order):
        z, t = x[at].astype(np.float64), np.eye(len(w))[y[at]]
        mu, sigma2 = z.mean(0), z.var(0)
        mean, var = 0.9 * mean + 0.1 * mu, 0.9 * var + 0.1 * sigma2 * len(z) / (len(z) - 1)
        z = (z - mu) / np.sqrt(sigma2 + 1e-6)
        logits = z @ w.T + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        delta = (p / p.sum(1, keepdims=True) - t) / len(z)
        dw, db = delta.T @ z + cfg.weight_decay * w, delta.sum(0)
        dw *= 0.001 * np.linalg.norm(w) / np.linalg.norm(dw)
        vw, vb = cfg.momentum * vw + dw, cfg.momentum * vb + db
        rate = cfg.base_lr * cfg.batch / 256 * 0.5 * (1 + np.cos(np.pi * step / steps))
        w, b = w - rate * vw, b - rate * vb
    return w, b, mean, var


def test_training_equals_the_equations_in_float64():
    x, y = blobs(60)
    cfg = HeadConfig(epochs=3, batch=16, base_lr=5.0, weight_decay=0.01, seed=4)
    batches = ArrayBatches(x[:, 0], y, cfg.batch, cfg.seed)
    order = [at.numpy() for epoch in range(3) for at in positions(batches, epoch, x[:, 0])]
    want = hand_written(x[:, 0], y, order, LinearHead(WIDTH, CLASSES, 4), cfg)
    head, curve = fit_head(batches, CLASSES, cfg)
    got = (head.linear.weight, head.linear.bias, head.norm.running_mean, head.norm.running_var)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.detach().numpy(), b, rtol=2e-4, atol=2e-5)
    assert [row["epoch"] for row in curve] == [1, 2, 3] and not head.training


class MaeLars:
    """MAE's LARS written out: v = momentum v + ratio (g + decay w), w -= lr v; ratio 1 and no decay for one axis."""

    def __init__(self, head: LinearHead, momentum: float, weight_decay: float) -> None:
        self.parameters, self.momentum, self.weight_decay = list(head.parameters()), momentum, weight_decay
        self.velocity = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for parameter, velocity in zip(self.parameters, self.velocity, strict=True):
            update = parameter.grad
            if parameter.ndim > 1:
                update = update.add(parameter, alpha=self.weight_decay)
                weight, length = parameter.norm(), update.norm()
                ratio = 0.001 * weight / length
                update = update * torch.where((weight > 0) & (length > 0), ratio, torch.ones_like(ratio))
            velocity.mul_(self.momentum).add_(update)
            parameter.add_(velocity, alpha=-lr)


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_lars_is_maes(weight_decay):
    """Against its equations over 20 steps in float64, with gradients and weights of zero among them."""
    heads = [LinearHead(WIDTH, CLASSES, 1).double() for _ in range(2)]
    optimiser, reference = lars(heads[0], 0.9), MaeLars(heads[1], 0.9, weight_decay)
    rng = torch.Generator().manual_seed(0)
    for step in range(20):
        scale = 10.0 ** (step % 7 - 5) * (step != 3)
        if step == 11:
            for head in heads:
                torch.nn.init.zeros_(head.linear.weight)
        for name in ("weight", "bias"):
            parameters = [getattr(head.linear, name) for head in heads]
            gradient = scale * torch.randn(parameters[0].shape, generator=rng, dtype=torch.float64)
            for parameter in parameters:
                parameter.grad = gradient.clone()
        for group in optimiser.param_groups:
            group["lr"] = 0.5 + step
        decay_gradient(heads[0], weight_decay)
        optimiser.step()
        reference.step(0.5 + step)
        for got, want in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def positions(batches: ArrayBatches, epoch: int, x: np.ndarray) -> list[torch.Tensor]:
    """Rows of each batch, identified by their values."""
    return [(torch.from_numpy(x)[None] == rows[:, None]).all(2).int().argmax(1) for rows, _ in batches(epoch)]


def test_the_probe_reaches_logistic_regression():
    sklearn = pytest.importorskip("sklearn.linear_model")
    (x, y), (xt, yt) = blobs(600, 0), blobs(400, 1)
    x, xt = x[:, 0], xt[:, 0]
    scale = lambda a: (a - x.mean(0)) / x.std(0)  # noqa: E731
    want = 100 * sklearn.LogisticRegression(C=1e3, max_iter=2000).fit(scale(x), y).score(scale(xt), yt)
    result = linear_probe(x, y, xt, yt, HeadConfig(epochs=60, batch=64, base_lr=20.0))
    assert 50 < want < 99 and result.top1 == pytest.approx(want, abs=2.5)
    assert result.top1 == pytest.approx(100 * np.mean(result.predicted == yt))
    assert result.top5 == 100.0 and len(result.curve) == 60 and result.curve[-1]["top1"] == result.top1


def test_features_need_no_scaling_and_random_labels_give_chance():
    (x, y), (xt, yt) = blobs(600, 0), blobs(400, 1)
    cfg = HeadConfig(epochs=20, batch=64, base_lr=20.0)
    good = linear_probe(x[:, 0] * 1000 - 5e4, y, xt[:, 0] * 1000 - 5e4, yt, cfg).top1
    chance = linear_probe(x[:, 0], np.random.default_rng(5).permutation(y), xt[:, 0], yt, cfg).top1
    assert good > 60 and abs(chance - 25) < 10


def test_same_seed_same_result_and_half_precision_maps(tmp_path):
    (x, y), (xt, yt) = blobs(80, 0, views=3), blobs(50, 1)
    cfg = HeadConfig(epochs=4, batch=16, base_lr=5.0)
    a, b = (linear_probe(x, y, xt[:, 0], yt, cfg) for _ in range(2))
    assert torch.equal(a.head.linear.weight, b.head.linear.weight)
    other = linear_probe(x, y, xt[:, 0], yt, HeadConfig(epochs=4, batch=16, base_lr=5.0, seed=1))
    assert not torch.equal(a.head.linear.weight, other.head.linear.weight)
    maps = []
    for view in range(3):
        np.save(tmp_path / f"{view}.npy", x[:, view].astype(np.float16))
        maps.append(np.load(tmp_path / f"{view}.npy", mmap_mode="c"))
    half = linear_probe(maps, y, xt[:, 0], yt, cfg)
    assert torch.allclose(a.head.linear.weight, half.head.linear.weight, atol=1e-3)
    assert np.array_equal(maps[0], x[:, 0].astype(np.float16))


def test_rows_and_views_differ_between_epochs():
    x = np.arange(40, dtype=np.float32).reshape(20, 2, 1)  # row n, view v holds 2n + v
    batches = ArrayBatches(x, np.arange(20), 6, seed=0)
    seen = [torch.cat([rows[:, 0] for rows, _ in batches(epoch)]).numpy().astype(int) for epoch in range(30)]
    labels = [torch.cat([label for _, label in batches(epoch)]).numpy() for epoch in range(30)]
    for values, label in zip(seen, labels, strict=True):
        assert len(set(label)) == 18 and np.array_equal(values // 2, label)  # each image once, its own features
    assert len({tuple(label) for label in labels}) == 30
    assert 0.4 < np.mean(np.concatenate(seen) % 2) < 0.6
    assert set(np.concatenate(labels)) == set(range(20))


def test_bad_requests_are_refused():
    x, y = blobs(10)
    with pytest.raises(UsageError, match="batch 16 must be between 2 and the 10 training images"):
        linear_probe(x[:, 0], y, x[:, 0], y, HeadConfig(batch=16))
    with pytest.raises(UsageError, match="k 20"):
        knn(x[:, 0], y, x[:, 0])
    with pytest.raises(SemdictError, match="not finite"):
        linear_probe(np.full_like(x[:, 0], np.inf), y, x[:, 0], y, HeadConfig(epochs=1, batch=5))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_knn_equals_scikit_learn(k, weighted, monkeypatch):
    sklearn = pytest.importorskip("sklearn.neighbors")
    monkeypatch.setattr("semdict.train.eval.common.TRAIN_ROWS", 37)  # blocks that do not divide the set
    for module in ("common", "knn"):
        monkeypatch.setattr(f"semdict.train.eval.{module}.TEST_ROWS", 19)
    (x, y), (xt, yt) = blobs(300, 0), blobs(101, 1)
    weights = (lambda d: np.exp((1 - d) / 0.07)) if weighted else "uniform"
    reference = sklearn.KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute").fit(x[:, 0], y)
    ranked = knn(x[:, 0], y, xt[:, 0], k, 0.07, weighted)
    assert np.array_equal(ranked[:, 0].numpy(), reference.predict(xt[:, 0]))
    distance, rows = reference.kneighbors(xt[:, 0])
    similar, nearest = cosine_neighbours(x[:, 0], xt[:, 0], k)
    assert np.array_equal(nearest.numpy(), rows)
    np.testing.assert_allclose(similar.numpy(), 1 - distance, atol=1e-5)
    assert top_accuracy(ranked, yt)["top1"] == pytest.approx(100 * reference.score(xt[:, 0], yt))


def test_votes():
    similar = torch.tensor([[0.9, 0.8, 0.8]])
    assert vote(similar, torch.tensor([[2, 1, 1]]), 4, 0.07).tolist() == [[2, 1, -1, -1]]  # e^(0.1 / 0.07) = 4.2 > 2
    assert vote(similar, torch.tensor([[2, 1, 1]]), 4, 1.0).tolist() == [[1, 2, -1, -1]]
    assert vote(similar, torch.tensor([[2, 1, 3]]), 4, weighted=False).tolist() == [[1, 2, 3, -1]]  # a tie: the lower
    assert vote(torch.tensor([[-0.5, -1.0]]), torch.tensor([[3, 0]]), 4, 1e-4)[0, 0] == 3  # no underflow to nothing
    assert top_accuracy(torch.tensor([[2, 1, -1, -1, -1], [0, 1, 2, 3, 4]]), np.array([1, 4])) == {
        "top1": 0,
        "top5": 100,
    }


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=30, max_size=80), st.integers(1, 3), st.integers(0, 5))
def test_few_shot_subsets(labels, shots, seed):
    labels = np.asarray(labels)
    counts = np.bincount(labels)
    if (counts[counts > 0] < shots).any():
        with pytest.raises(UsageError, match="fewer than"):
            balanced_subset(labels, shots, seed)
        return
    subset = balanced_subset(labels, shots, seed)
    assert len(set(subset.tolist())) == len(subset)
    assert set(np.bincount(labels[subset])) - {0} == {shots}
    assert np.array_equal(subset, balanced_subset(labels, shots, seed))
    if (counts[counts > 0] > shots).all():
        assert set(subset) <= set(balanced_subset(labels, shots + 1, seed))


def test_few_shot_seeds_differ_and_are_summarised():
    labels = np.repeat(np.arange(3), 20)
    subsets = [balanced_subset(labels, 4, seed) for seed in range(5)]
    assert len({tuple(d) for d in subsets}) == 5
    assert len({tuple(np.sort(d % 20)[:4]) for d in subsets[0].reshape(3, 4)}) > 1  # other images in each class
    scores = summary({4: [50.0, 60.0], 8: [70.0]})
    assert scores["top1_4_shot"] == 55 and scores["std_4_shot"] == pytest.approx(50**0.5)
    assert scores["top1_8_shot"] == 70 and scores["std_8_shot"] == 0
