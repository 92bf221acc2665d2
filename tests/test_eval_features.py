"""Frozen features: the published numbers, computed once, one folder per model, tokens and settings."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from semdict.pipeline.common.errors import SemdictError, ShardError, WeightsError
from semdict.train.data.resident import class_names
from semdict.train.engine.model_file import save_model
from semdict.train.eval.features import FeatureStore, encoder_features
from semdict.train.eval.sources import TokenBatch, TokenSource
from semdict.train.masked.encoder import Encoder, load_encoder, run_name
from semdict.train.masked.model import MaskedTokenTransformer, model_config
from tests.token_sets import make_set, write

CPU = torch.device("cpu")
HEADS = {"num_heads": 4, "decoder_num_heads": 6}


def small_model(seed: int = 0, **changes) -> MaskedTokenTransformer:
    changes = {"width": 32, "depth": 2, "heads": 2, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2,
               "grid": 4} | changes  # fmt: skip
    return MaskedTokenTransformer(model_config("mage", "tiny", 40, **changes), seed)


def saved(path, seed: int = 0, recipe: dict | None = None, **changes):
    about = {"token_set": {"recipe": {"z": 1, "a": 2} if recipe is None else recipe}, "cfg": {"epochs": 7}}
    save_model(path / "model.pt", small_model(seed, **changes), about)
    return load_encoder(path)


def store(encoder: Encoder, root, **changes) -> FeatureStore:
    return FeatureStore(encoder, root / "work", CPU, **{"batch": 7, **changes})


@pytest.fixture
def shards(tmp_path):
    spec, block = make_set(rows=40, views=2)
    return write(tmp_path / "set", spec, block)


@pytest.mark.golden
@pytest.mark.parametrize("family", ["lease", "mage", "sorcen"])
def test_published_features(golden, family, tmp_path):
    io = np.load(golden / f"{family}_io.npz")
    encoder = load_encoder(golden / f"{family}_tiny.pth", **HEADS)
    tokens = torch.from_numpy(io["tokens"].astype(np.int64))
    got = encoder_features(encoder.model)(tokens).double().numpy()
    assert np.abs(got - io["feat_after_fc_norm"]).max() < 2e-5
    source = FakeSource(tokens)
    kept = store(encoder, tmp_path).get(source, []).first
    assert np.abs(kept - io["feat_after_fc_norm"]).max() < 2e-5 and kept.dtype == np.float32
    if family == "lease":
        assert np.abs(got - io["feat_encoder_norm_then_pool"]).max() > 1e-2  # the other order is far off
    assert encoder.recipe is None and encoder.about()["family"] == family
    assert encoder.check_tokens(tmp_path, 1024, 256, {"any": 1}) == "unknown"


class FakeSource:
    """A source of tokens that counts its passes."""

    def __init__(self, tokens: torch.Tensor, name: str = "t", bad: tuple = ()) -> None:
        self.tokens, self.labels, self.names = tokens, np.zeros(len(tokens), np.int64), ["0"]
        self.views, self.left_out, self.identity, self.about = ["v"], 0, {"tokens": name}, {}
        self.bad, self.passes = bad, 0

    def stream(self, view, batch):
        self.passes += 1
        for start in range(0, len(self.tokens), batch):
            part = self.tokens[start : start + batch]
            yield TokenBatch(start, part, tuple(i - start for i in self.bad if start <= i < start + len(part)))


def test_features_are_computed_once_per_model_tokens_and_settings(tmp_path):
    tokens = torch.randint(0, 40, (20, 16), generator=torch.Generator().manual_seed(0))
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=1)
    source, copy = FakeSource(tokens), FakeSource(tokens)
    first = store(a, tmp_path).get(source, [])
    again = store(a, tmp_path).get(copy, [])
    assert copy.passes == 0 and np.array_equal(first.first, again.first)
    want = encoder_features(a.model)(tokens).numpy()
    np.testing.assert_allclose(first.first, want, atol=1e-6)
    other = store(b, tmp_path).get(FakeSource(tokens), [])
    np.testing.assert_allclose(other.first, encoder_features(b.model)(tokens).numpy(), atol=1e-6)
    assert np.abs(other.first - first.first).max() > 0.1
    names = {store(a, tmp_path).fingerprint(source), store(b, tmp_path).fingerprint(source),
             store(a, tmp_path, dtype="float16").fingerprint(source),
             store(a, tmp_path, precision="bfloat16").fingerprint(source),
             store(a, tmp_path).fingerprint(FakeSource(tokens, "u")),
             store(replace(a, model=small_model(heads=4)), tmp_path).fingerprint(source)}  # fmt: skip
    assert len(names) == 6  # a released file does not hold its head count: the same bytes can be two models
    assert store(a, tmp_path, batch=3).fingerprint(source) == store(a, tmp_path).fingerprint(source)
    half = store(a, tmp_path, dtype="float16").get(source, []).first
    assert half.dtype == np.float16 and np.abs(half - want).max() < 5e-3


def test_an_interrupted_view_is_computed_again(tmp_path):
    encoder, tokens = saved(tmp_path / "a"), torch.zeros(20, 16, dtype=torch.long)

    class Dies(FakeSource):
        def stream(self, view, batch):
            yield from list(super().stream(view, batch))[:2]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store(encoder, tmp_path).get(Dies(tokens), [])
    folder = tmp_path / "work" / f"features-{store(encoder, tmp_path).fingerprint(FakeSource(tokens))}"
    assert list(folder.iterdir()) == []
    (folder / "v.npy.1.part").write_bytes(b"left by kill -9")
    source = FakeSource(tokens)
    assert len(store(encoder, tmp_path).get(source, []).first) == 20 and source.passes == 1
    assert sorted(path.name for path in folder.iterdir()) == ["v.json", "v.npy"]
    whole = (folder / "v.npy").read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damaged in (b"half", bytes(flipped)):
        (folder / "v.npy").write_bytes(damaged)
        with pytest.raises(SemdictError, match=r"v\.npy is damaged \(its SHA-256 is not the one in v\.json\)"):
            store(encoder, tmp_path).get(source, [])
    (folder / "v.npy").write_bytes(whole)
    (folder / "v.json").write_text("[]")
    with pytest.raises(SemdictError, match=r"v\.npy is damaged"):
        store(encoder, tmp_path).get(source, [])


def test_a_view_is_never_written_outside_its_folder(tmp_path):
    source = FakeSource(torch.zeros(3, 16, dtype=torch.long))
    source.views = ["../../out"]
    with pytest.raises(SemdictError, match="no name for a view"):
        store(saved(tmp_path / "a"), tmp_path).get(source, [])
    assert not list(tmp_path.rglob("out*"))


def test_bad_images_are_left_out(tmp_path):
    tokens = torch.arange(20)[:, None].expand(20, 16) % 40
    source = FakeSource(tokens, bad=(0, 9))
    source.labels = np.arange(20)
    features = store(saved(tmp_path / "a"), tmp_path).get(source, [])
    assert features.labels.tolist() == [n for n in range(20) if n not in (0, 9)] and len(features.first) == 18
    assert features.about["images"] == 18 and features.about["left_out"] == 2
    assert np.abs(features.first).min(axis=1).any()


def test_a_damaged_model_is_noticed(tmp_path):
    encoder = saved(tmp_path / "a")
    encoder.model.blocks[0].attn.qkv.weight[0, 0] = float("nan")
    with pytest.raises(SemdictError, match="not finite"):
        store(encoder, tmp_path).get(FakeSource(torch.zeros(3, 16, dtype=torch.long)), [])


def test_dropout_is_of_the_embedding_alone_and_only_where_requested(tmp_path):
    model, tokens = small_model(dropout=0.5).eval(), torch.zeros(4, 16, dtype=torch.long)
    plain, noisy = encoder_features(model), encoder_features(model, dropout=0.3)
    before = plain(tokens)
    torch.manual_seed(0)
    a = noisy(tokens)
    assert not torch.equal(a, noisy(tokens)) and not torch.equal(a[0], a[1])
    assert torch.equal(plain(tokens), before) and torch.equal(before[0], before[1])
    torch.manual_seed(0)
    assert torch.equal(noisy(tokens), a)
    assert torch.equal(encoder_features(model, dropout=1e-9)(tokens), before)  # the blocks' own 0.5 stays off


def test_token_sources(shards, tmp_path):
    from semdict.pipeline.shards import open_shards

    encoder = saved(tmp_path / "a")
    source = TokenSource(shards, ["train"], encoder, CPU)
    whole = open_shards(shards)
    rows = np.flatnonzero((whole.status[:] == 0) & (whole.label[:] >= 0))
    assert np.array_equal(source.labels, whole.label[:][rows]) and source.left_out == len(whole) - len(rows)
    for number, view in enumerate(source.views):
        parts = list(source.stream(view, 7))
        assert np.array_equal(torch.cat([part.tokens for part in parts]).numpy(), whole.gen[:][rows, number])
        assert [part.start for part in parts] == np.cumsum([0, *(len(part.tokens) for part in parts)])[:-1].tolist()
    with pytest.raises(ShardError, match=r"no view 'centre' among v0, v1"):
        next(source.stream("centre", 7))
    features = store(encoder, tmp_path).get(source, [])
    assert list(features.views) == ["v0", "v1"] and features.about["same_recipe_as_training"] == "same"
    assert np.abs(features.views["v0"] - features.views["v1"]).max() > 0.1


def test_tokens_of_another_recipe_are_refused(shards, tmp_path):
    other = saved(tmp_path / "other", recipe={"z": 1, "a": 3})
    with pytest.raises(ShardError, match=r"differ in: a: 3 -> 2 .*--other-recipe"):
        TokenSource(shards, [], other, CPU)
    assert TokenSource(shards, [], other, CPU, other_recipe=True).about["same_recipe_as_training"] == "other"
    for changes, words in (
        ({"grid": 8}, "64 cells"),
        ({"vocab": small_model().config.vocab.__class__(64, 64, 65, 66)}, "64 codes"),
    ):
        encoder = saved(tmp_path / words[:2], **changes)
        with pytest.raises(ShardError, match=words):
            TokenSource(shards, [], encoder, CPU, other_recipe=True)


def test_views_and_the_discriminative_codebook_do_not_make_another_recipe():
    recipe = {"gen": {"sha256": "1"}, "disc": {"k": 1}, "crop": {"crop": "resize-256", "views": ["centre"]}}
    encoder = Encoder(small_model(), "m", "0", recipe, None)
    more = {"gen": {"sha256": "1"}, "disc": {"k": 2},
            "crop": {"crop": "resize-256", "views": ["centre", "flip"], "ten_crop": 1}}  # fmt: skip
    assert encoder.check_tokens("x", 40, 16, more) == "same"
    with pytest.raises(ShardError, match=r"crop\.crop: resize-256 -> adm-256"):
        encoder.check_tokens("x", 40, 16, {**more, "crop": {"crop": "adm-256"}})
    with pytest.raises(ShardError, match=r"gen\.sha256: 1 -> 2"):
        encoder.only("gen").check_tokens("x", 40, 16, {"gen": {"sha256": "2"}})
    assert encoder.only("gen").check_tokens("x", 40, 16, {"gen": {"sha256": "1"}}) == "same"


def test_names_of_models(tmp_path):
    encoder = saved(tmp_path / "runs" / "lease")
    assert (
        encoder.name == "lease" and encoder.epochs == 7 and not any(p.requires_grad for p in encoder.model.parameters())
    )
    assert (
        run_name(tmp_path / "runs" / "lease" / "model.pt") == "lease" and run_name(tmp_path / "mage-b.pth") == "mage-b"
    )
    with pytest.raises(WeightsError, match="does not exist"):
        load_encoder(tmp_path / "nothing")
    shutil.copy(tmp_path / "runs" / "lease" / "model.pt", tmp_path / "copy.pt")
    assert load_encoder(tmp_path / "copy.pt").sha256 == encoder.sha256


def test_class_names():
    assert class_names(np.array([0, 2, -1]), ["a", "c", ""]) == ["a", "1", "c"]
    assert class_names(np.array([1]), None, ["x", "y"]) == ["x", "y"]
