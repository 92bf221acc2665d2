"""`semdict evaluate`: what a trained encoder or its samples are worth, one action per measure."""

from semdict.train.actions import Actions

ACTIONS = Actions(
    "evaluate",
    {
        "probe": ("semdict.train.eval.probe", "linear probe on frozen features (LARS, batch norm without affine)"),
        "knn": ("semdict.train.eval.knn", "nearest-neighbour vote on frozen features, also on shifted datasets"),
        "few-shot": (
            "semdict.train.eval.few_shot",
            "linear probe on a few images per class, mean and spread over seeds",
        ),
        "fine-tune": ("semdict.train.eval.finetune", "train the whole encoder as a classifier, from images"),
        "fid": (
            "semdict.train.eval.fid",
            "scores of a folder of samples: FID, IS, KID, precision, recall, or the teacher's",
        ),
        "reference": ("semdict.train.eval.reference", "the 256-pixel PNGs of a split that fid_val50k compares with"),
        "nearest": ("semdict.train.eval.nearest", "samples beside their nearest training images"),
    },
)
EXAMPLE = f"""{ACTIONS.listing()}

examples:
  semdict evaluate probe --model runs/demo/lease --shards shards/demo
  semdict evaluate knn --model runs/demo/lease"""

add_arguments, run = ACTIONS.add_arguments, ACTIONS.run
