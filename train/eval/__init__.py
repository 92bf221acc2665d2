"""Scores of encoders and of samples, one file per measure. Adding a measure adds one line to MEASURES.

A measure's module offers EXAMPLE, add_arguments(parser) and run(args); nothing is imported here.
"""

# action of `semdict evaluate` -> (module, what it computes)
MEASURES: dict[str, tuple[str, str]] = {
    "probe": ("semdict.train.eval.probe", "linear probe on frozen features (LARS, batch norm without affine)"),
    "knn": ("semdict.train.eval.knn", "nearest-neighbour vote on frozen features, also on shifted datasets"),
    "few-shot": ("semdict.train.eval.few_shot", "linear probe on a few images per class, mean and spread over seeds"),
    "fine-tune": ("semdict.train.eval.finetune", "train the whole encoder as a classifier, from images"),
    "fid": ("semdict.train.eval.fid", "FID, IS, KID, precision and recall of samples, or the teacher's distance"),
    "reference": ("semdict.train.eval.reference", "the 256-pixel PNGs of a split that fid_val50k compares with"),
    "nearest": ("semdict.train.eval.nearest", "samples beside their nearest training images"),
}
