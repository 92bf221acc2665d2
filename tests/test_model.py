"""The model against a float64 re-implementation in plain loops, and its switches one by one."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from semdict.train.engine.layers import KERNELS, Recompute, dropout, pos2d, table_std
from semdict.train.masked.masking import draw_masks
from semdict.train.masked.model import SIZES, MaskedTokenTransformer, ModelConfig, model_config
from semdict.train.masked.vocab import LEASE, MAGE, compact_vocab
from tests.tiny import architecture

TINY = {"width": 16, "depth": 2, "heads": 2, "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 3, "grid": 4}


def tiny(family="lease", **changes):
    return model_config(family, "tiny", **{"codes": 20, **architecture(family), **TINY, **changes})


def build_model(config, seed=0):
    """A model in float64 with every parameter, norms and biases included, far from its initial value."""
    model = MaskedTokenTransformer(config, seed).double().eval()
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
    return model


def batch(config, rows=3, ratio=0.7, seed=0):
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab.codes, (rows, config.grid**2), generator=rng)
    keep, masked, _ = draw_masks(rows, config.grid**2, ratio, rng)
    return tokens, masked, keep


# --- a second implementation, one sample and one head at a time, that shares no code with the model ---


def norm(x, w, name, eps):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + eps).sqrt() * w[name + ".weight"] + w[name + ".bias"]


def linear(x, w, name):
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def blocks(x, w, prefix, depth, heads):
    for i in range(depth):
        at = f"{prefix}.{i}."
        q, k, v = linear(norm(x, w, at + "norm1", 1e-6), w, at + "attn.qkv").chunk(3, dim=-1)
        size = q.shape[-1] // heads
        outputs = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            outputs.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(size), dim=-1) @ v[:, part])
        x = x + linear(torch.cat(outputs, dim=-1), w, at + "attn.proj")
        x = x + linear(gelu(linear(norm(x, w, at + "norm2", 1e-6), w, at + "mlp.fc1")), w, at + "mlp.fc2")
    return x


def code_2d(cell, width, grid):
    row, column = divmod(cell, grid)
    omega = [10000 ** (-i / (width / 4)) for i in range(width // 4)]
    return torch.tensor([f(p * o) for p in (column, row) for f in (math.sin, math.cos) for o in omega]).double()


def by_hand(model, tokens, masked, keep):
    """Latents, decoder features and logits of one sample (lists of ints and bools)."""
    c, w = model.config, dict(model.state_dict())
    rows = []
    for cell in [-1, *keep]:  # all cells are embedded at their own position, the dropped ones left out
        token = c.vocab.cls if cell < 0 else c.vocab.mask if masked[cell] else tokens[cell]
        embedded = w["token_emb.word.weight"][token] + w["token_emb.position.weight"][cell + 1]
        row = norm(embedded, w, "token_emb.norm", 1e-6)
        rows.append(row + code_2d(cell, c.width, c.grid) if c.grid_code and cell >= 0 else row)
    x = norm(blocks(torch.stack(rows), w, "blocks", c.depth, c.heads), w, "norm", 1e-6)
    u = linear(x, w, "decoder_embed")
    inputs = [u[0].clone() for _ in range(c.grid**2 + 1)]
    for latent, cell in enumerate(keep):
        if not masked[cell]:
            inputs[cell + 1] = u[latent + 1] + (u[0] if c.visible == "add" else 0)
    y = torch.stack(inputs) + w["decoder_position.weight"][: c.grid**2 + 1]
    y = norm(blocks(y, w, "decoder_blocks", c.decoder_depth, c.decoder_heads), w, "decoder_norm", 1e-6)
    h = norm(gelu(linear(y[1:], w, "token_head.fc")), w, "token_head.norm", 1e-5)
    logits = h @ w["token_emb.word.weight"].T + w["token_head.bias"]
    return x, y, logits[:, : c.vocab.codes]


CONFIGS = {
    "lease": tiny("lease"),
    "mage": tiny("mage"),
    "mage published vocabulary": tiny("mage", vocab=MAGE),
    "lease published vocabulary and rows": tiny("lease", vocab=LEASE, decoder_rows=30),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_what_the_equations_say(name):
    model = build_model(CONFIGS[name])
    tokens, masked, keep = batch(model.config)
    latents = model.encode(tokens, masked, keep)
    features = model.decode(latents, masked, keep)
    for i in range(len(tokens)):
        x, y, logits = by_hand(model, tokens[i].tolist(), masked[i].tolist(), keep[i].tolist())
        torch.testing.assert_close(latents[i], x, atol=1e-6, rtol=0)  # the stored 2-D table is float32
        torch.testing.assert_close(features[i], y, atol=1e-6, rtol=0)
        torch.testing.assert_close(model.token_logits(features)[i, 1:], logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_drop_no_cell(name):
    model = build_model(CONFIGS[name])
    tokens, masked, _ = batch(model.config)
    inputs = tokens.masked_fill(masked, model.mask_token)
    got = model.logits(inputs)
    assert got.shape == (3, 16, model.codebook_size)
    for i in range(3):
        *_, want = by_hand(model, tokens[i].tolist(), masked[i].tolist(), list(range(16)))
        torch.testing.assert_close(got[i], want, atol=1e-6, rtol=0)


def test_features_are_pooled_before_the_final_norm():
    model = build_model(CONFIGS["lease"])
    tokens, *_ = batch(model.config)
    hidden = model.encode(tokens, norm=False)[:, 1:].mean(1)
    want = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(model.features(tokens), want)
    normed = model.encode(tokens)[:, 1:].mean(1)
    assert (F.layer_norm(normed, normed.shape[1:]) - want).abs().max() > 1e-2


def test_every_switch_changes_the_numbers():
    """What a switch does is seen above; here that no two of its values can be confused."""
    base = CONFIGS["lease"]
    tokens, masked, keep = batch(base)
    plain = build_model(base)
    want = plain.decode(plain.encode(tokens, masked, keep), masked, keep)
    for change in ({"visible": "replace"}, {"grid_code": False}, {"heads": 4}, {"decoder_heads": 6}):
        other = MaskedTokenTransformer(replace(base, **change)).double().eval()
        other.load_state_dict(plain.state_dict())
        got = other.decode(other.encode(tokens, masked, keep), masked, keep)
        assert (got - want).abs().max() > 1e-3, change


def test_the_encoder_does_not_see_masked_or_dropped_codes():
    model = build_model(CONFIGS["lease"])
    tokens, masked, keep = batch(model.config)
    other = torch.where(masked, (tokens + 1) % 20, tokens)
    assert torch.equal(model.encode(tokens, masked, keep), model.encode(other, masked, keep))
    shown = (~masked).nonzero()[0]
    other[tuple(shown)] = (tokens[tuple(shown)] + 1) % 20
    assert not torch.equal(model.encode(tokens, masked, keep), model.encode(other, masked, keep))


def test_the_callers_tokens_are_left_alone():
    model = build_model(CONFIGS["mage"])
    tokens, masked, keep = batch(model.config)
    before = tokens.clone()
    model.encode(tokens, masked, keep)
    assert torch.equal(tokens, before)


def test_the_head_is_tied_but_sends_no_gradient_to_the_table():
    model = build_model(CONFIGS["lease"])
    model.token_logits(torch.randn(5, 24, dtype=torch.float64)).sum().backward()
    assert model.token_emb.word.weight.grad is None
    bias = model.token_head.bias.grad
    assert (bias[:20] == 5).all() and (bias[20:] == 0).all()
    model.token_emb.word.weight.data[3] += 1
    feature = torch.randn(24, dtype=torch.float64)
    assert model.token_logits(feature).shape == (20,)


def test_fast_attention_equals_plain():
    slow = tiny(kernel="plain")
    tokens, masked, keep = batch(slow)
    fast = MaskedTokenTransformer(tiny(kernel="sdpa")).eval()
    other = MaskedTokenTransformer(slow).eval()
    got, want = (m.decode(m.encode(tokens, masked, keep), masked, keep) for m in (fast, other))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert set(KERNELS) == {"sdpa", "plain"}


@pytest.mark.parametrize("kernel", ["sdpa", "plain"])
def test_dropout_acts_in_training_only_and_in_every_place(kernel):
    config = tiny(dropout=0.5, kernel=kernel)
    model = MaskedTokenTransformer(config)
    tokens, masked, keep = batch(config)
    torch.manual_seed(0)
    assert not torch.equal(model.encode(tokens, masked, keep), model.encode(tokens, masked, keep))
    model.eval()
    assert torch.equal(model.encode(tokens, masked, keep), model.encode(tokens, masked, keep))
    model.train()
    x = torch.randn(1, 9, 16)
    for silence in (
        ("attn.drop", "mlp.drop"),
        ("mlp.drop",),
    ):  # what is left is the attention's own, then the projection's
        block = MaskedTokenTransformer(config).blocks[0]
        for name in silence:
            block.get_submodule(name).p = 0.0
        assert not torch.equal(block(x), block(x))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    x = torch.rand(401, 257, dtype=torch.float32).add_(1).requires_grad_()
    torch.manual_seed(0)
    y = dropout(x, p)
    y.sum().backward()
    kept = y != 0
    n, share = x.numel(), kept.float().mean().item()
    assert abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    torch.testing.assert_close(y[kept], (x / (1 - p))[kept], rtol=2e-5, atol=0)
    assert torch.equal(x.grad != 0, kept) and torch.allclose(x.grad[kept], torch.tensor(1 / (1 - p)), rtol=2e-5)
    # neighbours come from one draw of 64 bits: they must not go together
    for shift in range(1, 5):
        together = (kept.flatten()[shift:] & kept.flatten()[:-shift]).float().mean().item()
        assert abs(together - (1 - p) ** 2) < 0.006
    torch.manual_seed(0)
    assert torch.equal(dropout(x, p), y) and not torch.equal(dropout(x, p), y)
    assert dropout(x, 0.0) is x


@pytest.mark.parametrize("kernel", ["sdpa", "plain"])
def test_recomputation_changes_no_bit(kernel):
    """Loss and gradients with and without it, dropout on; and what is kept between the passes shrinks."""
    config = tiny(dropout=0.3, kernel=kernel)
    tokens, masked, keep = batch(config)
    runs, kept = [], []
    for on in (False, True, None):
        model = MaskedTokenTransformer(config)
        for layer in model.modules():
            if isinstance(layer, Recompute):
                layer.recompute = on
        torch.manual_seed(3)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            loss = model.token_logits(model.decode(model.encode(tokens, masked, keep), masked, keep)).square().mean()
        loss.backward()
        kept.append(sum(sizes))
        runs.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    for other in runs[1:]:
        assert other.keys() == runs[0].keys() and all(torch.equal(other[n], v) for n, v in runs[0].items())
    assert kept[1] == kept[2] < 0.75 * kept[0]


def test_position_table_matches_cell_by_cell():
    table = pos2d(16, 5)
    for cell in range(25):
        torch.testing.assert_close(table[cell].double(), code_2d(cell, 16, 5), atol=1e-7, rtol=0)


def test_one_seed_one_model_whatever_happened_before():
    config = tiny("sorcen", projector=(8, 4), predictor=(6, 4))
    torch.manual_seed(1)
    first = MaskedTokenTransformer(config, seed=5).state_dict()
    torch.manual_seed(2)
    again, other = (MaskedTokenTransformer(config, seed=s).state_dict() for s in (5, 6))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert 0.9 < first["token_emb.word.weight"].std() / (0.02 * math.sqrt(768 / 16)) < 1.1
    assert table_std(768) == table_std(1024) == 0.02
    assert first["blocks.0.mlp.fc1.bias"].abs().max() == 0
    assert first["blocks.0.mlp.fc1.weight"].abs().max() <= math.sqrt(6 / (16 + 64))  # Xavier-uniform


@pytest.mark.parametrize("family", ["lease", "mage", "sorcen"])
def test_configuration_survives_a_checkpoint(family):
    config = model_config(family, "tiny", codes=64, **architecture(family, 12))
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown keys"):
        ModelConfig.from_dict({**config.to_dict(), "heds": 3})


def test_sizes_are_the_published_ones():
    order = ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")
    assert [SIZES["vit_base"][key] for key in order] == [768, 12, 12, 768, 8, 16]
    assert [SIZES["vit_large"][key] for key in order] == [1024, 24, 16, 1024, 8, 16]
    assert (compact_vocab(1024).rows, compact_vocab(1024).cls, compact_vocab(1024).mask) == (1026, 1024, 1025)
    assert architecture("sorcen") == {"projector": (4096, 512), "predictor": (2048, 512)}
    assert model_config("mage", "vit_base").projector is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visible": "mul"}, "mul"),
        ({"decoder_rows": 16}, "16 is below"),
        ({"heads": 3}, "width 16 is not a multiple of heads 3"),
        ({"width": 18, "heads": 2}, "multiple of 4"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MaskedTokenTransformer(replace(tiny(), **change))


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"9 cells per image, the model's grid 4\^2"):
        MaskedTokenTransformer(tiny()).features(torch.zeros(1, 9, dtype=torch.long))
