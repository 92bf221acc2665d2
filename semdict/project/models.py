"""Which tokenizer and which teacher a new preset uses: named ones, files in weights/, or those of preset `small`."""

from dataclasses import dataclass
from pathlib import Path

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.hub import SCHEME, is_hub_name

FOLDERS = {"vqgan": Path("weights/vqgan"), "features": Path("weights/features")}
SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".safetensors"}
HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class TokenizerChoice:
    """The generative tokenizer: section `vqgan`, and its geometry where the file could be read."""

    weights: str
    stride: int | None = None  # pixels a cell; None = not read, it is not on this machine


@dataclass(frozen=True)
class TeacherChoice:
    """The discriminative teacher: section `features`."""

    model: str
    weights: str | None


def choose_tokenizer(named: str | None, default: str) -> TokenizerChoice:
    """The tokenizer that is named, else the one file in weights/vqgan, else the default; a local one is read.

    WeightsError when it cannot be read or has no square grid.
    """
    weights = named or _only_file("vqgan", "--vqgan") or default
    if is_hub_name(weights) and not cached(weights):
        return TokenizerChoice(weights)
    from semdict.pipeline.tokenizers import inspect_tokenizer

    tokenizer = inspect_tokenizer(weights)
    if len(tokenizer.grid(8 * tokenizer.stride)) != 2:
        raise UsageError(f"{weights}: its tokens have no places in the image; LEASE needs a tokenizer with a grid")
    return TokenizerChoice(weights, tokenizer.stride)


def choose_teacher(model: str | None, weights: str | None, default: str) -> TeacherChoice:
    """The teacher that is named, else the one file in weights/features, else the default.

    A file's own name tells its timm model (`vit_small_patch16_dinov3.lvd1689m.safetensors`) where --teacher does not.
    """
    weights = weights or (None if model else _only_file("features", "--teacher-weights"))
    if model is None and weights is not None:
        model = _model_of(weights)
    return TeacherChoice(model or default, weights)


def missing_weights(tokenizer: TokenizerChoice, teacher: TeacherChoice) -> list[str]:
    """Lines that say which files are fetched on first use, from where, and where to put them without a network."""
    lines = []
    if is_hub_name(tokenizer.weights) and not cached(tokenizer.weights):
        owner, name, file = tokenizer.weights.removeprefix(SCHEME).split("/", 2)
        name, _, revision = name.partition("@")
        address = f"{HUB}{owner}/{name}/resolve/{revision or 'main'}/{file}"
        lines.append(_fetched("tokenizer", address, FOLDERS["vqgan"] / Path(file).name))
    if teacher.weights is None and not _teacher_cached(teacher.model):
        address = f"{HUB}timm/{teacher.model}/resolve/main/model.safetensors"
        lines.append(_fetched("teacher", address, FOLDERS["features"] / f"{teacher.model}.safetensors"))
    return lines


def cached(name: str) -> bool:
    """Whether a file on the hub is on this machine already."""
    from huggingface_hub import try_to_load_from_cache

    owner, _, rest = name.removeprefix(SCHEME).partition("/")
    repository, _, file = rest.partition("/")
    repository, _, revision = repository.partition("@")
    return isinstance(try_to_load_from_cache(f"{owner}/{repository}", file, revision=revision or None), str)


def _teacher_cached(model: str) -> bool:
    return any(cached(f"{SCHEME}timm/{model}/{file}") for file in ("model.safetensors", "pytorch_model.bin"))


def _fetched(kind: str, address: str, path: Path) -> str:
    source = f"{kind}: not on this machine; the first stage fetches it from {address}"
    return f"{source}\n    without a network: put that file at {path} and run `semdict init` again with --force"


def _only_file(kind: str, option: str) -> str | None:
    """The one file of weights in weights/<kind>; UsageError where there are several."""
    folder = FOLDERS[kind]
    files = sorted(path for path in folder.iterdir() if _is_weights(path)) if folder.is_dir() else []
    if len(files) > 1:
        raise UsageError(f"{folder} holds {', '.join(path.name for path in files)}: name one by {option}")
    return str(files[0]) if files else None


def _is_weights(path: Path) -> bool:
    return path.suffix in SUFFIXES or (path / "tokenizer.pt").is_file()


def _model_of(weights: str) -> str:
    """The timm model that a file's name names; UsageError where it names none."""
    import timm

    name = Path(weights).stem
    if not timm.is_model(name.split(".")[0]):
        raise UsageError(
            f"{weights}: which timm model is it? Name it by --teacher, such as --teacher deit_tiny_patch16_224"
        )
    return name
