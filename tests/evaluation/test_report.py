"""The page: parses, loads nothing, escapes everything, and shows the figures it was given."""

import dataclasses
import html.parser
import math
import re

import numpy as np
import pytest
import scipy.stats
from report_example import TEACHERS, example_report

from distill_jax.artifacts import InputError
from distill_jax.evaluation import Answer, NextToken, Prompt, Row, write_report
from distill_jax.evaluation.report import estimate, paired_difference, render, tables

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and gathers what a browser would load and the figures of tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.ids, self.tags = [], [], [], []
        self.section, self.rows, self.cells = None, {}, []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.loads += [
            value for name, value in found.items() if name.split(":")[-1] in ("src", "href", "data")
        ]
        self.loads += re.findall(r"url\(([^)]*)\)", found.get("style", ""))
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "section":
            self.section = found["id"]
        if tag == "tr":
            self.cells = []
            self.rows.setdefault(self.section, []).append(self.cells)
        if tag == "td" and "data-mean" in found:
            self.cells.append(float(found["data-mean"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        # `</p>`, `</li>` and `</td>` are all written out, so tags must match exactly.
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report():
    return example_report()


@pytest.fixture(scope="module")
def text(report):
    return render(report)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_is_one_valid_file_that_loads_nothing(text, page):
    assert text.startswith("<!DOCTYPE html>")
    assert {"svg", "table", "section"} <= set(page.tags)
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert page.loads
    assert all(load.startswith(("#", "data:")) for load in page.loads)
    assert not re.search(r"@import|url\((?!#)", text)
    names = re.findall(r"https?://[^\s\"'<>]+", text)
    assert {name.split("/")[2] for name in names} <= {"www.w3.org"}  # namespaces, never fetched
    assert len(set(page.ids)) == len(page.ids)
    references = {load[1:] for load in page.loads if load.startswith("#")}
    references |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert references <= set(page.ids)


def test_labels_of_logarithms_are_no_tex(tmp_path, report):
    assert report.cut is not None
    towering = np.geomspace(1e4, 1, len(report.cut.channels))
    cut = dataclasses.replace(report.cut, channels=towering.tolist())
    write_report(tmp_path, dataclasses.replace(report, cut=cut))
    assert "mathdefault" not in (tmp_path / "index.html").read_text()


def test_takes_its_colours_from_the_page(text):
    assert "prefers-color-scheme: dark" in text
    assert "#0102" not in text
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(re.findall(r"(--[\w-]+):", text))


def test_same_report_same_bytes(tmp_path, report, text):
    path = write_report(tmp_path / "report", report)
    assert path.read_text() == text
    assert [file.name for file in (tmp_path / "report").iterdir()] == ["index.html"]


def test_every_table_figure_equals_its_input(report, page):
    shown = [cells for cells in page.rows["models"] if cells]
    expected = []
    for split in report.splits:
        for row in report.rows:

            def mean(read, row=row):
                return np.mean([read(run) for run in row.runs])

            names = ("cross_entropy", "perplexity", "top1_accuracy", "calibration_error")
            cells = [mean(lambda run, n=n, s=split: run[s][n]) for n in names]
            if split == "held_out" and "task_accuracy" in row.runs[0]:
                cells.append(mean(lambda run: run["task_accuracy"]))
            for teacher in TEACHERS:
                for name in ("kl", "agreement"):
                    cells.append(mean(lambda run, n=name, t=teacher, s=split: run[s][n][t]))
            expected.append(cells)
    figures = ["parameters", "non_embedding_parameters", "flops_per_token"]
    figures += ["prefill_tokens_per_s", "generation_tokens_per_s"]
    for row in (report.rows[0], report.rows[2]):  # one line for each shape
        expected.append([row.runs[0][name] for name in figures])
    assert len(shown) == len(expected)
    for found, wanted in zip(shown, expected):
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_panels_of_post_training_show_what_was_logged(report, text):
    (section,) = re.findall(r'<section id="posttraining">.*?</section>', text, re.DOTALL)
    assert re.findall("<figcaption>(.*?)</figcaption>", section) == ["SFT: loss", "DPO: rewards"]
    said = ["training: loss", "training: chosen, rejected"]
    assert re.findall('aria-label="(.*?)"', section) == said
    # Both lines of rewards have the shape of their figures, on one scale.
    rewards = section[section.index("DPO: rewards") :]
    assert ">nats</text>" in rewards
    drawn = [
        -np.array([float(y) for _, y in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)])
        for path in re.findall(r'<path d="([^"]*)" clip-path', rewards)
    ]
    curve = report.posttraining[1].curve.runs[0]
    lines = [np.array(curve[f"{kind}_reward"]) for kind in ("chosen", "rejected")]
    pixels = [line for line in drawn if len(line) == 40]
    assert len(pixels) == 4  # as logged and smoothed, which of 40 steps is the same
    scale = np.ptp(np.concatenate(pixels)) / np.ptp(lines)
    for found, line in zip(pixels[::2], lines, strict=True):
        np.testing.assert_allclose(found - pixels[0][0], (line - lines[0][0]) * scale, atol=0.01)
    nothing = dataclasses.replace(report.posttraining[0], metrics=[("lost", "not logged")])
    bare = render(dataclasses.replace(report, posttraining=[nothing]))
    assert 'id="posttraining"' not in bare


def test_stores_are_shown_with_what_they_know_of_the_teacher(text):
    section = text[text.index('<section id="targets">') :]
    lines = re.findall(r"<tr>.*?</tr>", section[: section.index("</section>")], re.DOTALL)
    heads, *rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", line) for line in lines]
    assert rows[0][2:] == ["1,228,800", "121.0 MB", "32.0", "98.5", "998×", "2.512", "2.934"]
    assert rows[1][4:] == ["11.9", "38.4", "2,559×", "2.731", "–"]
    assert heads[4:] == ["Ids/token", "Bytes/token", "Smaller", "Entropy", "Cross-entropy"]


def test_verdict_is_paired_by_seed(report, page):
    shown = [cells[0] for cells in page.rows["verdict"] if cells]
    split = "held_out"
    read = [lambda run: run[split]["cross_entropy"]]
    read += [lambda run, t=t: run[split]["kl"][t] for t in TEACHERS]
    student = report.row("distilled").runs
    expected = [
        np.mean([one(ours) - one(theirs) for ours, theirs in zip(student, row.runs)])
        for row in report.rows
        if row.kind == "control"
        for one in read
    ]
    np.testing.assert_allclose(shown, expected, rtol=1e-9)


def test_standard_errors_against_scipy():
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(3.0, 0.1, 5), rng.normal(3.1, 0.1, 5)
    found = estimate(ours)
    np.testing.assert_allclose(found.mean, ours.mean(), rtol=1e-12)
    np.testing.assert_allclose(found.error, scipy.stats.sem(ours), rtol=1e-12)
    paired = paired_difference(ours, theirs)
    np.testing.assert_allclose(paired.error, scipy.stats.sem(ours - theirs), rtol=1e-12)
    assert estimate([2.0]).error is None


def with_losses(report, ours, theirs):
    """The report with one control, and these held-out cross-entropies."""

    def runs(losses):
        base = report.row("distilled").runs[0]
        return [{**base, "held_out": {**base["held_out"], "cross_entropy": x}} for x in losses]

    rows = [
        *report.rows[:3],
        Row(name="control", kind="control", runs=runs(theirs)),
        Row(name="distilled", kind="distilled", runs=runs(ours)),
    ]
    return dataclasses.replace(report, rows=rows, cut=None, curves=())


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome", "wins"),
    [
        ([3.0, 3.1, 3.2], [3.2, 3.29, 3.41], "beats", 3),
        ([3.2, 3.29, 3.41], [3.0, 3.1, 3.2], "loses to", 0),
        ([3.0, 3.1, 3.2], [3.1, 3.0, 3.25], "ties with", 2),
        ([3.0], [3.1], "beats", 1),
    ],
)
def test_verdict_says_what_happened(report, ours, theirs, outcome, wins):
    changed = with_losses(report, ours, theirs)
    verdict = tables.verdicts(changed)[0]
    assert (verdict.outcome, verdict.wins) == (outcome, wins)
    text = render(changed)
    assert f"Distilled {outcome} control" in text
    assert ("one seed, so without an error bar" in text) == (len(ours) == 1)


def test_best_student_is_marked_and_teachers_do_not_compete(report):
    table = tables.quality_table(report, "held_out")
    kinds = [row.kind for row, _ in table.rows]
    losses = [cells[0].estimate.mean for _, cells in table.rows]
    marked = [row.name for row, cells in table.rows if cells[0].best]
    students = [loss for kind, loss in zip(kinds, losses) if kind != "teacher"]
    assert min(losses) < min(students)
    assert marked == [table.rows[losses.index(min(students))][0].name]


def test_errors_have_the_decimals_of_their_means(report):
    row = next(
        cells
        for row, cells in tables.quality_table(report, "held_out").rows
        if row.name == "distilled"
    )
    losses = [run["held_out"]["cross_entropy"] for run in report.row("distilled").runs]
    assert row[0].text == f"{np.mean(losses):.3f}"
    assert row[0].error == f"{scipy.stats.sem(losses):.3f}"
    assert row[2].error == "<0.1"


HOSTILE = '</style><script>alert("1")</script><img src=x onerror=alert(2)>$\\frac{'


def test_hostile_text_is_escaped(report, page):
    prompt = Prompt(
        text=HOSTILE,
        answers=[
            Answer(model=HOSTILE, next_tokens=[NextToken(1, HOSTILE, 0.5)], completion=HOSTILE)
        ],
    )
    curves = [dataclasses.replace(report.curves[0], name=HOSTILE)]
    rows = [
        dataclasses.replace(row, note=HOSTILE, name=HOSTILE if row.name == "+ SFT" else row.name)
        for row in report.rows
    ]
    hostile = dataclasses.replace(
        report,
        title=HOSTILE,
        rows=rows,
        prompts=[prompt],
        curves=curves,
        curve_metrics=[("hard", HOSTILE)],
        targets=[dataclasses.replace(report.targets[0], teacher=HOSTILE, scheme=HOSTILE)],
        stages=[dataclasses.replace(report.stages[0], name=HOSTILE, summary=HOSTILE)],
        commands=[HOSTILE],
        versions={HOSTILE: HOSTILE},
        notes=[HOSTILE],
    )
    text = render(hostile)
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text
    assert set(Page(text).tags) <= set(page.tags)


def test_a_bare_report_leaves_sections_out(report):
    bare = dataclasses.replace(
        report,
        rows=[row for row in report.rows if row.kind in ("teacher", "pruned", "distilled")],
        cut=None,
        curves=(),
        posttraining=(),
        prompts=(),
        targets=(),
        stages=(),
        commands=(),
        versions={},
        notes=(),
    )
    bare_page = Page(render(bare))
    assert list(bare_page.rows) == ["models"]


def test_without_speeds_nothing_is_said_of_them(report):
    rows = [
        dataclasses.replace(
            row,
            runs=[{k: v for k, v in run.items() if not k.endswith("_per_s")} for run in row.runs],
        )
        for row in report.rows
    ]
    text = render(dataclasses.replace(report, rows=rows))
    assert "faster" not in text
    assert "tokens/s" not in text


def test_headline_figures(report, text):
    before, after = (report.row(name).runs[0] for name in ("SmolLM2-135M", "distilled"))
    smaller = before["parameters"] / after["parameters"]
    faster = after["generation_tokens_per_s"] / before["generation_tokens_per_s"]
    assert f"{smaller:.1f}× smaller and {faster:.1f}× faster" in text
    losses = [run["held_out"]["perplexity"] for run in report.row("distilled").runs]
    assert f"Its held-out perplexity is {np.mean(losses):.1f}, down from" in text


def test_bar_widths_share_one_scale(report, text):
    shares = [float(x) for x in re.findall(r'data-probability="([^"]+)"', text)]
    widths = [float(x) for x in re.findall(r'<b style="width: ([^%]+)%', text)]
    expected = [
        100 * token.probability / max(t.probability for a in p.answers for t in a.next_tokens)
        for p in report.prompts
        for a in p.answers
        for token in a.next_tokens
    ]
    np.testing.assert_allclose(widths, expected, atol=0.006)
    assert len(shares) == len(widths)


def test_inconsistent_reports_are_refused(report):
    with pytest.raises(InputError, match="student 'nobody' is not among the rows"):
        dataclasses.replace(report, student="nobody")
    with pytest.raises(InputError, match="name twice"):
        dataclasses.replace(report, rows=[*report.rows, report.rows[0]])
    control = dataclasses.replace(report.row("pruned + CE"), name="x", runs=report.rows[0].runs)
    with pytest.raises(InputError, match="'x' has 1 runs, the student has 3"):
        dataclasses.replace(report, rows=[*report.rows, control])
    with pytest.raises(InputError, match="'empty' has no runs"):
        Row(name="empty", kind="control", runs=[])
    with pytest.raises(InputError, match="kept_heads has 1 lists for 20"):
        dataclasses.replace(report.cut, kept_heads=[[0]])
    with pytest.raises(InputError, match="neurons has 1 layers"):
        dataclasses.replace(report.cut, neurons=[[0.0]])


@pytest.mark.parametrize(
    ("value", "text"), [(950, "950"), (46_925_184, "46.9M"), (1.236e9, "1.24B"), (2.87e8, "287M")]
)
def test_counts_for_people(value, text):
    assert tables.count_text(value) == text
    assert tables.duration_text(185) == "3 min 05 s"
    assert tables.size_text(48_200_000) == "48.2 MB"
    assert math.isclose(tables.bytes_per_token(example_report(1).targets[0]), 121e6 / 1_228_800)
