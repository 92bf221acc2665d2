"""Models in reduced precision: rounded weights give autocast's bits, compiled parts are whole graphs of one size."""

import pytest
import torch

from semdict.pipeline.common import inference
from semdict.pipeline.common.device import HostCopy, read_one_late, reduced_precision
from semdict.pipeline.common.inference import Precisions, compile_parts, with_rounded_weights
from semdict.pipeline.tokenizers import load_features, load_tokenizer
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("models")
    tiny.make_vqgan(folder / "vqgan.ckpt")
    tiny.make_teacher(folder / "teacher.pth")
    teacher = load_features(**tiny.TEACHER, weights=folder / "teacher.pth")
    return {"tokenizer": load_tokenizer(folder / "vqgan.ckpt"), "teacher": teacher}


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def outputs(models: dict[str, torch.nn.Module], images: torch.Tensor, precision: str) -> tuple[torch.Tensor, ...]:
    with torch.no_grad(), reduced_precision(CPU, precision):
        return models["tokenizer"].encode_features(images), models["teacher"](images)


def test_rounded_weights_give_the_bits_of_autocast(models, images):
    rounded = {name: with_rounded_weights(model, "bfloat16") for name, model in models.items()}
    for plain, low in zip(outputs(models, images, "bfloat16"), outputs(rounded, images, "bfloat16"), strict=True):
        assert plain.dtype == low.dtype and torch.equal(plain, low)
    kinds = {p.dtype for p in models["teacher"].parameters()}, {p.dtype for p in rounded["teacher"].parameters()}
    assert kinds == ({torch.float32}, {torch.float32, torch.bfloat16}), "norms and positions stay in float32"


def test_float32_is_the_model_itself(models):
    precisions = Precisions(models, CPU, True, ("encoder", "backbone"))
    assert precisions.at("float32") is models
    assert precisions.at("bfloat16") is precisions.at("bfloat16") is not models


def test_compiled_parts_are_whole_graphs_with_equal_results(models, images):
    """No break of the graph: `fullgraph` raises at one. The eager backend changes no bit."""
    rounded = {name: with_rounded_weights(model, "bfloat16") for name, model in models.items()}
    want = outputs(rounded, images, "bfloat16")
    for model in rounded.values():
        compile_parts(model, ("encoder", "backbone"), fullgraph=True, backend="eager")
    for plain, compiled in zip(want, outputs(rounded, images, "bfloat16"), strict=True):
        assert torch.equal(plain, compiled)
    assert rounded["tokenizer"].encoder._compiled_call_impl and rounded["teacher"].backbone._compiled_call_impl


def test_compiled_models_see_one_size_of_batch(models, monkeypatch):
    monkeypatch.setattr(inference, "CROPS", 8)
    precisions = Precisions(models, torch.device("cuda"), True, ())
    sizes = [len(precisions.padded(torch.ones(n, 3, 4, 4), "bfloat16")) for n in (1, 7, 8, 9)]
    assert sizes == [8, 8, 8, 16]
    assert len(precisions.padded(torch.ones(7, 3, 4, 4), "float32")) == 7, "float32 is not compiled"
    padded = precisions.padded(torch.ones(3, 3, 4, 4), "float16")
    assert padded[:3].min() == 1 and padded[3:].abs().max() == 0
    assert len(Precisions(models, CPU, True, ()).padded(torch.ones(7, 3, 4, 4), "bfloat16")) == 7


def test_copies_are_read_one_batch_late():
    order = []

    def queue(number: int) -> HostCopy:
        order.append(f"queue {number}")
        return HostCopy({"x": torch.tensor([number])})

    for batch, arrays in read_one_late(range(3), queue):
        order.append(f"read {batch}")
        assert arrays["x"].tolist() == [batch]
    assert order == ["queue 0", "queue 1", "read 0", "queue 2", "read 1", "read 2"]
