"""`semdict check`: refuses a wrong params.yaml before any work, and names the files that a preset still lacks."""

import argparse
from pathlib import Path

from semdict.pipeline.common.hub import is_hub_name
from semdict.pipeline.config.params import add_params_arguments, params_of
from semdict.pipeline.config.schema import Params

EXAMPLE = """examples:
  semdict check
  semdict check --set kmeans.k=512       the same with a value changed"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file to check."""
    add_params_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Validates; lists inputs that are not there yet."""
    params = params_of(args)
    print(f"{args.params}: preset {params.preset} is valid")
    for key, path in missing_inputs(params):
        print(f"  not there yet: {path} ({key})")
    return 0


def missing_inputs(params: Params) -> list[tuple[str, str]]:
    """(parameter, path) of every input that a stage will ask for and that does not exist."""
    wanted = [(f"manifest.images.{split}", path) for split, path in params.manifest.images.items()]
    wanted.append(("vqgan.weights", params.vqgan.weights))
    optional = {"features.weights": params.features.weights, "kmeans.centroids": params.kmeans.centroids}
    wanted += [(key, path) for key, path in optional.items() if path]
    networks = params.vcq.perceptual if params.vcq.perceptual_weight else []
    if not any(Path(network.weights).exists() for network in networks):  # the first that is there serves
        wanted += [("vcq.perceptual", network.weights) for network in networks]
    if params.vcq.warm_perceptual and params.vcq.perceptual_weight:
        wanted.append(("vcq.warm_perceptual", params.vcq.warm_perceptual.weights))
    return [
        (key, path)
        for key, path in wanted
        if not any(c in path for c in "*?{") and not is_hub_name(path) and not Path(path).exists()
    ]
