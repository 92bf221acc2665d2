"""Sampling images with LEASE: batched, against one image at a time and against a loop over the whole vocabulary.

Example: python -m benchmarks.bench_generate --out benchmarks/results/generate.json    (--small for a quick look)
         python -m benchmarks.bench_generate --device cuda --size vit_base --batch 64 --out ...
20 steps, random weights; the time is that of the tokens, without the tokenizer's decoder. Needs torch and numpy.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.report import arguments, machine, publish
from benchmarks.timing import alternate
from semdict.train.masked.iterative_decoding import Decoding, ImageRng, decode_iteratively, share_equal_contexts
from semdict.train.masked.model import SIZES, MaskedTokenTransformer, model_config
from semdict.train.masked.objectives.lease import Lease
from semdict.train.masked.vocab import LEASE

CODES = 1024


def whole_vocabulary(model: MaskedTokenTransformer, batch: int, steps: int, temperature: float) -> Tensor:
    """A straightforward loop: logits of every row of the table at every cell, cut to the codes afterwards."""
    vocab = model.config.vocab
    tokens_BL = torch.full((batch, 256), vocab.mask, device=model.token_emb.word.weight.device)
    for step in range(steps):
        unknown = tokens_BL == vocab.mask
        features = model.decode(model.encode(tokens_BL), unknown)[:, 1:]
        logits = model.token_head(features, model.token_emb.word.weight)[..., : vocab.codes]
        sampled_BL = torch.where(unknown, torch.distributions.Categorical(logits=logits).sample(), tokens_BL)
        probability_BL = logits.softmax(-1).gather(-1, sampled_BL.clamp(max=vocab.codes - 1)[..., None])[..., 0]
        probability_BL = torch.where(unknown, probability_BL, math.inf)
        ratio = (step + 1) / steps
        hidden = max(1, min(int(unknown[0].sum()) - 1, math.floor(256 * math.cos(math.pi / 2 * ratio))))
        noise = -torch.log(-torch.log(torch.rand_like(probability_BL)))
        sure = probability_BL.log() + temperature * (1 - ratio) * noise
        cut = sure.sort(-1).values[:, hidden - 1 : hidden]
        tokens_BL = sampled_BL.masked_fill(sure <= cut, vocab.mask)
    return sampled_BL


def versions(model: MaskedTokenTransformer, batch: int, cfg: Decoding) -> dict[str, Callable[[], Tensor]]:
    """Functions that each sample `batch` images."""
    device = model.token_emb.word.weight.device

    def sample(numbers: list[int]) -> Tensor:
        tokens_BL = torch.full((len(numbers), 256), model.mask_token, device=device)
        return decode_iteratively(
            share_equal_contexts(model.logits_at), tokens_BL, model.mask_token, ImageRng(0, numbers), cfg
        )

    return {
        "batched": lambda: sample(list(range(batch))),
        "one_at_a_time": lambda: torch.cat([sample([n]) for n in range(batch)]),
        "whole_vocabulary_one_at_a_time": lambda: torch.cat(
            [whole_vocabulary(model, 1, cfg.steps, cfg.temperature) for _ in range(batch)]
        ),
        "whole_vocabulary": lambda: whole_vocabulary(model, batch, cfg.steps, cfg.temperature),
    }


def main() -> None:
    parser = arguments(__doc__, "generate")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="small", choices=tuple(SIZES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    if args.small:
        args.size, args.batch, args.steps = "tiny", 4, 4
    config = model_config("lease", args.size, vocab=LEASE, decoder_rows=385, **Lease.architecture(64))
    model = MaskedTokenTransformer(config).to(args.device).eval().requires_grad_(False)
    cfg = Decoding(args.steps, 6.0, "sampled")  # as many passes as the loop that it is compared with
    with torch.inference_mode(), torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        wall, processor = alternate(versions(model, args.batch, cfg), args.repeats, args.device)
    publish(
        args.out,
        {
            "machine": machine(args.device),
            "threads": torch.get_num_threads(),
            "setting": {"size": args.size, "batch": args.batch, "steps": args.steps, "vocabulary": LEASE.rows},
            "seconds": wall,
            "processor_seconds": processor,
            "images_per_second": {name: args.batch / spent for name, spent in wall.items()},
            "times_faster": {name: spent / wall["batched"] for name, spent in wall.items()},
            "times_less_processor_time": {n: spent / processor["batched"] for n, spent in processor.items()},
        },
    )


if __name__ == "__main__":
    main()
