"""Every command of `semdict` in one table. Plain data: reading it imports no command.

A command is a module that offers `EXAMPLE` (text under --help), `add_arguments(parser)` and `run(args)` -> exit status
or None; "module:Name" is a class in it that does. A group is a command with actions, such as `semdict vcq train`.
"""

from typing import NamedTuple

from semdict.train.eval.measures import MEASURES


class Command(NamedTuple):
    """A module, imported only when its command is called, and one line of help."""

    module: str
    text: str


class Group(NamedTuple):
    """Commands under one name, one line of help, and examples of their use."""

    actions: dict[str, Command]
    text: str
    example: str


SHARDS = {
    "info": Command("semdict.pipeline.shards.command:Info", "counts, grid, codebooks, bits per token, provenance"),
    "verify": Command("semdict.pipeline.shards.command:Verify", "read every byte and name damaged arrays and chunks"),
    "import": Command("semdict.pipeline.shards.command:Import", "write the tokens of another layout as shards"),
    "export": Command("semdict.pipeline.shards.command:Export", "write a shard directory in another layout"),
}
VCQ = {
    "train": Command("semdict.train.vcq.train", "train the tokenizer and its discriminator on a manifest's images"),
    "encode": Command("semdict.train.vcq.encode", "turn every image into its tokens, as a shard directory"),
    "evaluate": Command("semdict.train.eval.vcq_scores", "reconstruction, codebook use, first-k-token probe, samples"),
}
AR = {
    "train": Command("semdict.train.ar.train", "train on the generative tokens of a shard directory"),
    "sample": Command("semdict.train.ar.sample", "sample images: tokens from the model, pixels from the tokenizer"),
}

COMMANDS: dict[str, Command | Group] = {
    "manifest": Command("semdict.pipeline.manifest.stage", "list the images: key, label, split, size, SHA-256, status"),
    "sample-features": Command("semdict.pipeline.kmeans.sample_features", "sample teacher patch features for k-means"),
    "kmeans": Command("semdict.pipeline.kmeans.stage", "cluster the sampled features into the discriminative codebook"),
    "encode": Command("semdict.pipeline.encode.stage", "turn every image into generative and discriminative tokens"),
    "shards": Group(
        SHARDS,
        "token shards",
        "examples:\n"
        "  semdict shards info shards/demo\n"
        "  semdict shards import tokens.pt shards/lease --centroids km_16k.npy\n"
        "  semdict shards export shards/demo tokens.pt --to pt",
    ),
    "pretrain": Command(
        "semdict.train.masked.pretrain", "train a masked-token model on token shards, by any objective"
    ),
    "evaluate": Group(
        {name: Command(*entry) for name, entry in MEASURES.items()},
        "scores of an encoder or of samples",
        "examples:\n"
        "  semdict evaluate probe --model runs/demo/lease --shards shards/demo\n"
        "  semdict evaluate knn --model runs/demo/lease",
    ),
    "condition": Command("semdict.train.masked.condition", "fine-tune a pretrained model's decoder on class labels"),
    "generate": Command(
        "semdict.train.masked.generate",
        "sample images: unconditional, by class, inpaint, outpaint, reconstruct",
    ),
    "vcq": Group(
        VCQ,
        "1-D tokenizer with a growing codebook",
        "examples:\n"
        "  semdict vcq train --set vcq.schedule=constant --out runs/demo/vcq-constant\n"
        "  semdict vcq encode --tokenizer runs/demo/vcq --out shards/demo-vcq --set vcq_encode.views=[ten-crop]\n"
        "  semdict vcq evaluate --tokenizer runs/demo/vcq --samples guided=runs/demo/ar-samples-guided",
    ),
    "ar": Group(
        AR,
        "autoregressive model on the 1-D tokenizer's tokens",
        "examples:\n"
        "  semdict ar train --shards shards/demo-vcq --out runs/demo/ar\n"
        "  semdict ar sample --model runs/demo/ar --tokenizer runs/demo/vcq --out samples",
    ),
    "entropy": Command("semdict.pipeline.analysis.stage", "information along token sequences: VCQ's table 1, figure 2"),
    "report": Command("semdict.report.command", "one HTML page of all results there are"),
    "preset": Command("semdict.pipeline.config.preset_command", "write a preset to params.yaml"),
    "check": Command("semdict.pipeline.config.checks", "validate params.yaml and name missing inputs"),
}
