"""Measure how hard the demo's images are, before any model is trained on them: `python -m demo.measure`.

Three linear classifiers, each trained on the train split and scored on the val split: on the teacher's features (mean
over cells), on the histogram of an image's discriminative tokens, and on the histogram of its generative tokens. As on
photographs, the first two should know the classes and the last should know little: what lies between is what a model
that reads generative tokens has to learn.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.data import IMAGES, SHIPPED, as_float, load_split
from demo.images import CLASSES
from demo.train_teacher import GRID, KWARGS, MODEL
from semdict.pipeline.common.files import write_json
from semdict.pipeline.kmeans.clustering import assign, train_centroids
from semdict.pipeline.tokenizers import load_features, load_tokenizer

WORDS = 256  # k of the demo's k-means
CLUSTERED = 65536  # features that k-means learns from


def linear_accuracy(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, decay: float = 1e-3) -> float:
    """Top-1 of softmax regression on standardised features (N, D), with a penalty on squared weights, by L-BFGS."""
    mean, std = train.mean(0), train.std(0) + 1e-3
    train, test = (train - mean) / std, (test - mean) / std
    head = torch.zeros(train.shape[1] + 1, len(CLASSES), requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ head[:-1] + head[-1], labels) + decay * head[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    predicted = (test @ head[:-1] + head[-1]).argmax(1)
    return round((predicted == test_labels).float().mean().item(), 4)


def histogram(tokens_NL: Tensor, size: int) -> Tensor:
    """(N, size) float: how often each id occurs in each row."""
    return torch.zeros(len(tokens_NL), size).scatter_add_(1, tokens_NL, torch.ones(tokens_NL.shape))


def measure(images: Path, vqgan: Path, teacher: Path, words: int = WORDS) -> dict:
    """The three accuracies."""
    tokenizer, features = load_tokenizer(vqgan), load_features(MODEL, teacher, kwargs=KWARGS, grid=GRID)
    rgb, labels = zip(*(load_split(images, split) for split in ("train", "val")), strict=True)
    tokens = [torch.cat([tokenizer.encode(as_float(part)) for part in split.split(64)]) for split in rgb]
    maps = [torch.cat([features(as_float(part)) for part in split.split(64)]) for split in rgb]
    points = maps[0].flatten(0, 1)
    rows = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:CLUSTERED]
    centroids = torch.as_tensor(train_centroids(points[rows], words).centroids)
    disc = [assign(split.flatten(0, 1), centroids).view(len(split), -1) for split in maps]

    def score(train: Tensor, test: Tensor) -> float:
        return linear_accuracy(train, labels[0], test, labels[1])

    return {
        "teacher_features": score(maps[0].mean(1), maps[1].mean(1)),
        "discriminative_tokens": score(*(histogram(split, words) for split in disc)),
        "generative_tokens": score(*(histogram(split, tokenizer.codebook_size) for split in tokens)),
        "words": words,
        "codes": tokenizer.codebook_size,
        "codes_used": len(torch.unique(tokens[0])),
        "images": [len(split) for split in rgb],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder that `python -m demo.images` wrote")
    parser.add_argument("--vqgan", type=Path, default=SHIPPED / "vqgan.ckpt")
    parser.add_argument("--teacher", type=Path, default=SHIPPED / "teacher.pth")
    parser.add_argument("--words", type=int, default=WORDS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    result = measure(args.images, args.vqgan, args.teacher, args.words)
    if args.out:
        write_json(args.out, result)
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
