import json
import math
import re
import sys
from html.parser import HTMLParser

import msgspec
import pytest
from unit.made_findings import BUDGET, HOSTILE, INT8, REFERENCE, bare, errors, findings, hostile, many_rows, row

from headrace_backends.optimize import figures, plots, reading, summary
from headrace_backends.optimize.accuracy import Budget
from headrace_backends.optimize.findings import Fate, LayerSensitivity, Row
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.report import BadReport, read_report, write_report
from headrace_backends.optimize.report_page import render

VOID = {"meta", "br", "link", "img", "input", "hr", "path", "use", "rect"}
EVERYTHING = {
    "six": findings,
    "sixty": lambda: findings(60),
    "bare": bare,
    "hostile": hostile,
    "reference chosen": lambda: findings(4, chosen=REFERENCE, rows=many_rows(6)[1:5]),
    "no budget": lambda: findings(6, budget=None, allow=()),
    "largest error": lambda: findings(20, budget=Budget("max_rel", max=0.05)),
    "owner's metric": lambda: findings(20, budget=Budget("judge.py:accuracy", min=0.9)),
    "cosine": lambda: findings(20, budget=Budget("cosine", min=0.99)),
}


@pytest.fixture
def without_plots(monkeypatch):
    """Most of the page can be looked at without drawing, which takes most of the time."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


class Page(HTMLParser):
    """Checks that every element is closed in order, and keeps what there is."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.texts, self.attributes, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_page_is_well_formed_and_loads_nothing(name):
    source = render(EVERYTHING[name]())
    page = Page(source)
    assert page.seen.count("html") == page.seen.count("h1") == page.seen.count("main") == 1
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(page.seen)
    for attribute, value in page.attributes:
        assert attribute not in {"src", "srcset", "action", "data"}
        if attribute.endswith("href"):
            assert value.startswith("#")
    assert not re.search(r"url\((?!#)", source)
    assert "@import" not in source
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", source)
    assert "https://" not in source
    assert len(page.ids) == len(set(page.ids))
    for used in re.findall(r'(?:url\(|href=")#([^)"]+)', source):
        assert used in page.ids


def test_names_are_escaped_wherever_they_stand():
    source = render(hostile())
    assert "<script" not in source.lower()
    assert HOSTILE in Page(source).text
    assert source.count("&lt;script&gt;") > 20


@pytest.mark.usefixtures("without_plots")
def test_the_page_says_what_was_chosen_how_much_faster_it_is_and_what_that_costs():
    text = Page(render(findings())).text
    assert "efficientnet_lite0 runs 4.31 times as fast as it was dropped in" in text
    assert "On the held-back half (250 examples) its top-1 agreement is 0.981" in text
    assert "the budget is top1_agreement >= 0.97" in text
    assert "2.90 ms was 12.5 ms" in text
    assert "5.10 MB was 18.6 MB" in text
    assert "501 from calibration.npz, 251 to calibrate and choose with, 250 held back" in text
    assert "Intel(R) Xeon(R) Platinum 8481C, 2 CPUs" in text
    assert "onnxruntime 1.32.0, openvino 2026.4.0" in text
    assert "27 November 2026, 09:14 UTC" in text


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize("count", [3, 60])
def test_every_candidate_is_in_the_table_with_its_fate_and_reason(count):
    found = findings(count)
    page = Page(render(found))
    for one in found.rows:
        assert one.reason in page.text
        for step in one.form.steps:
            assert str(step) in page.text
    for fate, number in reading.counts(found.rows).items():
        assert f"{number} {fate}" in page.text
    assert "12 of 61 layers kept in fp32" in page.text
    assert 'openvino_int8 {"keep":["conv1","conv2","fc"],"preset":"mixed"}' in page.text
    assert "top-1 agreement 0.985 0.981" in page.text
    assert "no floats" not in page.text  # nothing but floats differs
    assert page.seen.count("details") >= count


@pytest.mark.usefixtures("without_plots")
def test_the_page_of_a_search_that_found_nothing_says_so():
    text = Page(render(bare())).text
    assert "efficientnet_lite0 is served as it was dropped in" in text
    assert "None besides the reference was tried" in text
    assert "The search ended before everything had been tried" in text
    assert "Sensitivity" not in text
    assert "Time by operator" not in text
    assert "Graph" not in text


@pytest.mark.usefixtures("without_plots")
def test_layers_operators_and_graphs_are_told_with_the_worst_first():
    text = Page(render(findings())).text
    assert "/blocks/0/conv_dw Conv 0.210" in text
    assert "29 less sensitive layers" in text
    assert text.index("/blocks/0/conv_dw") < text.index("/blocks/1/conv_dw") < text.index("/blocks/44/conv_dw")
    assert "Before: 8.14 ms in 40 operators" in text
    assert "After: 713 \N{MICRO SIGN}s in 40 operators" in text
    assert "FakeQuantize \N{EN DASH} 97" in text


@pytest.mark.usefixtures("without_plots")
def test_the_page_without_matplotlib_says_what_is_missing_and_keeps_its_numbers():
    page = Page(render(findings()))
    assert "svg" not in page.seen
    assert "The plots are left out because matplotlib is not installed" in page.text
    assert "4.31" in page.text


def test_plots_are_the_same_every_time_and_take_their_colours_from_the_page():
    first, second = plots.pareto(findings(20)), plots.pareto(findings(20))
    assert first == second
    assert "var(--chosen)" in first.svg
    assert "#0102" not in first.svg
    assert "DejaVu" not in first.svg
    assert "<metadata" not in first.svg


def test_the_pareto_plot_labels_the_chosen_the_frontier_and_what_was_refused_though_faster():
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", plots.pareto(findings()).svg)
    assert {"#1", "#2", "#3"} <= set(texts)
    assert {"chosen", "kept", "refused", "reference", "frontier", "budget"} <= set(texts)
    assert [word for text in texts if "accurate" in text for word in text.split()] == [
        "top-1",
        "agreement",
        "(more",
        "accurate",
        "to",
        "the",
        "right)",
    ]
    assert plots.pareto(findings()).left_out == 3
    assert plots.pareto(bare()) is None
    assert plots.curves(bare()) is None


def test_plots_survive_names_that_are_no_text_and_numbers_that_are_none():
    latency, throughput = plots.curves(hostile())
    assert "nan" not in latency.svg.lower().replace("dominant", "")
    assert "inf" not in throughput.svg.lower()


@pytest.mark.usefixtures("without_plots")
def test_the_report_is_read_back_as_it_was(tmp_path):
    for name, make in EVERYTHING.items():
        if name == "hostile":
            continue
        found = make()
        files = write_report(found, tmp_path / name)
        assert read_report(files.json) == found
        assert msgspec.json.decode(files.json.read_bytes())["format"] == 1


@pytest.mark.usefixtures("without_plots")
def test_numbers_that_json_has_none_for_are_read_back_too(tmp_path):
    found = read_report(write_report(hostile(), tmp_path).json)
    assert repr(found) == repr(hostile())  # NaN is not equal to itself
    assert math.isnan(found.rows[0].speedup)
    assert found.rows[0].load_s == math.inf


@pytest.mark.usefixtures("without_plots")
def test_the_files_of_a_report(tmp_path):
    files = write_report(findings(), tmp_path / "new" / "folder")
    assert [path.name for path in files.paths][:3] == ["report.html", "report.json", "trace.json"]
    assert set(files.paths) == set((tmp_path / "new" / "folder").iterdir())
    events = json.loads(files.trace.read_bytes())["traceEvents"]
    assert {one["ph"] for one in events} == {"M", "X"}
    for one in events:
        assert isinstance(one["pid"], int)
        assert isinstance(one["tid"], int)
        if one["ph"] == "X":
            assert one["ts"] >= 0
            assert one["dur"] >= 0
    assert write_report(bare(), tmp_path / "bare").trace is None


@pytest.mark.usefixtures("without_plots")
def test_a_report_takes_the_place_of_an_older_one(tmp_path):
    write_report(findings(), tmp_path)
    files = write_report(findings(3, model="another"), tmp_path)
    assert read_report(files.json).model == "another"
    assert "another" in files.page.read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".new")]


def test_without_jinja2_there_is_no_page(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "headrace_backends.optimize.report_page")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    files = write_report(findings(), tmp_path)
    assert files.page is None
    assert files.json.exists()


@pytest.mark.usefixtures("without_plots")
def test_without_tensorboard_there_are_no_scalars(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "headrace_backends.optimize.scalars", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    files = write_report(findings(), tmp_path)
    assert files.scalars is None
    assert files.scalars not in files.paths


@pytest.mark.usefixtures("without_plots")
def test_scalars_are_what_the_report_says(tmp_path):
    pytest.importorskip("tensorboard", reason="an extra")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = write_report(findings(), tmp_path)
    told = {
        (value.tag, event.step): value.tensor.float_val[0]
        for event in EventFileLoader(str(files.scalars)).Load()
        for value in event.summary.value
    }
    assert told["candidate/speedup", 1] == pytest.approx(4.31)
    assert told["candidate/top-1 agreement", 3] == pytest.approx(0.78)
    assert told["throughput/reference rows_per_s", 16] == pytest.approx(182.9, abs=0.1)
    assert told["latency/1 openvino p50_ms", 1] == pytest.approx(2.9, abs=0.01)
    assert told["sensitivity/by_layer", 0] == pytest.approx(0.21)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html",
        "report.json",
        "scalars.tfevents",
        "trace.json",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "cannot be read"), (b"[]", "is of format list"), (b'{"format": 9}', "is of format 9"),
     (b'{"format": 1}', "cannot be read")],
)  # fmt: skip
def test_what_is_no_report_is_refused_with_the_reason(tmp_path, content, message):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(BadReport, match=message):
        read_report(tmp_path / "report.json")


def test_a_report_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BadReport, match=r"'.*none.json' cannot be read"):
        read_report(tmp_path / "none.json")


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_summary_has_between_five_and_fifteen_lines(name):
    lines = summary.lines(EVERYTHING[name]())
    assert 5 <= len(lines) <= 15
    assert all("\n" not in line for line in lines)


def test_the_summary_tells_before_and_after_and_the_refusals_that_would_be_faster():
    text = "\n".join(summary.lines(findings()))
    assert "runs 4.31 times as fast as it was dropped in" in text
    assert "12.5 ms before, 2.90 ms now" in text
    assert "183 rows/s at 16 rows before, 788 rows/s at 16 rows now" in text
    assert "18.6 MB before, 5.10 MB now" in text
    assert "6 in 10 min 13 s: 1 chosen" in text
    assert "refused at 5.20 x: onnxruntime + int8_static" in text


def test_a_summary_of_many_refusals_names_three():
    rows = [row(Form("torch", (), {"n": n}), Fate.REFUSED, 5.0 + n, 0.5, "no") for n in range(9)]
    text = summary.lines(findings(rows=(*many_rows(2), *rows)))
    assert sum("refused at" in line for line in text) == 3
    assert any("and 6 more refused ones" in line for line in text)


@pytest.mark.usefixtures("without_plots")
def test_the_reference_in_another_layout_is_a_candidate_and_the_reference_itself_is_not():
    other = Form("onnxruntime", threads=1)
    found = findings(rows=(row(REFERENCE, Fate.KEPT, 1.0, 1.0), row(other, Fate.CHOSEN, 1.2, 1.0)), chosen=other)
    assert [one.row.form for one in reading.candidates(found)] == [REFERENCE, other]
    assert reading.chosen(found).number == 1
    assert "Served as onnxruntime , 1 x 1 thread" in Page(render(found)).text


def test_a_chosen_form_without_a_row_of_its_own_is_the_row_that_was_chosen():
    found = findings(chosen=Form("openvino", INT8.steps, threads=1))
    assert reading.chosen(found).row.form == INT8
    assert reading.chosen(findings(0)).is_reference  # not told of at all


def test_what_decides_is_the_held_back_half_and_else_the_other():
    one = Row(INT8, Fate.KEPT, errors=errors(0.9), held_back=errors(0.8))
    assert reading.decided_by(one, BUDGET) == 0.8
    assert reading.decided_by(msgspec.structs.replace(one, held_back=None), BUDGET) == 0.9
    assert reading.decided_by(one, None) == one.held_back.max_rel
    assert reading.decided_by(Row(INT8, Fate.FAILED), BUDGET) is None
    own = msgspec.structs.replace(errors(0.9), own=0.42)
    assert reading.deciding(own, Budget("judge.py:f", min=0.1)) == 0.42


def test_the_frontier_has_what_no_other_beats():
    points = [(0.9, 5.0), (0.95, 4.0), (0.95, 3.0), (0.97, 4.5), (1.0, 1.0), (0.99, 0.5), (1.0, 1.0)]
    assert reading.frontier(points) == [(0.9, 5.0), (0.97, 4.5), (1.0, 1.0)]
    assert reading.frontier([]) == []


@pytest.mark.usefixtures("without_plots")
def test_a_layer_that_ruins_the_answers_altogether_comes_first():
    layers = (LayerSensitivity("nan", "Conv", math.nan), LayerSensitivity("small", "Conv", 0.1))
    text = Page(render(findings(sensitivities=layers))).text
    assert text.index("nan Conv") < text.index("small Conv")


@pytest.mark.parametrize(
    ("value", "told"),
    [(None, figures.NOTHING), (0.0, "0"), (0.9996, "1.00"), (999.6, "1,000"), (12345.6, "12,300"), (1e-5, "1.00e-05"),
     (0.00123, "0.00123"), (-3.14159, "-3.14"), (99.95, "100"), (math.nan, "nan"), (-math.inf, "-inf")],
)  # fmt: skip
def test_numbers_have_three_digits(value, told):
    assert figures.number(value) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.9998, "0.9998"),
        (1.0, "1"),
        (0.97, "0.97"),
        (1e-6, "1e-06"),
        (0.781234, "0.7812"),
        (1200.0, "1,200"),
        (0.0, "0"),
    ],
)
def test_errors_have_four_digits_and_no_zeros_for_nothing(value, told):
    assert figures.error(value) == told


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 B"), (999, "999 B"), (999_600, "1.00 MB"), (18_600_000, "18.6 MB"), (5 * 10**15, "5,000 TB")],
)
def test_sizes(count, told):
    assert figures.size(count) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.0, "0 s"), (0.03, "0.030 s"), (59.6, "1 min"), (613.4, "10 min 13 s"), (3600, "1 h"), (9999, "2 h 46 min"),
     (math.inf, figures.NOTHING)],
)  # fmt: skip
def test_durations(seconds, told):
    assert figures.duration(seconds) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [(None, "-"), (12.5, "12.5 ms"), (0.1, "0.100 ms"), (0.0158, "15.8 us"), (0.0, "0 ms"), (math.nan, "nan ms")],
)
def test_latencies(value, told):
    assert figures.milliseconds(value) == told


def test_what_is_told_on_terminals_is_ascii():
    assert all(line.isascii() for line in summary.lines(findings(60)))
