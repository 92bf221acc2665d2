"""Table of the measures that `semdict evaluate` offers. A measure is one file in this folder and one line here.

A measure's module offers EXAMPLE (text under --help), add_arguments(parser) and run(args) -> exit status. The table is
data: reading it imports no measure.
"""

# action of `semdict evaluate` -> (module, one line of help)
MEASURES: dict[str, tuple[str, str]] = {
    "probe": ("semdict.train.eval.linear_probe", "linear probe on frozen features (LARS, batch norm without affine)"),
    "knn": ("semdict.train.eval.knn", "k nearest neighbours on frozen features, also on shifted datasets"),
    "few-shot": ("semdict.train.eval.few_shot", "linear probe on a few images per class, mean and spread over seeds"),
    "fine-tune": ("semdict.train.eval.finetune", "train the whole encoder as a classifier, from images"),
    "umap": ("semdict.train.eval.latent_space", "UMAP pictures of the latents, whole sets and some classes"),
    "fid": ("semdict.train.eval.fid", "FID, IS, KID, precision and recall of samples, or the teacher's distance"),
    "reference": ("semdict.train.eval.reference_images", "write a split as the 256-pixel PNGs of protocol val50k"),
    "nearest": ("semdict.train.eval.nearest_images", "samples beside their nearest training images"),
}
