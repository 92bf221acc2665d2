"""`semdict vcq`: train the 1-D tokenizer with a growing codebook, encode images with it, measure it."""

from semdict.train.actions import Actions

ACTIONS = Actions(
    "vcq",
    {
        "train": ("semdict.train.vcq.train", "train the tokenizer and its discriminator on the images of a manifest"),
        "encode": ("semdict.train.vcq.encode", "turn every image into its tokens, as a shard directory"),
        "evaluate": ("semdict.train.eval.vcq", "reconstruction, use of the codebook, first-k-token probe, samples"),
    },
)
EXAMPLE = f"""{ACTIONS.listing()}

examples:
  semdict vcq train --set vcq.schedule=constant --out runs/demo/vcq-constant
  semdict vcq encode --tokenizer runs/demo/vcq --out shards/demo-vcq --set vcq_encode.views=[ten-crop]
  semdict vcq evaluate --tokenizer runs/demo/vcq --samples guided=runs/demo/ar-samples-guided"""

add_arguments, run = ACTIONS.add_arguments, ACTIONS.run
