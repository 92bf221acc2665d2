"""`semdict ar`: train the autoregressive model on token shards, sample from it."""

from semdict.train.actions import Actions

ACTIONS = Actions(
    "ar",
    {
        "train": ("semdict.train.ar.train", "train on the gen tokens of a shard directory"),
        "sample": ("semdict.train.ar.generate", "draw images: codes from the model, pixels from the tokenizer"),
    },
)
EXAMPLE = f"""{ACTIONS.listing()}

examples:
  semdict ar train --shards shards/demo-vcq --out runs/demo/ar
  semdict ar sample --model runs/demo/ar --tokenizer runs/demo/vcq --out samples"""

add_arguments, run = ACTIONS.add_arguments, ACTIONS.run
