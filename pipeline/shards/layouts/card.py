"""The card of a token set on the Hugging Face Hub: a checked header, then text for people."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semdict.pipeline.common.errors import UsageError, suggestion
from semdict.pipeline.shards.format import files_under, token_file
from semdict.pipeline.shards.ids import order0_entropy
from semdict.pipeline.shards.reader import TokenShards

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard

PICTURE = "preview.png"
# The Hub's categories, as listed by huggingface_hub.DatasetCardData: (rows below, id).
SIZE_CATEGORIES = (
    (10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"), (10**12, "100B<n<1T"),
)  # fmt: skip
# Licence ids of the Hub (hub-docs, repositories-licenses.md); huggingface_hub itself checks a card only online.
LICENCE_IDS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense
zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma apple-ascl apple-amlr
intel-research h-research unknown other
"""
LICENCES = frozenset(LICENCE_IDS.split())
IMAGENET_TERMS = (
    "These tokens are derived from ImageNet and decode to recognisable images. By asking for access you accept the "
    "ImageNet terms: non-commercial research and education only, and passing the data on only to colleagues who "
    "accepted the same terms."
)


def licence_fields(meta: dict[str, Any], licence: str | None = None) -> dict[str, Any]:
    """The card's licence: `licence`, else the set's, as an id of the Hub; ImageNet's terms for tokens of ImageNet.

    Raises UsageError that suggests the nearest id.
    """
    if is_imagenet(meta):
        fields = {"license": "other", "license_name": "imagenet"}
        fields |= {"license_link": "https://www.image-net.org/download.php", "extra_gated_prompt": IMAGENET_TERMS}
        return fields | {"extra_gated_fields": {"I accept these terms": "checkbox"}}
    name = hub_licence(licence or meta["licence"])
    if name != "other" or meta["licence"].strip().lower() == "other":
        return {"license": name}
    return {"license": "other", "license_name": "".join(c if c.isalnum() else "-" for c in meta["licence"].lower())}


def hub_licence(text: str) -> str:
    """A licence as an id of the Hub; UsageError suggests the nearest."""
    name = text.strip().lower().replace(" ", "-")
    if name not in LICENCES:
        raise UsageError(
            f"licence {text!r} is not among the licence ids of the Hugging Face Hub; "
            f"{suggestion(name, sorted(LICENCES))} Give --licence ID, or --licence other and put the text into LICENSE"
        )
    return name


def is_imagenet(meta: dict[str, Any]) -> bool:
    """Whether title, source or licence name ImageNet, whose terms hold for its tokens under any stated licence."""
    text = " ".join(str(meta[key]) for key in ("title", "source", "licence")).lower()
    return "imagenet" in text or "ilsvrc" in text


def size_category(rows: int) -> str:
    """The Hub's id for a number of rows."""
    return next((name for limit, name in SIZE_CATEGORIES if rows < limit), "n>1T")


@dataclass(frozen=True)
class CardFacts:
    """What a card says beyond the set's attributes.

    counts: rows of each split. codebooks: array -> size, codes in use, order-0 entropy and stored bits per token.
    psnr: mean dB of images decoded from their tokens, picture: a grid of them, None where encode's results are not at
    hand. whole: the folder has the shard directory too.
    """

    counts: dict[str, int]
    codebooks: dict[str, dict[str, float]]
    bytes: int
    content_sha256: str
    psnr: float | None
    picture: Path | None
    whole: bool

    @classmethod
    def of(cls, shards: TokenShards, counts: dict[str, int], reports: Path, whole: bool) -> "CardFacts":
        """Facts of an open set; `reports`: folder of encode's results, which need not exist."""
        size = sum((shards.path / name).stat().st_size for name in files_under(shards.path))
        tokens = int((shards.status[:] == 0).sum()) * len(shards.views) * shards.spec.length
        codebooks = {}
        for name, sizes in shards.spec.sizes.items():
            files = (shards.path / token_file(name, number) for number in range(shards.layout.shards))
            codebooks[name] = {
                "size": int(sizes.max()),
                "used": int((shards.counts[name] > 0).sum()),
                "entropy": order0_entropy(shards.counts[name]),
                "bits": 8 * sum(file.stat().st_size for file in files) / max(1, tokens),
            }
        psnr = None
        if (reports / "encode.json").is_file():
            psnr = json.loads((reports / "encode.json").read_text()).get("preflight", {}).get("psnr_mean")
        picture = reports / "reconstructions.png"
        return cls(counts, codebooks, size, shards.content_sha256, psnr, picture if picture.is_file() else None, whole)


def safe_split(split: str) -> str:
    """A split as `datasets` accepts it: letters, digits, dots and underscores."""
    return "".join(c if c.isalnum() or c in "._" else "_" for c in split)


def make_card(meta: dict[str, Any], facts: CardFacts, licence: dict[str, Any]) -> "DatasetCard":
    """The dataset card: a YAML header for the Hub, then text for people."""
    from huggingface_hub import DatasetCard, DatasetCardData

    files = [
        {"split": safe_split(name), "path": f"data/{safe_split(name)}-*.parquet"}
        for name, rows in facts.counts.items()
        if rows
    ]
    data = DatasetCardData(
        pretty_name=meta["title"] or "token shards",
        task_categories=["image-classification", "unconditional-image-generation"],
        size_categories=[size_category(sum(facts.counts.values()))],
        tags=["image-tokens", "semdict"],
        configs=[{"config_name": "default", "data_files": files}],
        **licence,
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n" + "\n".join([*_body(meta, facts), ""]))


def _body(meta: dict[str, Any], facts: CardFacts) -> Iterator[str]:
    grid = " x ".join(map(str, meta["grid"]))
    yield f"\n# {meta['title'] or 'Token shards'}\n"
    yield f"Every image as tokens on a grid of {grid} cells, {len(meta['views'])} view(s) per image.\n"
    if facts.picture is not None:
        yield f"![Images, decoded from their generative tokens, and their discriminative tokens]({PICTURE})\n"
    yield from _columns(meta)
    yield "\n| split | rows |\n|---|---|"
    yield from (f"| {name} | {rows:,} |" for name, rows in facts.counts.items())
    yield "\n| codebook | entries | in use | order-0 entropy, bits | stored, bits per token |\n|---|---|---|---|---|"
    for name, book in facts.codebooks.items():
        yield f"| `{name}` | {book['size']:,} | {book['used']:,} | {book['entropy']:.3f} | {book['bits']:.3f} |"
    decoded = "" if facts.psnr is None else f" Images decoded from their tokens: {facts.psnr:.2f} dB PSNR on average."
    yield f"\nThe shard directory has {facts.bytes:,} bytes.{decoded}"
    yield from _use(meta, facts)
    yield "\n## How the tokens were made\n"
    yield f"Source: {meta['source'] or 'not stated'}. Licence: {meta['licence']}. Fingerprint: `{meta['fingerprint']}`."
    yield "Images that could not be read are left out; `row` shows the gaps. Crop, transform, decoder and models:\n"
    recipe = json.dumps({"views": meta["views"], "recipe": meta["recipe"]}, indent=1, sort_keys=True)
    yield f"```json\n{recipe}\n```"
    yield "\n## Citation\n"
    yield f"Cite the images' source and the tokenizers named above. This set: content `{facts.content_sha256}`.\n"
    title = meta["title"] or "Token shards"
    yield "```bibtex\n@misc{tokens,\n  title = {" + title + "},\n  note = {made with semdict, content "
    yield f"{facts.content_sha256[:16]}" + "},\n}\n```"


def _columns(meta: dict[str, Any]) -> Iterator[str]:
    books = meta["codebooks"]
    yield "| column | content |\n|---|---|"
    yield "| `key`, `row` | the image's key and its row in the manifest |"
    yield "| `label`, `label_name` | class number (-1 = none) and name |"
    for name, text in (("gen", "what a cell looks like"), ("disc", "what a cell means")):
        if name in books:
            yield f"| `{name}` | {text}: ids below {books[name]['size']}, row-major over the grid |"
    if books["gen"]["sizes"]:
        yield "\nPosition t of `gen` uses ids below `codebooks.gen.sizes[t]` of `semdict.json`."


def _use(meta: dict[str, Any], facts: CardFacts) -> Iterator[str]:
    yield "\n## Use\n"
    yield '```python\nfrom datasets import load_dataset\nrows = load_dataset("OWNER/NAME").with_format("numpy")\n```\n'
    if facts.whole:
        yield "The same set as token shards, with semdict:\n"
        yield '```python\nimport semdict\nshards = semdict.open_shards("hf://datasets/OWNER/NAME")\n```\n'
    gen = meta["recipe"].get("gen", {})
    sha256 = f", SHA-256 `{gen['sha256']}`" if isinstance(gen, dict) and gen.get("sha256") else ""
    yield "## Decode\n"
    yield f"Pixels need the generative tokenizer's weights{sha256}, which are not part of this set:\n"
    yield "```python\nimport torch, semdict\n"
    yield 'tokenizer = semdict.load_tokenizer("WEIGHTS")  # the file of that SHA-256'
    yield 'ids = torch.tensor(rows["train"][:8]["gen"], dtype=torch.int64)  # (8, L)'
    yield "images = tokenizer.decode(ids)  # (8, 3, H, W) in [0, 1]\n```"
