"""`semdict check`: refuse a wrong params.yaml before any work, and say which files a preset still misses."""

import argparse
from pathlib import Path

import yaml

from semdict.pipeline.common.hub import is_hub_name
from semdict.pipeline.config.params import add_params_arguments, params_of
from semdict.pipeline.config.schema import Params

EXAMPLE = """example:
  semdict check                       validate params.yaml
  semdict check --show                every key with its value, defaults included, as a params.yaml
  semdict check --params presets/in1k.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file to check, and whether to print it in full."""
    add_params_arguments(parser)
    parser.add_argument("--show", action="store_true", help="print every key with its value, defaults included")


def run(args: argparse.Namespace) -> int:
    """Validate; list inputs that are not there yet."""
    settings = params_of(args)
    if args.show:
        print(yaml.safe_dump(settings.model_dump(mode="json", by_alias=True), sort_keys=False), end="")
        return 0
    print(f"{args.params}: preset {settings.preset} is valid")
    for key, path in missing_inputs(settings):
        print(f"  not there yet: {path} ({key})")
    return 0


def missing_inputs(settings: Params) -> list[tuple[str, str]]:
    """(parameter, path) of every input that a stage will ask for and that does not exist."""
    wanted = [(f"manifest.images.{split}", where) for split, where in settings.manifest.images.items()]
    wanted.append(("vqgan.weights", settings.vqgan.weights))
    optional = {"features.weights": settings.features.weights, "kmeans.centroids": settings.kmeans.centroids}
    wanted += [(key, path) for key, path in optional.items() if path]
    networks = settings.vcq.perceptual if settings.vcq.perceptual_weight else []
    if not any(Path(network.weights).exists() for network in networks):  # the first that is there serves
        wanted += [("vcq.perceptual", network.weights) for network in networks]
    if settings.vcq.warm_perceptual and settings.vcq.perceptual_weight:
        wanted.append(("vcq.warm_perceptual", settings.vcq.warm_perceptual.weights))
    return [
        (key, path)
        for key, path in wanted
        if not any(c in path for c in "*?{") and not is_hub_name(path) and not Path(path).exists()
    ]
