"""One training step: LEASE, Sorcen and MAGE on cached tokens, MAGE with its VQGAN online, and a straightforward LEASE.

Example: python -m benchmarks.bench_step --out benchmarks/results/step.json    (--small for a quick look)
         python -m benchmarks.bench_step --device cuda --batch 64 --out benchmarks/results/step-gpu.json
A step is masking, forward, backward and AdamW; bfloat16 autocast and model FLOP utilisation on a GPU. Needs torch and
timm only. Times come from one process that alternates between the versions, memory from a process per version.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import memory
from benchmarks.report import arguments, in_child, machine, publish
from benchmarks.straight_lease import StraightLease
from benchmarks.timing import alternate
from semdict.train.engine.loop import Clock
from semdict.train.masked.masking import draw_masks
from semdict.train.masked.model import SIZES, MaskedTokenTransformer, model_config
from semdict.train.masked.objectives import objective_class
from semdict.train.masked.objectives.lease import Lease
from semdict.train.masked.objectives.mage import Mage, Masking
from semdict.train.masked.objectives.sorcen import Sorcen
from semdict.train.masked.vocab import LEASE

RATIO = 0.695  # about the mean of the truncated normal; constant, so that all steps cost the same
WORDS, WIDTH = 16384, 1024
VERSIONS = ("lease", "straight_lease", "sorcen", "mage", "mage_online_vqgan")
PARTS = {  # the package's names -> the straightforward version's
    "token_emb.word.": "word.",
    "token_emb.position.": "position.",
    "token_emb.norm.": "embed_norm.",
    "decoder_blocks.": "decoder.",
    "token_head.fc.": "head_fc.",
    "token_head.norm.": "head_norm.",
    "token_head.bias": "head_bias",
    "proj_to_dino.": "to_words.",
    "dec_to_dino.": "decoder_to_words.",
    "": "",
}
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # dense bfloat16


class Steps:
    """Builds the training step of each version on shared random data."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.batch = args.device, args.batch
        self.size = "tiny" if args.small else args.size
        self.words = (512, 64) if args.small else (WORDS, WIDTH)
        self.dropout, self.compile = args.dropout, args.compile
        self.trained = 0  # number of parameters of the version built last
        rng = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 1024, (self.batch, 256), generator=rng).to(self.device)
        self.disc = torch.randint(0, self.words[0], (self.batch, 256), generator=rng).to(self.device)
        self.centroids = torch.nn.functional.normalize(torch.randn(*self.words, generator=rng), dim=1)
        self.masking = Masking(mode=RATIO, std=1e-6, low=RATIO - 1e-6, high=RATIO + 1e-6)
        self.rng = torch.Generator(device=self.device).manual_seed(1)

    def make(self, version: str) -> Callable[[], float]:
        """A function that runs one step and returns its loss."""
        return self.straight() if version == "straight_lease" else self.ours(version)

    def ours(self, version: str) -> Callable[[], float]:
        """The package's objectives; `mage_online_vqgan` encodes images in every step, as published."""
        family = version.partition("_")[0]
        fields = Lease.architecture(self.words[1]) if family == "lease" else objective_class(family).architecture()
        config = model_config(family, self.size, dropout=self.dropout, **fields)
        model = MaskedTokenTransformer(config).to(self.device)
        if self.compile:
            model.encode, model.decode = torch.compile(model.encode), torch.compile(model.decode)
        objective = {
            "lease": lambda: Lease(self.centroids, masking=self.masking),
            "sorcen": lambda: Sorcen(model, echo_warmup=0, masking=self.masking),
            "mage": lambda: Mage(masking=self.masking),
        }[family]().to(self.device)
        clock = Clock(50)
        tokenizer = self.tokenizer() if version.endswith("vqgan") else None
        optimiser = self.optimiser(model, fused=True)

        def step() -> float:
            tokens = tokenizer() if tokenizer else self.tokens
            with self.precision():
                loss, _ = objective(model, {"gen": tokens, "disc": self.disc}, self.rng, clock)
            self.update(loss, optimiser)
            objective.after_step(model, clock, 400.0)
            return loss.item()

        return step

    def straight(self) -> Callable[[], float]:
        """The baseline, with equal masks, precision and optimiser."""
        model = StraightLease(SIZES[self.size], self.centroids, self.dropout).to(self.device)
        optimiser = self.optimiser(model, fused=self.device.startswith("cuda"))

        def step() -> float:
            keep, masked, _ = draw_masks(self.batch, 256, RATIO, self.rng)
            with self.precision():
                loss = model(self.tokens, self.disc, masked, keep)
            self.update(loss, optimiser)
            return loss.item()

        return step

    def tokenizer(self) -> Callable[[], torch.Tensor]:
        """MAGE's VQGAN at its released size (narrow with --small) with random weights, on random images."""
        from semdict.pipeline.tokenizers.mage import RELEASED, MageTokenizer

        narrow = replace(RELEASED, stem=32, widths=(32, 32, 64, 64, 128), blocks=1, decoder_blocks=1)
        net = MageTokenizer(narrow if self.size == "tiny" else RELEASED).to(self.device).eval()
        images = torch.rand(self.batch, 3, 256, 256, generator=torch.Generator().manual_seed(2)).to(self.device)

        def encode() -> torch.Tensor:
            with torch.no_grad(), self.precision():
                return net.encode(images)

        return encode

    def optimiser(self, model: torch.nn.Module, fused: bool) -> torch.optim.Optimizer:
        """AdamW with the published settings."""
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=fused)

    def precision(self) -> torch.autocast:
        """bfloat16 on a GPU, float32 on a CPU."""
        return torch.autocast("cuda" if self.device.startswith("cuda") else "cpu", torch.bfloat16, self.device != "cpu")

    def update(self, loss: torch.Tensor, optimiser: torch.optim.Optimizer) -> None:
        """Backward pass and optimiser step."""
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def lease_flops(size: dict[str, int], words: int, width: int) -> float:
    """FLOPs per image of a LEASE step: encoder (129 rows), decoder (257 rows) and heads, forward and backward."""

    def blocks(rows: int, e: int, depth: int) -> float:
        return depth * (24 * rows * e * e + 4 * rows * rows * e)

    masked = round(RATIO * 256)
    visible = 256 - masked
    e, f = size["width"], size["decoder_width"]
    forward = blocks(129, e, size["depth"]) + 2 * 129 * e * f + blocks(257, f, size["decoder_depth"])
    # centroids and token embedding take no gradient: one backward product instead of two
    heads = masked * (3 * 2 * f * e + 2 * 2 * e * 1024) + visible * (3 * 2 * e * width + 2 * 2 * width * words)
    return 3 * forward + heads


def child(version: str, args: argparse.Namespace) -> None:
    """Print the rise of peak memory in three steps, and the part of it that weights and AdamW state take."""
    steps = Steps(args)

    def work() -> None:
        step = steps.make(version)
        for _ in range(3):
            step()

    peak = memory.extra_bytes(work, args.device)
    state = 3 * 4 * steps.trained
    print(json.dumps({"peak_bytes": peak, "state_bytes": state, "step_bytes": peak - state}))


def in_own_process(version: str, options: list[str]) -> dict[str, int]:
    """`child` in a separate process."""
    return json.loads(in_child("benchmarks.bench_step", *options, "--child", version).splitlines()[-1])


def check_equal() -> None:
    """SystemExit unless both LEASEs give the same loss with equal weights and masks."""
    size = SIZES["tiny"]
    centroids = torch.nn.functional.normalize(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    straight = StraightLease(size, centroids).eval()
    model = MaskedTokenTransformer(
        model_config("lease", "tiny", vocab=LEASE, decoder_rows=385, **Lease.architecture(16, "both"))
    ).eval()
    state = straight.state_dict()
    names = {n: next(t + n[len(o) :] for o, t in PARTS.items() if n.startswith(o)) for n in model.state_dict()}
    model.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})
    rng = torch.Generator().manual_seed(3)
    tokens, words = (torch.randint(0, high, (2, 256), generator=rng) for high in (1024, 64))
    keep, masked, _ = draw_masks(2, 256, RATIO, rng)
    ours, _ = Lease(centroids).losses(model, Lease.pass_with(model, tokens, masked, keep), words)
    if abs(ours.item() - straight(tokens, words, masked, keep).item()) > 1e-4:
        raise SystemExit("the straightforward LEASE and the package's compute different losses")


def measure(args: argparse.Namespace, options: list[str]) -> dict:
    """Seconds and bytes of every version, and their ratios."""
    wanted = args.versions.split(",")
    steps = Steps(args)
    bytes_ = {v: in_own_process(v, options) for v in wanted if v in VERSIONS[:2] or args.device == "cuda"}
    time, processor = alternate({v: steps.make(v) for v in wanted}, args.repeats, args.device)
    figures = {
        "machine": machine(args.device),
        "threads": torch.get_num_threads(),
        "setting": {"size": steps.size, "batch": args.batch, "dropout": args.dropout, "mask_ratio": RATIO},
        "seconds": time,
        "processor_seconds": processor,
        "images_per_second": {v: args.batch / t for v, t in time.items()},
        "memory": bytes_,
    }
    if {"lease", "straight_lease"} <= set(wanted):
        ours, theirs = bytes_["lease"], bytes_["straight_lease"]
        figures["lease_against_straight"] = {
            "times_faster": time["straight_lease"] / time["lease"],
            "times_less_processor_time": processor["straight_lease"] / processor["lease"],
            **{key.replace("_bytes", "_memory"): ours[key] / theirs[key] for key in ours},
        }
    if "mage_online_vqgan" in time:
        figures["step_time_over_lease"] = {v: time[v] / time["lease"] for v in wanted}
        figures["processor_time_over_lease"] = {v: processor[v] / processor["lease"] for v in wanted}
    flops = lease_flops(SIZES[steps.size], *steps.words)
    figures["lease_flops_per_image"] = flops
    if peak := next((p for name, p in PEAK_TFLOPS.items() if name in figures["machine"]["device"]), None):
        figures["lease_mfu"] = flops * args.batch / time["lease"] / (peak * 1e12)
    return figures


def main() -> None:
    parser = arguments(__doc__, "step")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="vit_base", choices=tuple(SIZES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--versions", default=",".join(VERSIONS), help="comma-separated, lease among them")
    parser.add_argument("--child", choices=VERSIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args)
        return
    check_equal()
    publish(args.out, measure(args, sys.argv[1:]))


if __name__ == "__main__":
    main()
