"""The one place that says which side of the VCQ paper's contradictions, and which open choice, the code takes.

Paper: "Taming the Entropy Cliff: Variable Codebook Size Quantization for Autoregressive Visual Generation",
arXiv:2605.06207v1. D1-D13 are places where the paper contradicts itself or arithmetic; O1-O20 are left open by it.
`python -m semdict.train.vcq.choices` prints the table.
"""

from typing import NamedTuple


class Choice(NamedTuple):
    """One decision: what the paper says, what the code does, and why."""

    key: str
    paper: str
    code: str
    why: str


# fmt: off
CONTRADICTIONS = (
    Choice("D1", "text: cosine K_1 = 3, K_2 = 6", "K_1 = 2, K_2 = 3 (equation 3, rounded to nearest)",
           "no rounding or index shift of equation 3 gives 3, 6; round alone gives all four printed mean sizes"),
    Choice("D2", "text: power 2.5 has K_2 = 3", "K_2 = 2, first 3 at t = 4", "equation 3 gives 2.09"),
    Choice("D3", "text: linear K_1 = 66, K_2 = 130", "the same", "agrees with equation 3"),
    Choice("D4", "table 2: t* ~4, ~5, ~6, ~5 (linear, cosine, power, cosine-L)", "4, 9, 12, 9 at N = 1,281,167",
           "equation 2 as printed; and since use never exceeds capacity it bounds exhaustion from below, not above"),
    Choice("D5", "proposition 1: H(x_t | x_<t) <= max(0, log2 N - (t-1) log2 K)", "not used; sum_t H <= log2 N is",
           "x_1 constant and x_2 uniform over 256 of N = 1024 breaks it; the chain rule is what holds"),
    Choice("D6", "figure 2: budget 15.6 bits called ImageNet's; power curve with K_min 16", "20.29 bits, K_min 2",
           "15.6 bits is N = 50,000"),
    Choice("D7", "schedules called concave", "linear or convex as in equation 3", "the formulas decide"),
    Choice("D8", "large tokenizer: 496M", "`large` = 390M (literal ViT-B + ViT-L), `large_496` = decoder depth 32",
           "no standard ViT-L reaches 496M; every printed count names its preset"),
    Choice("D9", "A100-equivalent hours", "never a target", "they exceed the A100's peak by 1.15x to 3.5x"),
    Choice("D10", "LlamaGen rFID 2.19 in the text, 0.94 in table 5", "neither is compared with", "different grids"),
    Choice("D11", "'each token is a local 16x16 patch' and 'classical 1D tokenizer (TiTok)'",
           "latent queries by default, `latent_queries: false` is the plain ViT reading", "both count 172M"),
    Choice("D12", "VCQ moves t* from 2 to ~5", "reports 4, 9 and 12 for linear, cosine and power", "see D4"),
    Choice("D13", "K = 8192: gFID 5.87 and 5.92, both 'cosine'", "5.87 belongs to the cfg_start = 0 variant",
           "table 9"),
)

OPEN = (
    Choice("O1", "code width, L2 unstated", "d = 8, codes and outputs L2-normalised", "LlamaGen, GigaTok at K = 16384"),
    Choice("O2", "commitment weight 1.0, codebook weight unstated", "beta = 1, codebook term 1", "VQ-VAE's own 1"),
    Choice("O3", "adversarial weight 0.1", "fixed 0.1, no gradient-norm adaptive weight", "none is mentioned"),
    Choice("O4", "discriminator start unstated", "step 20,000, generator term ramped over 2,000", "LlamaGen, TiTok"),
    Choice("O5", "'PatchGAN'", "3 layers, 64 channels, group norm", "no batch statistics shared between real and fake"),
    Choice("O6", "'adversarial augmentation is always enabled'",
           "DiffAug before the discriminator, p = 1, on real and fake, own draws per call", "UniTok, GigaTok"),
    Choice("O7", "LeCam unstated", "`lecam_weight` 0 by default (TA-TiTok has 0.001)", "not named by the paper"),
    Choice("O8", "tokenizer betas, weight decay unstated", "(.9, .95), 1e-4, none on norms, biases, tokens, codebook",
           "GigaTok, LlamaGen"),
    Choice("O9", "'1e-4 to 3e-5, 13k warm-up, 65k-step peak'", "warm-up to 13k, hold to 65k, linear to the end",
           "VAR lin0"),
    Choice("O10", "EMA unstated", ".9999, evaluated beside the raw weights", "a long average costs nothing"),
    Choice("O11", "code reset unstated", "off (`reset_patience` 0); usage per position is logged",
           "rare tail codes are healthy here"),
    Choice("O12", "'AR training unchanged'", "mask_vocab = train: logits k >= K_t are -inf in training too",
           "never hurts the likelihood; `sample_only` and `off` are the other readings"),
    Choice("O13", "AR block unstated ('Llama-style')",
           "untied, SwiGLU 8d/3 up to a multiple of 16, one shared adaLN + offsets, 1-D RoPE, no biases",
           "114.47 / 343.41 / 683.77 M against the printed 115 / 343 / 684 M"),
    Choice("O14", "how table 7's 'cosine, scale, p' meets equation 4", "s_t = r_t * (c0 + (s - c0) * ramp_t), c0 = 0",
           "modes ratio, ratio_power, ramp and constant are the alternatives"),
    Choice("O15", "guidance for K_max = K_min (0 / 0)", "r_t = 1", "the limit that the paper asserts"),
    Choice("O16", "table 6: probed feature unstated", "both are probed: before and after quantization",
           "from codes the printed 49.4% at k = 10 is implausible"),
    Choice("O17", "figure 2 plots capacity, its caption says measured", "two separate curves and two null curves",
           "i.i.d. noise shows the same cliff at the same place"),
    Choice("O18", "large tokenizer: 'LPIPS with ConvNeXt-S'", "MSE of logits at 224, after `warm_steps` of VGG-LPIPS",
           "AliTok"),
    Choice("O19", "quantized from step 0", "`quantize_start`, `quantize_ramp`: 0 for the paper's presets",
           "narrow models commit before their codes differ by image and never recover"),
    Choice("O20", "initialisation unstated",
           "truncated normal 0.02; mid-grey enters as 0 (bias of the patch embedding) and leaves as 0.5 (bias of the "
           "pixel head, its weights a tenth); the last 3x3 convolution is the identity",
           "else narrow models stay at the mean image for hundreds of steps: brightness and noise hide the rest"),
)
# fmt: on


def main() -> None:
    """Print every choice, one per paragraph."""
    for choice in CONTRADICTIONS + OPEN:
        print(f"{choice.key}: paper: {choice.paper}\n    code: {choice.code}\n    why: {choice.why}")


if __name__ == "__main__":
    main()
