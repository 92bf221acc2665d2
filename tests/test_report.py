"""The HTML page: shows the results there are, lists the missing ones, is self-contained, refuses damaged files."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from semdict.pipeline.common.errors import SemdictError, UsageError
from semdict.report.command import render, write_page
from semdict.report.results import Results, read_curve
from semdict.report.sections import markdown_tables, number
from tests import tiny

VOID = {"meta", "img", "link", "br"}


class Outline(HTMLParser):
    """Ids, pictures and visible text of a page; AssertionError for tags that are not nested."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.ids, self.sources, self.text = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())

    def row(self, first: str) -> list[str]:
        """The two cells of text after `first`."""
        cells = [text for text in self.text if text]
        return cells[cells.index(first) + 1 :][:2]


def put(root, name, value):
    path = root / "reports" / "small" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.fixture
def world(tmp_path):
    splits = {"train": {"images": 1_281_167, "bad": 3}}
    put(tmp_path, "manifest.json", {"splits": splits, "status": {"OK": 1_281_164, "TRUNCATED": 3}, "classes": 1000})
    chance = {"reconstruction": 6.931, "contrast_encoder": 9.7}
    put(tmp_path, "lease/metrics.json", {"chance": chance, "final": {"reconstruction": 5.5, "contrast_encoder": 8.25}})
    put(tmp_path, "mage/metrics.json", {"chance": {"reconstruction": 6.931}, "final": {"reconstruction": 5.75}})
    put(tmp_path, "lease/plots/loss.tsv", "step\tloss\n10\t7.5\n20\tnan\n30\t6.25\n")
    put(tmp_path, "lease/probe.json", {"top1": 76.11, "protocol": [{"measure": "linear <probe>"}]})
    few = {f"{key}_{count}_shot": float(count) for count in (16, 4, 8) for key in ("top1", "std")}
    put(tmp_path, "lease/few_shot.json", {**few, "protocol": []})
    put(tmp_path, "lease-samples/scores.json", {"missing": [{"fid_val50k": "no Inception weights"}], "images": 240})
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3000, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "reports" / "small" / "reconstructions.png")
    return tmp_path


def test_numbers_are_shown_beside_their_names(world):
    page = Outline(render(Results("small", world)))
    assert page.ids == ["tokens", "masked", "missing"]
    assert page.row("images, train")[0] == "1,281,167 (3 bad)"
    assert page.row("reconstruction, nats") == ["5.50 (chance 6.93)", "5.75 (chance 6.93)"]
    assert page.row("linear probe, top-1 %") == ["76.1", "–"], "a score that MAGE lacks is a dash"
    assert page.row("8 images per class, top-1 %")[0] == "8.0 ± 8.0"
    shots = [text for text in page.text if text.endswith("per class, top-1 %")]
    assert [text.split()[0] for text in shots] == ["4", "8", "16"]
    assert "lease: no fid_val50k: no Inception weights" in page.text


def test_the_page_is_self_contained(world):
    page = Outline(render(Results("small", world)))
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert {source[1:] for source in page.sources if source[0] == "#"} == set(page.ids)
    picture = next(source for source in page.sources if source.startswith("data:image/jpeg"))
    (world / "picture.jpg").write_bytes(base64.b64decode(picture.split(",")[1]))
    assert Image.open(world / "picture.jpg").size == (1280, 17), "no larger than a screen"
    curve = next(source for source in page.sources if source.startswith("data:image/svg"))
    assert ">loss<" in base64.b64decode(curve.split(",")[1]).decode()


@pytest.mark.slow
def test_the_page_of_a_real_run(tmp_path):
    """The keys that the page reads are those that the stages write."""
    training = {"size": "tiny", "width": 16, "decoder_width": 16, "epochs": 1, "warmup_epochs": 0, "batch": 4}
    runtime = {"tensorboard": False, "log_every": 1}
    tiny.make_world(tmp_path, pretrain={**training, "precision": "float32"}, runtime=runtime)
    tiny.run_until_centroids(tmp_path)
    for command in (["encode"], ["pretrain", "--objective", "mage"], ["report"]):
        assert tiny.semdict(tmp_path, *command) == 0
    page = Outline((tmp_path / "reports/tiny/report.html").read_text())
    assert page.row("images, train")[0] == "12 (0 bad)"
    assert float(page.row("decoded back, psnr mean")[0]) > 0
    assert "chance" in page.row("reconstruction, nats")[0]
    assert sum(source.startswith("data:image/svg") for source in page.sources) > 1, "curves"


def test_missing_results_are_listed_with_their_commands(world):
    results = Results("small", world)
    missing = {one.name: one.command for one in write_page(results, world / "page.html")}
    assert missing["kmeans.json"] == "dvc repro kmeans"
    assert missing["mage/probe.json"] == "semdict evaluate probe --model runs/small/mage"
    assert "lease/probe.json" not in missing
    page = Outline((world / "page.html").read_text())
    assert page.row("vcq/metrics.json")[0] == "dvc repro vcq_train"


def test_runs_and_measures_of_any_name_are_shown(world):
    put(world, "tau-0.3/metrics.json", {"chance": {"energy": 2.0}, "final": {"energy": 1.5}})
    put(world, "tau-0.3/nearest_class_mean.json", {"top1": 44.25, "protocol": [{}]})
    page = Outline(render(Results("small", world)))
    assert page.row("energy, nats") == ["–", "–"], "of the other two runs"
    assert page.text[page.text.index("energy, nats") :].count("1.50 (chance 2.00)") == 1
    assert "44.2" in page.text[page.text.index("nearest class mean, top-1 %") :]
    assert "semdict evaluate knn --model runs/small/tau-0.3" in page.text


def test_text_of_results_is_escaped(world):
    put(world, "kmeans.json", {"engine": "<script>alert(1)</script>"})
    page = render(Results("small", world))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "linear &lt;probe&gt;" in page


def test_the_same_results_leave_the_file_untouched(world):
    out = world / "page.html"
    write_page(Results("small", world), out)
    before = out.stat().st_mtime_ns
    write_page(Results("small", world), out)
    assert out.stat().st_mtime_ns == before
    put(world, "lease/probe.json", {"top1": 10.0, "protocol": []})
    write_page(Results("small", world), out)
    assert ">10.0<" in out.read_text()


def test_a_file_that_is_no_page_is_not_overwritten(world):
    out = put(world, "notes.txt", "mine")
    with pytest.raises(UsageError, match=r"notes\.txt exists and is not an HTML page"):
        write_page(Results("small", world), out)
    assert out.read_text() == "mine"


def test_the_demo_page_says_that_its_models_are_stand_ins(world):
    assert "stand-ins" not in render(Results("small", world))
    (world / "reports" / "small").rename(world / "reports" / "demo")
    assert "stand-ins" in render(Results("demo", world))


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[1]", "no table of results")])
def test_a_damaged_result_is_named(world, text, message):
    path = put(world, "encode.json", text)
    with pytest.raises(SemdictError, match=f"{re.escape(str(path))}: .*{message}"):
        render(Results("small", world))


def test_no_results_at_all_is_wrong_usage(world, capsys):
    with pytest.raises(UsageError, match=r"reports/none: no results; there are \['small'\]"):
        Results("none", world)
    assert tiny.semdict(world, "report", "--preset", "none") == 2
    assert "dvc repro makes them" in capsys.readouterr().err


def test_curves_leave_out_values_that_are_no_numbers(world):
    curve = read_curve(world / "reports/small/lease/plots/loss.tsv", "loss", "\t")
    assert (curve.x_name, curve.x, curve.y) == ("step", [10.0, 30.0], [7.5, 6.25])
    with pytest.raises(SemdictError, match=r"bad\.tsv"):
        read_curve(put(world, "bad.tsv", "step\tloss\nten\t1\n"), "loss", "\t")


def test_tables_of_the_comparisons_are_read_back():
    text = "## One\n\n| a | b |\n| --- | --- |\n| x | 1 |\n\nwords\n\n## Two\n\n| c |\n| --- |\n| y |\n"
    one, two = markdown_tables(text)
    assert (one.title, one.head, one.rows) == ("One", ["a", "b"], [["x", "1"]])
    assert (two.title, two.rows) == ("Two", [["y"]])


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (1281167, "1,281,167"), (0.123456, "0.1235"), (1677.92, "1,677.9"), ("f", "f")]
)
def test_numbers_are_formatted(value, text):
    assert number(value) == text
