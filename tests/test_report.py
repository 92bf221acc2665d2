"""The HTML page: shows the results there are, lists what is begun, is self-contained, refuses damaged files."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from semdict.pipeline.common.errors import SemdictError, UsageError
from semdict.report.charts import POINTS, thinned, usage
from semdict.report.command import render, write_page
from semdict.report.parts import Cell, duration, markdown_tables, number
from semdict.report.pictures import Pictures
from semdict.report.provenance import changed_parameters
from semdict.report.results import Confusion, Results, read_curve
from semdict.report.runs import ordered_columns, side_by_side
from semdict.report.sections import absent
from semdict.report.words import sample_rows, spread
from tests import tiny

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "img", "link", "br"}
LIMIT = 10_000_000  # bytes of a page


class Outline(HTMLParser):
    """Sections, pictures, charts and visible text of a page; AssertionError for tags that are not nested."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.ids, self.sources, self.text = [], [], [], []
        self.figures, self.captions, self.best = {}, [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if tag == "section" else []
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        self.figures |= {attributes["id"]: None} if attributes.get("type") == "application/json" else {}
        self.captions += [attributes["aria-label"]] if "data-figure" in attributes else []
        self.best += [""] if attributes.get("class") == "best" else []
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.figures |= {key: json.loads(data) for key, figure in self.figures.items() if figure is None}
        elif self.open[-1:] != ["style"]:
            self.text.append(data.strip())
            if self.best[-1:] == [""]:
                self.best[-1] = data.strip()

    def row(self, first: str, cells: int = 2) -> list[str]:
        """The texts after `first`."""
        texts = [text for text in self.text if text]
        return texts[texts.index(first) + 1 :][:cells]

    def lines(self, caption: str) -> dict[str, list[float]]:
        """Name -> heights of the lines of one chart."""
        figure = list(self.figures.values())[self.captions.index(caption)]
        return {line["name"]: line["y"] for line in figure["data"]}


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
    put(tmp_path, "lease/probe_curve.csv", "epoch,loss,top1,top5\n1,2.0,31.0,60.0\n2,1.5,76.11,90.0\n")
    put(tmp_path, "lease/probe_confusion.csv", "actual,predicted\ncat,cat\ncat,dog\ncat,dog\ndog,dog\n")
    few = {f"{key}_{count}_shot": float(count) for count in (16, 4, 8) for key in ("top1", "std")}
    put(tmp_path, "lease/few_shot.json", {**few, "protocol": []})
    scores = {"fid_val50k": 9.5, "missing": [{"fid_adm": "no statistics of ADM"}], "images": 240}
    put(tmp_path, "lease-samples/scores.json", scores)
    put(tmp_path, "by-hand/scores.json", {"fid_val50k": 8.25})
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3000, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "reports" / "small" / "reconstructions.png")
    return tmp_path


def test_numbers_are_shown_beside_their_names(world):
    page = Outline(render(Results("small", world)))
    assert page.ids == ["tokens", "encoders", "samples", "missing"]
    assert page.row("images, train")[0] == "1,281,167 (3 bad)"
    heads = ["linear probe, top-1 %", "4 per class, top-1 %", "8 per class, top-1 %", "16 per class, top-1 %"]
    heads += ["reconstruction, nats", "contrast encoder, nats"]
    assert page.row("run", 6) == heads
    lease = ["76.1", "4.0 ± 4.0", "8.0 ± 8.0", "16.0 ± 16.0", "5.50 (chance 6.93)", "8.25 (chance 9.70)"]
    assert page.row("lease", 6) == lease
    assert page.row("mage", 6) == ["–", "–", "–", "–", "5.75 (chance 6.93)", "–"], "a score that MAGE lacks is a dash"
    assert "fid_adm: no statistics of ADM" in page.text


def test_the_head_line_names_the_best_runs(world):
    page = Outline(render(Results("small", world)))
    assert page.row("images", 2) == ["1,281,167", "1,281,167 train; 1,000 classes"]
    assert page.row("best encoder: lease") == ["76.1", "linear probe, top-1 %"]
    assert page.row("best samples: by-hand") == ["8.25", "fid val50k"]


def test_the_best_value_of_a_column_is_marked(world):
    page = Outline(render(Results("small", world)))
    assert page.best == ["5.50 (chance 6.93)", "8.25"], "the lower loss, the lower FID; no column with one value"
    rows = {"a": {"teacher recall": Cell("0.5", 0.5)}, "b": {"teacher recall": Cell("0.7", 0.7)}}
    table = side_by_side(rows, "", "samples")
    assert [row[1].best for row in table.rows] == [False, True], "the higher recall"
    tied = side_by_side({"a": {"f1": Cell("1", 1.0)}, "b": {"f1": Cell("1", 1.0)}}, "", "samples")
    assert not any(cell.best for row in tied.rows for cell in row)


def test_columns_keep_the_order_of_every_row():
    assert ordered_columns({"a": {"x": 1, "z": 1}, "b": {"x": 1, "y": 1, "z": 1}}) == ["x", "y", "z"]


def test_charts_hold_the_points_of_the_files(world):
    page = Outline(render(Results("small", world)))
    assert page.lines("Training: loss") == {"lease": [7.5, 6.25]}
    assert page.lines("Linear probe: accuracy on the test split") == {"lease": [31.0, 76.11]}
    matrix = page.figures["encoders-chart-3"]["data"][0]
    assert (matrix["y"], matrix["z"]) == (["cat", "dog"], [[33.3, 66.7], [0, 100]])
    assert "Most frequent: cat taken for dog (2)." in page.text


def test_the_page_is_self_contained(world):
    text = render(Results("small", world))
    page = Outline(text)
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert {source[1:] for source in page.sources if source[0] == "#"} == set(page.ids)
    assert len(text.encode()) < LIMIT
    picture = next(source for source in page.sources if source.startswith("data:image/jpeg"))
    (world / "picture.jpg").write_bytes(base64.b64decode(picture.split(",")[1]))
    assert Image.open(world / "picture.jpg").size == (1280, 17), "no larger than a screen"


def test_pictures_stop_at_the_limit(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    pictures = Pictures(limit=9_000)
    assert pictures.file(tmp_path / "a.png", "first") is not None
    assert pictures.file(tmp_path / "b.png", "second") is None
    assert pictures.file(tmp_path / "none.png", "third") is None
    assert pictures.left_out == [tmp_path / "b.png"]


@pytest.mark.slow
def test_the_page_of_a_real_run(tmp_path):
    """The keys that the page reads are those that the stages write; words are cut from the images that were encoded."""
    training = {"size": "tiny", "width": 16, "decoder_width": 16, "epochs": 1, "warmup_epochs": 0, "batch": 4}
    runtime = {"tensorboard": False, "log_every": 1}
    tiny.make_world(tmp_path, pretrain={**training, "precision": "float32"}, runtime=runtime)
    tiny.run_until_centroids(tmp_path)
    for command in (["encode"], ["pretrain", "--objective", "mage"], ["report"]):
        assert tiny.semdict(tmp_path, *command) == 0
    report = tmp_path / "reports/tiny/report.html"
    page = Outline(report.read_text())
    assert page.row("images, train")[0] == "12 (0 bad)"
    assert float(page.row("decoded back, psnr mean")[0]) > 0
    assert "chance" in page.row("mage", 1)[0]
    assert page.lines("Codebook usage: share of all tokens, by rank").keys() == {"gen", "disc"}
    words = [text for text in page.text if re.fullmatch(r"word \d+: [\d.]+% of the tokens", text)]
    assert 1 < len(words) <= tiny.WORDS
    assert page.row("semdict", 1) == ["0.1.0"], "the journal"
    shutil.move(tmp_path / "images", tmp_path / "elsewhere")
    assert tiny.semdict(tmp_path, "report") == 0
    page = Outline(report.read_text())
    assert any(text.startswith("No patches of words: ") and "i000.png" in text for text in page.text)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1300, 400])
def test_a_browser_draws_the_page_without_an_error(world, width):
    """Every chart gets its drawing, tables sort, nothing is wider than the screen, the console stays empty."""
    page = world / "page.html"
    write_page(Results("small", world), page)
    script = """<script>addEventListener("load", () => setTimeout(() => {
      const page = document.querySelector("iframe").contentWindow.document;
      const table = page.querySelector("table.sortable");
      const heading = table.tHead.rows[0].cells[1];
      heading.firstElementChild.click();
      document.title = "result " + [
        page.documentElement.scrollWidth, page.querySelectorAll(".plot .main-svg").length > 0,
        page.querySelectorAll(".plot:empty").length, heading.ariaSort, table.tBodies[0].rows[0].cells[0].textContent,
      ].join(" ");
    }, 1500))</script>"""
    frame = world / "frame.html"  # a browser's window is at least 500 pixels wide, a frame is not
    frame.write_text(f"<!doctype html><iframe src='page.html' width={width} height=900></iframe>{script}")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    options += ["--allow-file-access-from-files", "--virtual-time-budget=8000"]
    options += ["--enable-logging=stderr", f"--user-data-dir={world / 'browser'}"]
    run = subprocess.run([CHROMIUM, *options, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in run.stderr
    result = re.search(r"<title>result (.*)</title>", run.stdout)
    assert result, "the page's script ran"
    assert result[1].split() == [str(width), "true", "0", "descending", "lease"]


def test_only_what_is_begun_is_asked_for(world):
    missing = {one.name: one.command for one in absent(Results("small", world))}
    assert missing["kmeans.json"] == "dvc repro kmeans"
    assert missing["mage/probe.json"] == "semdict evaluate probe --model runs/small/mage"
    assert missing["mage/few_shot.json"] == "semdict evaluate few-shot --model runs/small/mage", "lease has it"
    assert not {"lease/probe.json", "mage/knn.json", "entropy/entropy.json"} & missing.keys()
    assert not any(name.startswith(("vcq", "ar/")) for name in missing), "no stage of VCQ has run"
    put(world, "vcq/metrics.json", {"psnr": 21.0})
    assert "ar/metrics.json" in {one.name for one in absent(Results("small", world))}
    (world / "reports/small/manifest.json").unlink()
    names = {one.name for one in absent(Results("small", world))}
    assert "kmeans.json" not in names, "an imported set has no token stages"


def test_runs_and_measures_of_any_name_are_shown(world):
    put(world, "tau-0.3/metrics.json", {"chance": {"energy": 2.0}, "final": {"energy": 1.5}})
    put(world, "tau-0.3/nearest_class_mean.json", {"top1": 44.25, "protocol": [{}]})
    page = Outline(render(Results("small", world)))
    assert "1.50 (chance 2.00)" in page.text
    assert "energy, nats" in page.text
    assert "44.2" in page.text[page.text.index("nearest class mean, top-1 %") :]
    assert "semdict evaluate probe --model runs/small/tau-0.3" in page.text


def test_samples_made_by_hand_are_shown(world):
    card = {"task": "inpaint", "images": 16, "temperature": 4.5}
    path = world / "runs/small/holes/generate.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(card))
    Image.new("RGB", (64, 64)).save(path.with_name("grid.png"))
    page = Outline(render(Results("small", world)))
    assert page.row("holes", 3) == ["inpaint", "16", "4.5"]


def test_text_of_results_is_escaped(world):
    put(world, "kmeans.json", {"engine": "<script>alert(1)</script>"})
    put(world, "</script><b>/metrics.json", {"chance": {"loss": 1.0}, "final": {"loss": 0.5}})
    put(world, "</script><b>/plots/loss.tsv", "step\tloss\n1\t2.0\n2\t1.0\n")
    page = render(Results("small", world))
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page
    assert "linear &lt;probe&gt;" in page
    assert "</script><b>" not in page


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


def test_provenance_adds_the_time_of_interrupted_attempts(world):
    about = {"device": "two cores", "semdict": "0.1.0", "commit": "abc123", "changed": True}
    runs = [
        {"command": "semdict kmeans", "started": "2026-03-01T10:00:00+00:00", "seconds": 30.0, "exit": 0},
        {"command": "semdict pretrain", "started": "2026-03-01T10:01:00+00:00", "seconds": 50.0, "exit": 130},
        {"command": "semdict pretrain", "started": "2026-03-01T10:02:00+00:00", "seconds": 15.0, "exit": 0},
    ]
    put(world, "journal.jsonl", "".join(json.dumps(run | about) + "\n" for run in runs) + '{"command": "cut o')
    page = Outline(render(Results("small", world)))
    assert page.row("commit", 1) == ["abc123 with changes"]
    assert page.row("date", 1) == ["2026-03-01 10:00 to 10:02 UTC"]
    assert page.row("time of all stages", 1) == ["1 min 35 s"]
    bars = list(page.figures.values())[page.captions.index("Time per stage")]["data"][0]
    assert (bars["y"], bars["x"]) == (["kmeans", "pretrain"], [30.0, 65.0])


def test_parameters_that_differ_from_the_base_are_listed(world):
    (world / "presets").mkdir()
    (world / "presets/base.yaml").write_text("preset: base\nkmeans: {k: 16384, seed: 0}\npretrain: {splits: [train]}\n")
    (world / "params.yaml").write_text("preset: small\nkmeans: {k: 256, seed: 0}\npretrain: {splits: [train, val]}\n")
    changed = [("kmeans.k", "256", "16384"), ("pretrain.splits", "['train', 'val']", "['train']")]
    assert changed_parameters(Results("small", world)) == changed
    (world / "params.yaml").write_text("preset: other\nkmeans: {k: 256}\n")
    assert changed_parameters(Results("small", world)) == []


def test_words_are_spread_over_their_frequency_with_one_patch_per_image():
    sample = np.array([[0, 0, 0, 1], [0, 0, 1, 2], [0, 3, 1, 2], [0, 3, 3, 1]])
    words = spread(sample, np.array([8, 5, 3, 2]), words=2, patches=2)
    assert [word.id for word in words] == [0, 3], "the most and the least frequent"
    assert words[0].share == 8 / 18
    assert words[1].patches == [(2, 1), (3, 2)]
    for word in words:
        assert all(sample[image, cell] == word.id for image, cell in word.patches)
        assert len({image for image, _ in word.patches}) == len(word.patches)
    assert sample_rows(np.array([0, 3, 0, 0, 3, 0]), 3).tolist() == [0, 2, 5]


def test_the_usage_curve_ends_at_the_last_code_in_use():
    figure = usage({"gen": np.array([0, 6, 1, 3])}).figure["data"][0]
    assert (figure["x"], figure["y"]) == ([1, 2, 3], [0.6, 0.3, 0.1])


def test_the_most_frequent_mistakes_come_first():
    matrix = Confusion(["a", "b", "c"], np.array([[9, 2, 0], [5, 1, 0], [0, 0, 7]]))
    assert matrix.worst(5) == [("b", "a", 5), ("a", "b", 2)]


def test_long_curves_are_thinned():
    values = thinned(range(10_000))
    assert (len(values), values[0], values[-1]) == (POINTS, 0, 9999)


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
    assert (one.title, one.head, one.rows) == ("One", ["a", "b"], [[Cell("x"), Cell("1")]])
    assert (two.title, two.rows) == ("Two", [[Cell("y")]])


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (1281167, "1,281,167"), (0.123456, "0.1235"), (1677.92, "1,677.9"), ("f", "f")]
)
def test_numbers_are_formatted(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(41.6, "42 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_durations_are_formatted(seconds, text):
    assert duration(seconds) == text
