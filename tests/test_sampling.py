"""Iterative decoding: golden steps of the published code, and properties for any model."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semdict.pipeline.common.errors import UsageError
from semdict.train.masked.context import box_cells, hidden_cells
from semdict.train.masked.iterative_decoding import (
    Decoding,
    ImageRng,
    cells_to_hide,
    confidence,
    decode_iteratively,
    least_confident,
    sample_unknown,
    share_equal_contexts,
)
from semdict.train.masked.model import MaskedTokenTransformer, model_config
from semdict.train.masked.released import load_released
from tests import tiny

CODES, MASK = 7, 7


@pytest.fixture(scope="module")
def model() -> MaskedTokenTransformer:
    """A small LEASE with a head that is not flat."""
    model = MaskedTokenTransformer(
        model_config("lease", "tiny", 32, **tiny.architecture("lease", 8), grid=4), seed=1
    ).eval()
    with torch.no_grad():
        model.token_emb.word.weight.mul_(3)
    return model.requires_grad_(False)


def numbers(table: torch.Tensor):
    """Logits (L, K) at the unknown cells that do not depend on the context."""
    return lambda tokens, unknown: table.expand(len(tokens), -1, -1)[unknown]


@pytest.mark.golden
def test_a_step_is_the_published_one(golden):
    """The recorded codes and noise of one step lead to the recorded tokens."""
    z = np.load(golden / "lease_genstep.npz")
    model = load_released(golden / "lease_tiny.pth", num_heads=4, decoder_num_heads=6).eval()
    tokens = torch.from_numpy(z["tokens_in"].astype(np.int64))
    unknown = tokens == model.mask_token
    with torch.no_grad():
        logits = model.logits_at(tokens, unknown)
    whole = torch.full((*tokens.shape, 1024), float("nan"))
    whole[unknown] = logits
    at = torch.from_numpy(z["logits_positions"].astype(np.int64))
    published = torch.from_numpy(z["logits_1024"])
    shown = unknown[:, at]
    assert shown.sum() > 20
    assert (whole[:, at][shown] - published[shown]).abs().max() < 2e-4
    sampled_ids = torch.from_numpy(z["sampled_ids"].astype(np.int64))
    probability = torch.ones(tokens.shape, dtype=torch.float64)
    probability[unknown] = whole.double().softmax(-1)[unknown].gather(-1, sampled_ids[unknown][:, None])[:, 0]
    assert (probability - torch.from_numpy(z["selected_prob"])).abs()[unknown].max() < 1e-5
    step, steps = int(z["step"]), int(z["num_iter"])
    begin = torch.full((2,), 256)
    hide = cells_to_hide(step, steps, begin, unknown.sum(1)[:1].expand(2))
    assert hide.tolist() == [int(z["mask_len"])] * 2
    temperature = float(z["choice_temperature"]) * (1 - (step + 1) / steps)
    assert temperature == pytest.approx(float(z["temperature"]))
    sure = confidence(probability, torch.from_numpy(z["gumbel"]).double(), temperature)
    again = least_confident(sure, unknown, hide)
    assert torch.equal(again, torch.from_numpy(z["remask"]))
    following = torch.where(unknown, sampled_ids, tokens).masked_fill(again, model.mask_token)
    assert torch.equal(following, torch.from_numpy(z["tokens_next"].astype(np.int64)))


@pytest.mark.golden
def test_the_last_cell_is_filled_as_published(golden):
    z = np.load(golden / "lease_genstep.npz")
    model = load_released(golden / "lease_tiny.pth", num_heads=4, decoder_num_heads=6).eval()
    context = torch.from_numpy(z["final_canvas"].astype(np.int64))
    unknown = context == model.mask_token
    assert unknown.sum(1).tolist() == [1, 1]
    with torch.no_grad():
        context[unknown] = model.logits_at(context, unknown).argmax(-1)
    assert torch.equal(context, torch.from_numpy(z["final_tokens"].astype(np.int64)))


@pytest.mark.golden
def test_as_many_cells_stay_hidden_as_published(golden):
    z = np.load(golden / "lease_genstep.npz")
    contexts, left = z["trajectory_tokens"], []
    for step in range(6):
        unknown = torch.from_numpy((contexts[step] == 17029).sum(1))
        left.append(int(cells_to_hide(step, 6, torch.full((2,), 256), unknown)[0]))
    assert left == z["trajectory_mask_len"].tolist()
    assert left == [(contexts[step + 1][0] == 17029).sum() for step in range(6)]


def test_one_step_is_one_forward_pass(model):
    """All codes come from the softmax of a single pass over the empty context, by one uniform number each."""
    context = torch.full((3, 16), model.mask_token)
    sampled = decode_iteratively(
        model.logits_at, context, model.mask_token, ImageRng(5, [0, 1, 2]), Decoding(1, 4.5, "sampled")
    )
    probabilities = model.logits(context).double().softmax(-1).numpy()
    place = ImageRng(5, [0, 1, 2]).uniform(16)
    for image, cell in np.ndindex(3, 16):
        below = np.cumsum(probabilities[image, cell])
        assert sampled[image, cell] == np.searchsorted(below, place[image, cell] * below[-1], side="right")


def test_argmax_takes_one_more_pass_for_the_last_cell(model):
    passes = []

    def counted(tokens, unknown):
        passes.append(unknown.sum(1).tolist())
        return model.logits_at(tokens, unknown)

    context = torch.full((2, 16), model.mask_token)
    filled = decode_iteratively(counted, context, model.mask_token, ImageRng(0, [0, 1]), Decoding(4, 4.5, "argmax"))
    shares = [16, *(max(1, math.floor(16 * math.cos(math.pi / 2 * (s + 1) / 4))) for s in range(4))]
    assert passes == [[n, n] for n in shares]
    assert (filled < 32).all()


def test_an_image_does_not_depend_on_its_batch(model):
    """The same numbers give the same image alone, in another order, and beside others."""
    decoding = Decoding(6, 4.5)

    def draw(which):
        context = torch.full((len(which), 16), model.mask_token)
        return decode_iteratively(model.logits_at, context, model.mask_token, ImageRng(3, which), decoding)

    together = draw([0, 1, 2, 3, 4])
    assert len({tuple(row) for row in together.tolist()}) == 5, "images differ"
    assert torch.equal(draw([4, 2]), together[[4, 2]])
    assert torch.equal(torch.cat([draw([n]) for n in range(5)]), together)


@pytest.mark.parametrize("last", ["argmax", "sampled"])
def test_the_loop_is_the_published_one(model, last):
    """The loop written out from the description of the published code, one image at a time, with the same numbers."""
    model = copy.deepcopy(model)
    model.token_head.bias.normal_(std=4, generator=torch.Generator().manual_seed(1))  # confidence matters beside noise
    steps, images = 5, 6
    context = torch.full((images, 16), model.mask_token)
    for image in range(images):  # unlike numbers of known cells
        context[image, : 2 * image] = 4
    decoding = Decoding(steps, 4.5, last)
    got = decode_iteratively(model.logits_at, context, model.mask_token, ImageRng(8, range(images)), decoding)
    for image in range(images):
        rng, tokens = ImageRng(8, [image]), context[image].clone()
        for step in range(steps):
            unknown = np.flatnonzero(tokens == model.mask_token)
            probabilities = model.logits(tokens[None])[0].double().softmax(-1).numpy()
            place, noise = rng.uniform(16)[0], rng.gumbel(16)[0]
            filled, sure = tokens.clone(), np.full(16, np.inf)
            for cell in unknown:
                below = np.cumsum(probabilities[cell])
                filled[cell] = int(np.searchsorted(below, place[cell] * below[-1], side="right"))
                sure[cell] = np.log(probabilities[cell, filled[cell]]) + 4.5 * (1 - (step + 1) / steps) * noise[cell]
            ratio = math.cos(math.pi / 2 * (step + 1) / steps)
            hidden = max(1, min(len(unknown) - 1, math.floor((16 - 2 * image) * ratio)))
            tokens = filled.clone()
            tokens[torch.from_numpy(sure <= np.sort(sure)[hidden - 1])] = model.mask_token
        if last == "argmax":
            filled = torch.where(tokens == model.mask_token, model.logits(tokens[None])[0].argmax(-1), tokens)
        assert torch.equal(got[image], filled)


def test_equal_contexts_take_one_pass(model):
    """Images from nothing share the first pass; with known cells, or once they differ, each has its own."""
    seen = []

    def counted(tokens, unknown):
        seen.append(len(tokens))
        return model.logits_at(tokens, unknown)

    context = torch.full((3, 16), model.mask_token)
    context[:, 5] = 2
    for differ in (False, True):
        context[1, 5] = 3 if differ else 2
        unknown = context == model.mask_token
        got = share_equal_contexts(counted)(context, unknown)
        assert torch.allclose(got, model.logits_at(context, unknown), atol=1e-5)
    assert seen == [1, 3]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 99), st.sampled_from(["argmax", "sampled"]), st.floats(0, 20))
def test_known_cells_never_change_and_all_others_are_filled(steps, seed, last, temperature):
    rng = torch.Generator().manual_seed(seed)
    context = torch.randint(0, CODES, (4, 9), generator=rng)
    context[torch.rand(4, 9, generator=rng) < torch.rand(4, 1, generator=rng)] = MASK
    context[0], context[1] = context[0].clamp(max=CODES - 1), MASK
    table = torch.randn(9, CODES, generator=rng)
    filled = decode_iteratively(numbers(table), context, MASK, ImageRng(seed, [0, 1, 2, 3]),
                                Decoding(steps, temperature, last))  # fmt: skip
    known = context != MASK
    assert torch.equal(filled[known], context[known])
    assert filled.min() >= 0 and filled.max() < CODES


def test_codes_are_sampled_with_the_models_probabilities():
    """20,000 samples of three cells against the softmax, chi-square by cell (0.1 % critical value, 6 degrees)."""
    logits = torch.tensor([[0.0, 1, 2, -1, 0.5, 3, -2], [0.0] * 7, [5.0, 0, 0, 0, 0, 0, -60]])
    tokens = torch.full((1, 3), MASK)
    counts = torch.zeros(3, CODES)
    rng = ImageRng(0, [0])
    for _ in range(20_000):
        sampled, _ = sample_unknown(logits, tokens, tokens == MASK, rng)
        counts[torch.arange(3), sampled[0]] += 1
    want = 20_000 * logits.double().softmax(-1)
    assert counts[2, 6] == 0
    assert (((counts - want) ** 2 / want)[:, :6].sum(1) < 22.5).all()


def test_low_temperature_keeps_the_most_confident():
    probability = torch.tensor([[0.9, 0.1, 0.5, 1.0, 0.3]], dtype=torch.float64)
    unknown = torch.tensor([[True, True, True, False, True]])
    again = least_confident(confidence(probability, torch.zeros(1, 5), 0.0), unknown, torch.tensor([2]))
    assert again.tolist() == [[False, True, False, False, True]]


def test_hidden_cells_of_each_task():
    inside = hidden_cells("inpaint", 16, [4, 4, 8, 8], 0.5, 0, [0, 1])
    assert inside.sum(1).tolist() == [64, 64] and inside[0].reshape(16, 16)[4:12, 4:12].all()
    assert torch.equal(hidden_cells("outpaint", 16, [4, 4, 8, 8], 0.5, 0, [0, 1]), ~inside)
    some = hidden_cells("reconstruct", 16, [4, 4, 8, 8], 0.75, 0, [0, 1])
    assert some.sum(1).tolist() == [192, 192] and not torch.equal(some[0], some[1])
    assert torch.equal(hidden_cells("reconstruct", 16, [4, 4, 8, 8], 0.75, 0, [1])[0], some[1])
    assert hidden_cells("unconditional", 16, [4, 4, 8, 8], 0.75, 0, [0]).all()
    for box in ([10, 0, 8, 2], [0, 0, 0, 3]):
        with pytest.raises(UsageError, match="box"):
            box_cells(box, 16)
