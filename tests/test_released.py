"""Published checkpoints: golden numbers within their tolerances, each quirk's mutation noticed, loss-free saving."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from semdict.pipeline.common.errors import WeightsError
from semdict.train.engine.ema import Ema, beta
from semdict.train.masked.model import MaskedTokenTransformer, model_config
from semdict.train.masked.objectives.lease import Lease
from semdict.train.masked.objectives.mage import Mage
from semdict.train.masked.objectives.sorcen import Sorcen
from semdict.train.masked.released import load_released, released_teacher, save_released
from semdict.train.masked.vocab import LEASE, MAGE
from tests.tiny import architecture

LATENT, LOGITS, LOSS, FEATURE, HEAD = 5e-5, 1e-4, 1e-5, 2e-5, 1e-4
HEADS = {"num_heads": 4, "decoder_num_heads": 6}
GIVEN = {"num_heads": 2, "decoder_num_heads": 3}  # of the models made in these tests


@pytest.fixture(scope="module", autouse=True)
def exact():
    with torch.no_grad():
        yield


def fixture(golden, family):
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden / f"{family}_io.npz").items()}


def load(golden, family):
    return load_released(golden / f"{family}_tiny.pth", **HEADS)


def off(got, want):
    return (got.double() - want.double()).abs().max().item()


def masks(family, io):
    if family == "lease":
        return io["masked_256"], io["keep_idx"].long()
    kept = io["token_drop_mask"][:, 1:] == 0
    return io["token_all_mask"][:, 1:].bool(), kept.nonzero()[:, 1].view(len(kept), -1)


def run(model, family, io):
    tokens = io["tokens"].long()
    before = tokens.clone()
    p = Mage.pass_with(model, tokens, *masks(family, io))
    assert torch.equal(tokens, before)
    return p


def errors(model, family, io):
    """Distance from the fixture over its tolerance, by quantity; every one must be at most 1."""
    p = run(model, family, io)
    rows = io["logits_samples"] if family == "sorcen" else torch.arange(len(p.tokens))
    logits = model.token_logits(p.features[:, 1:])[rows][:, io["logits_positions"]]
    loss = io["rec_loss_vq_f64" if family == "lease" else "rec_loss_f64" if family == "sorcen" else "loss_f64"]
    distances = {
        "latent": off(p.latents, io["encoder_x" if family == "lease" else "latent"]) / LATENT,
        "logits": off(logits, io["logits_1024"]) / LOGITS,
        "loss": off(Mage().reconstruction(model, p), loss) / LOSS,
        "feature": off(model.features(p.tokens), io["feat_after_fc_norm"]) / FEATURE,
    }
    if family == "lease":
        distances["cls"] = off(p.features[:, 0], io["decoder_feats_cls"]) / LATENT
    return distances


@pytest.mark.parametrize("family", ["lease", "mage", "sorcen"])
def test_golden_pass(golden, family):
    model = load(golden, family)
    assert (model.family, model.codebook_size) == (family, 1024)
    assert model.mask_token == {"lease": 17029, "mage": 2024, "sorcen": 2024}[family]
    assert not model.training
    distances = errors(model, family, fixture(golden, family))
    assert max(distances.values()) <= 1, distances


def test_golden_lease_losses(golden):
    io, model = fixture(golden, "lease"), load(golden, "lease")
    p = run(model, "lease", io)
    raw = torch.from_numpy(np.load(golden / "lease_dictionary_raw.npy"))
    assert off(F.normalize(raw, dim=1), model.released.tensors["dino_codebook"]) < 1e-6
    words = io["disc_tokens"].long()
    total, parts = Lease(raw, contrast="encoder").losses(model, p, words)
    assert off(total, io["total_loss_f64"]) <= LOSS and off(parts["contrast_encoder"], io["info_nce_f64"]) <= LOSS
    _, parts = Lease(raw, contrast="both").losses(model, p, words)
    assert off(parts["contrast_decoder"], io["masked_dict_ce"]) <= LOSS
    _, alone = Lease(raw, neighbours=0).losses(model, p, words)
    assert off(alone["contrast_encoder"], io["info_nce_full_softmax"]) <= LOSS
    assert off(alone["contrast_encoder"], io["info_nce_f64"]) > 10 * LOSS  # the neighbour count is seen
    visible = ~p.masked.gather(1, p.keep_idx)
    assert visible.sum(1).tolist() == io["visible_per_sample"].tolist()
    projected = model.proj_to_dino(p.latents[:, 1:][visible])[:64]
    assert off(projected, io["proj_visible_first64"]) <= LOGITS


def test_golden_features_before_norms(golden):
    io, model = fixture(golden, "lease"), load(golden, "lease")
    tokens = io["tokens"].long()
    hidden = model.encode(tokens, norm=False)
    assert off(hidden[:, io["full_tokens_prenorm_pos"]], io["full_tokens_prenorm"]) <= 1e-4
    assert off(hidden[:, 1:].mean(1), io["feat_before_fc_norm"]) <= FEATURE
    assert off(model.encode(tokens)[:, 1:].mean(1), io["feat_encoder_norm_then_pool"]) <= FEATURE


def test_golden_generation_step(golden):
    model = load(golden, "lease")
    io = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden / "lease_genstep.npz").items()}
    canvas = io["tokens_in"].long()
    assert off(model.encode(canvas)[:, io["encoder_pos"]], io["encoder_x"]) <= LATENT
    logits = model.logits(canvas)
    assert off(logits[:, io["logits_positions"]], io["logits_1024"]) <= LOGITS
    clear = io["argmax_gap"] > 1e-3
    assert torch.equal(logits.argmax(-1)[clear], io["argmax_ids"].long()[clear])
    unknown = canvas == model.mask_token
    prob = logits.softmax(-1).gather(-1, io["sampled_ids"].long()[..., None])[..., 0]
    assert off(prob[unknown], io["selected_prob"][unknown]) <= 1e-5
    final = model.logits(io["final_canvas"].long()).argmax(-1)
    filled = torch.where(io["final_canvas"] == model.mask_token, final, io["final_canvas"].long())
    assert torch.equal(filled, io["final_tokens"].long())


def test_golden_mage_generation_logits(golden):
    io, model = fixture(golden, "mage"), load(golden, "mage")
    logits = model.logits(io["gen_tokens_in"].long())
    assert off(logits[:, io["gen_logits_positions"]], io["gen_logits_1024"]) <= LOGITS


def test_golden_sorcen_losses_teacher_and_batch_norm(golden):
    io, model = fixture(golden, "sorcen"), load(golden, "sorcen")
    objective = Sorcen(model, teacher=released_teacher(model))
    projector = objective.teacher["projector"]
    p, echo = run(model, "sorcen", io), io["echo_tokens"].long()
    latents = model.encode(echo, blocks=objective.teacher["blocks"])
    assert off(latents[:, io["teacher_x_positions"]], io["teacher_x"]) <= LATENT
    pooled = {"teacher": latents[:, 1:].mean(1), "student": p.latents[:, 1:].mean(1)}
    assert (
        off(pooled["teacher"], io["teacher_pooled"]) <= LATENT
        and off(pooled["student"], io["student_pooled"]) <= LATENT
    )
    assert off(p.latents.mean(1), io["uniformity_pooled"]) <= LATENT
    projector.eval()
    assert off(projector(pooled["teacher"]), io["teacher_projected_evalbn"]) <= HEAD
    assert off(model.predictor(model.projector(pooled["student"])), io["student_predicted_evalbn"]) <= HEAD
    for head in (model.projector, model.predictor, projector):
        head.train()
    total, parts = objective.losses(model, p, echo)
    assert off(total, io["total_f64"]) <= LOSS and off(parts["reconstruction"], io["rec_loss_f64"]) <= LOSS
    assert (
        off(parts["uniformity"], io["uniformity_f64"]) <= 2e-7
        and off(parts["echo_contrast"], io["info_nce_f64"]) <= LOSS
    )
    for head, name in (
        (projector, "momentum_projector"),
        (model.projector, "projector"),
        (model.predictor, "predictor"),
    ):
        assert off(head[1].running_mean, io[f"bn_after_{name}_mean"]) <= 1e-5
        assert off(head[1].running_var, io[f"bn_after_{name}_var"]) <= 1e-5
    assert off(projector(pooled["teacher"]), io["teacher_projected"]) <= HEAD
    projected = model.projector(pooled["student"])
    assert off(projected, io["student_projected"]) <= HEAD
    assert off(model.predictor(projected), io["student_predicted"]) <= HEAD


def test_golden_average(golden):
    io, model = fixture(golden, "sorcen"), load(golden, "sorcen")
    for epoch, value in zip(io["beta_epochs"].tolist(), io["beta_values"].tolist(), strict=True):
        assert beta(epoch, 1600) == pytest.approx(value, abs=1e-12)
    teacher = released_teacher(model)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.update(model, beta(400, 1600))
    state = teacher.state_dict()
    assert off(state["parts.blocks.0.attn.qkv.weight"], io["ema400_blocks_momentum_0_attn_qkv_weight"]) <= 1e-6
    assert off(state["parts.projector.3.bias"], io["ema400_momentum_projector_3_bias"]) <= 1e-6
    assert off(state["parts.projector.1.weight"], io["ema400_momentum_projector_bn_weight"]) <= 1e-6
    still = {k for k in state if torch.equal(state[k], before[k])}
    assert still == {k for k in state if "running" in k or "tracked" in k}  # the averaged set, exactly


# --- mutations: a fixture that a wrong implementation passes would be no fixture ---


def mutant(model, **changes):
    other = MaskedTokenTransformer(replace(model.config, **changes)).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("lease", {"visible": "replace"}),
        ("mage", {"visible": "add"}),
        ("sorcen", {"visible": "add"}),
        ("lease", {"grid_code": False}),
        ("mage", {"grid_code": True}),
        ("lease", {"heads": 8}),
        ("lease", {"decoder_heads": 8}),
        ("mage", {"heads": 2}),
        ("lease", {"vocab": replace(LEASE, cls=17029)}),
        ("lease", {"vocab": replace(LEASE, mask=17028)}),
        ("mage", {"vocab": replace(MAGE, cls=1024)}),
        ("sorcen", {"vocab": replace(MAGE, mask=2023)}),
    ],
)
def test_a_flipped_quirk_is_noticed(golden, family, changes):
    distances = errors(mutant(load(golden, family), **changes), family, fixture(golden, family))
    assert max(distances["loss"], distances["logits"]) > 3, distances


def test_a_wrong_epsilon_is_noticed(golden):
    io = fixture(golden, "lease")
    for name in ("token_emb.norm", "token_head.norm"):
        model = load(golden, "lease")
        norm = model.get_submodule(name)
        norm.eps = 1e-6 if norm.eps == 1e-5 else 1e-5
        assert max(errors(model, "lease", io).values()) > 1.5, name


def test_tanh_gelu_is_noticed(golden, monkeypatch):
    exact = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x: exact(x, approximate="tanh"))
    assert max(errors(load(golden, "lease"), "lease", fixture(golden, "lease")).values()) > 1.5


def test_a_transposed_position_table_is_noticed(golden):
    model = load(golden, "lease")
    model.pos2d.copy_(model.pos2d.view(16, 16, -1).transpose(0, 1).reshape(256, -1).clone())
    assert max(errors(model, "lease", fixture(golden, "lease")).values()) > 3


def test_averaging_another_set_is_noticed(golden):
    """Without the projector, or with the running statistics, the recorded update does not come out."""
    io, model = fixture(golden, "sorcen"), load(golden, "sorcen")
    teacher = released_teacher(model)
    alone = Ema(model, ("blocks",))
    alone.parts["blocks"].load_state_dict(teacher["blocks"].state_dict())
    alone.update(model, beta(400, 1600))
    assert off(teacher["projector"][3].bias, io["ema400_momentum_projector_3_bias"]) > 1e-5
    assert off(alone["blocks"][0].attn.qkv.weight, io["ema400_blocks_momentum_0_attn_qkv_weight"]) <= 1e-6


# --- loading and saving ---


@pytest.mark.parametrize("family", ["lease", "mage", "sorcen"])
def test_saving_back_loses_nothing(golden, tmp_path, family):
    model = load(golden, family)
    save_released(model, tmp_path / "again.pth", family)
    want = torch.load(golden / f"{family}_tiny.pth", weights_only=True)
    got = torch.load(tmp_path / "again.pth", weights_only=True)
    assert got["epoch"] == want["epoch"] and got["model"].keys() == want["model"].keys()
    for name, value in want["model"].items():
        assert got["model"][name].dtype == value.dtype and torch.equal(got["model"][name], value), name


def grown(family, **changes):
    base = {"width": 16, "depth": 1, "heads": 2, "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 3}
    if family == "sorcen":
        base |= {"projector": (8, 4), "predictor": (6, 4)}
    return MaskedTokenTransformer(model_config(family, "tiny", **{**architecture(family, 5), **base, **changes}), 3)


@pytest.mark.parametrize("family", ["lease", "mage", "sorcen"])
def test_a_model_trained_here_travels_in_the_published_layout(tmp_path, family):
    """Without fixtures: the lean vocabulary is moved to the published ids, and the numbers stay."""
    model = grown(family).eval()
    save_released(model, tmp_path / "m.pth", family, centroids=torch.randn(9, 5))
    again = load_released(tmp_path / "m.pth", num_heads=2, decoder_num_heads=3)
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1024, (2, 256), generator=rng)
    hidden = torch.rand(2, 256, generator=rng) < 0.5
    got, want = (m.logits(tokens.masked_fill(hidden, m.mask_token)) for m in (again, model))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(again.features(tokens), model.features(tokens), atol=1e-6, rtol=0)
    if family == "sorcen":
        assert torch.equal(released_teacher(again)["projector"][0].weight, model.projector[0].weight)


def edited(tmp_path, family="mage", **changes):
    model = grown(family)
    save_released(model, tmp_path / "m.pth", family, centroids=torch.randn(9, 5))
    whole = torch.load(tmp_path / "m.pth", weights_only=True)
    for key, value in changes.items():
        name = key.replace("__", ".")
        whole["model"].pop(name, None)
        if value is not None:
            whole["model"][name] = value
    torch.save(whole, tmp_path / "m.pth")
    return tmp_path / "m.pth"


@pytest.mark.parametrize(
    ("changes", "heads", "words"),
    [
        ({}, {}, "width 16 is none of the released.*num_heads="),
        ({}, {"num_heads": 2}, "width 24 is none of.*decoder_num_heads="),
        ({}, {"num_heads": 3, "decoder_num_heads": 3}, "num_heads 3 does not divide the width 16"),
        ({"norm__weight": None}, GIVEN, "lacks 1 tensors.*norm.weight"),
        ({"norm__weight": torch.ones(7)}, GIVEN, r"norm.weight has shape \(7,\).*\(16,\)"),
        (
            {"token_emb__word_embeddings__weight": torch.ones(99, 16)},
            {},
            "2025 rows.*17030 rows.*table of 99 rows",
        ),
        ({"token_emb__word_embeddings__weight": None}, {}, "no token_emb.word_embeddings.weight"),
        ({"decoder_embed__weight": None}, {}, "no decoder"),
        ({"proj_to_dino__0__weight": torch.ones(3, 16)}, {}, "is not a released checkpoint"),
        (
            {"blocks__0__attn__gate": torch.ones(2)},
            GIVEN,
            "no mage checkpoint has: blocks.0",
        ),
    ],
)
def test_other_files_are_refused_with_both_sides(tmp_path, changes, heads, words):
    path = edited(tmp_path, **changes)
    with pytest.raises(WeightsError, match=words) as caught:
        load_released(path, **heads)
    assert str(path) in str(caught.value)


def test_saving_into_another_family_or_size_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"lease layout.*this is a mage model"):
        save_released(grown("mage"), tmp_path / "m.pth", "lease")
    with pytest.raises(WeightsError, match=r"1024 codes.*512 codes"):
        save_released(grown("mage", codes=512), tmp_path / "m.pth", "mage")
    with pytest.raises(WeightsError, match="centroids="):
        save_released(grown("lease"), tmp_path / "m.pth", "lease")
    assert not list(tmp_path.iterdir())


def test_released_head_counts_are_known():
    from semdict.train.masked.released import DECODER_HEADS, HEADS

    assert HEADS == {768: 12, 1024: 16} and DECODER_HEADS == {768: 16, 1024: 16}


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(WeightsError):
        load_released(tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()
