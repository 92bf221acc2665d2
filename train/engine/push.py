"""`semdict model push`: a trained model on the Hugging Face Hub, as safetensors with a card."""

import argparse
import json
from pathlib import Path
from typing import Any

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.safeload import load_checkpoint
from semdict.train.engine.model_file import PUSHED, check_published, model_path

EXAMPLE = """examples:
  semdict model push runs/demo/lease my-name/demo-lease --licence mit --private

Uploads the tensors as model.safetensors, with the configuration and the facts about training in its header, and a card
with the scores in reports/PRESET/RUN. `semdict.load_model("hf-hub:my-name/demo-lease")` opens it.
Log in first: hf auth login. The folder is made in work/ and removed after the upload."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, the repository and the licence."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or its model file")
    parser.add_argument("repository", metavar="OWNER/NAME")
    parser.add_argument("--licence", metavar="ID", required=True, help="licence of the weights, an id of the Hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def run(args: argparse.Namespace) -> int:
    """Write the folder, then upload it."""
    from semdict.pipeline.common.files import remove
    from semdict.pipeline.common.hub import push_folder
    from semdict.pipeline.shards.layouts.card import hub_licence

    licence = hub_licence(args.licence)
    path = model_path(args.run)
    folder = Path("work") / f"push-{args.repository.replace('/', '-')}"
    remove(folder)
    folder.mkdir(parents=True)
    contents = write_safetensors(path, folder / PUSHED)
    folder_of_run = path.parent
    scores = Path("reports") / folder_of_run.parent.name / folder_of_run.name
    (folder / "README.md").write_text(card(contents, licence, read_scores(scores), args.repository))
    address = push_folder(folder, args.repository, "model", args.private)
    remove(folder)
    print(f"{address}: pushed")
    return 0


def write_safetensors(path: Path, out: Path) -> dict[str, Any]:
    """The model of `path` as safetensors, its kind, configuration and facts in the header; returns these.

    WeightsError if the file was not written by semdict, or is not the one that its run published.
    """
    from safetensors.torch import save_file

    contents = load_checkpoint(path)
    if not {"kind", "config", "model", "about"} <= contents.keys():
        raise WeightsError(f"{path} is no model file of semdict; released checkpoints are on their authors' pages")
    check_published(path)
    header = {key: contents[key] for key in ("kind", "config", "about")}
    state = {name: tensor.detach().clone().contiguous() for name, tensor in contents["model"].items()}
    save_file(state, out, metadata={"format": "pt", "semdict": json.dumps(header, sort_keys=True)})
    return {**header, "parameters": sum(tensor.numel() for tensor in state.values())}


def read_scores(folder: Path) -> dict[str, float]:
    """ "probe top1" -> percent of every score file of a run that states one."""
    scores = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "protocol" in content:
            scores |= {f"{path.stem} {key}": value for key, value in content.items() if isinstance(value, int | float)}
    return scores


def card(contents: dict[str, Any], licence: str, scores: dict[str, float], repository: str) -> str:
    """The model card: a YAML header for the Hub, then text for people."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(license=licence, library_name="semdict", tags=["image-tokens", "semdict", contents["kind"]])
    lines = [f"---\n{data.to_yaml()}\n---\n", f"# {repository.partition('/')[2]}\n"]
    lines.append(
        f"A `{contents['kind']}` of {contents['parameters']:,} numbers, trained on image tokens with semdict.\n"
    )
    lines.append(f'```python\nimport semdict\nmodel = semdict.load_model("hf-hub:{repository}")\n```\n')
    if scores:
        lines += [
            "| score | value |",
            "|---|---|",
            *(f"| {name} | {value:.4g} |" for name, value in scores.items()),
            "",
        ]
    for title in ("config", "about"):
        lines.append(f"## {title}\n\n```json\n{json.dumps(contents[title], indent=1, sort_keys=True)}\n```\n")
    return "\n".join(lines)
