"""Encode throughput on a GPU at real widths, random weights: MAGE's VQGAN and DINOv2 ViT-L/14, then 16,384 centroids.

    python -m benchmarks.bench_encode_gpu --device cuda

Needs torch and timm only. Prints images/s, the share of the peak that 129 + 165 GFLOP per image make of it (MFU), and
how many tokens differ from float32. Images are random bytes already on the host: reading and decoding are
`bench_decode.py`'s business.
"""

from dataclasses import replace

import torch
from timm import create_model

from benchmarks.report import arguments, machine, publish, seconds
from semdict.pipeline.kmeans.clustering import assign
from semdict.pipeline.tokenizers.mage import RELEASED, MageTokenizer

GFLOP = {"vqgan": 129, "teacher": 165}  # per image, counted
MODEL = "vit_large_patch14_reg4_dinov2.lvd142m"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(small: bool, device: str) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """Tokenizer, teacher and centroids at the widths of the ImageNet preset (a fraction of them with --small)."""
    if small:
        sizes = replace(
            RELEASED, stem=32, widths=(32, 32, 64, 64, 128), blocks=1, decoder_blocks=1, z_channels=32, dim=32
        )
        teacher = create_model("vit_tiny_patch16_224", num_classes=0, patch_size=14)
        centroids = torch.randn(256, 192)
    else:
        sizes, centroids = RELEASED, torch.randn(16_384, 1024)
        teacher = create_model(MODEL, pretrained=False, num_classes=0, img_size=224)
    tokenizer = MageTokenizer(sizes).eval().to(device, memory_format=torch.channels_last)
    return tokenizer, teacher.eval().to(device), centroids.to(device)


def main() -> None:
    parser = arguments(__doc__, "encode_gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="measured bf16 peak of the device")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    tokenizer, teacher, centroids = build(args.small, args.device)
    pixels = torch.randint(0, 256, (args.batch, 256, 256, 3), dtype=torch.uint8)
    pixels = pixels.pin_memory() if args.device.startswith("cuda") else pixels
    features = teacher.forward_features
    if args.compile:
        tokenizer.encoder, features = torch.compile(tokenizer.encoder), torch.compile(features)

    @torch.inference_mode()
    def step(precision: str) -> tuple[torch.Tensor, torch.Tensor]:
        images = pixels.to(args.device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)
        with torch.autocast(args.device.partition(":")[0], DTYPES[precision], enabled=precision != "float32"):
            gen = tokenizer.encode(images.contiguous(memory_format=torch.channels_last))
            small = torch.nn.functional.interpolate(images, size=224, mode="bicubic", antialias=True)
            patches = features(small)[:, -256:]
        return gen, assign(patches.float().reshape(-1, patches.shape[-1]), centroids)

    exact, rounded = step("float32"), step("bfloat16")
    took = seconds(lambda: step("bfloat16"), repeats=5, device=args.device)
    speed = args.batch / took
    publish(
        args.out,
        {
            **machine(args.device),
            "batch": args.batch,
            "compiled": args.compile,
            "small": args.small,
            "images_per_second": round(speed, 1),
            "mfu": None if args.small else round(speed * sum(GFLOP.values()) / (1000 * args.peak_tflops), 4),
            "in1k_minutes": round(1_281_167 / speed / 60, 1),
            "tokens_unlike_float32": {
                name: round(float((a != b).float().mean()), 5)
                for name, a, b in zip(("gen", "disc"), exact, rounded, strict=True)
            },
        },
    )


if __name__ == "__main__":
    main()
