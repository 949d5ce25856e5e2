"""The report of a run: self-contained, bounded, safe to open, and true to what was recorded."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser

import pytest

from research.journal import Journal, Outcome, Registration
from training.runtime.report_html import write_report

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks nesting while collecting tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def write_run(directory, *, rows: int, log_interval: int = 10, steps: int | None = None) -> None:
    noise = random.Random(1)
    total = rows * log_interval if steps is None else steps
    lines = [
        {
            "step": 0,
            "time_utc": "2026-11-21T04:00:00.000+00:00",
            "tokens_total": 0,
            "parameters_total": 3_441_000,
            "parameters_active": 2_810_000,
            "torch_initial_seed": 1337,
            "version_torch": "2.13.0+cpu",
            "reference_bpb_xz_-9e": 2.17,
        }
    ]
    for number in range(1, rows + 1):
        evaluated = number % max(1, rows // 10) == 0
        lines.append(
            {
                "step": number * log_interval,
                "time_utc": "2026-11-21T04:15:00.000+00:00",
                "wall_s": number * 4.0,
                "tokens_total": number * 20480,
                "train_loss": 3 + 5 / number + noise.gauss(0, 0.1),
                "loss_ema": 3 + 5 / number,
                "eval_loss": 3.1 if evaluated else None,
                "eval_bpb": 1.5 + 1 / number if evaluated else None,
                "lr": 0.003,
                "grad_norm": noise.random(),
                "effective_tokens_per_s": 3000 + noise.gauss(0, 99),
                "tokens_per_s_ema": 3000.0,
                "core_tokens_per_s": 3100.0,
                "phase_data_s": 0.01,
                "phase_forward_s": 0.2,
                "phase_backward_s": 0.4,
                "phase_opt_step_s": 0.1,
                "phase_zero_grad_s": 0.0,
                "phase_train_other_s": 0.0,
                "phase_metrics_s": 0.002,
                "ram_process_gb": 1.0 + number / (10 * rows),
                "gpu_mem_alloc_gb": 0.0,
                "feature_ema_enabled": 1,
                "feature_ema_effective_calls": number,
                "feature_ema_ms": 1.25,
                "feature_diff_mla_enabled": 1,
                "feature_diff_mla_effective_calls": 0,
                "feature_curriculum_enabled": 0,
                "feature_curriculum_effective_calls": 0,
            }
        )
    content = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(content, encoding="utf-8")
    samples = [
        {"step": 10 * number, "text": f"sample number {number}.\nIt goes on" + " and on" * 300}
        for number in range(40)
    ]
    content = "".join(json.dumps(sample) + "\n" for sample in samples)
    (directory / "samples.jsonl").write_text(content, encoding="utf-8")
    settings = {"run": {"steps": total, "seed": 1337}, "data": {"hf_token": "hf_secret"}}
    (directory / "config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture
def run_dir(tmp_path):
    directory = tmp_path / "quick & <start>"
    directory.mkdir()
    write_run(directory, rows=60)
    return directory


def read_page(directory) -> tuple[str, Page]:
    path = write_report(directory)
    assert path == directory / "report.html"
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_page_tells_the_runs_facts(run_dir):
    _, page = read_page(run_dir)
    for part in (
        "quick & <start>",
        "finished 600 steps",
        "last entry 2026-11-21 04:15 UTC",
        "1.5167",  # the last bits per byte
        "3.44M",
        "2.81M active per token",
        "1.23M",
        "4 min 0 s",
        "torch 2.13.0+cpu",
        "xz -9e 2.170",
        "How to read this page",
    ):
        assert part in page.words, part


def test_every_family_has_its_chart_with_its_curves(run_dir):
    _, page = read_page(run_dir)
    titles = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert titles == [
        "Loss",
        "Quality",
        "Speed",
        "Where a step's time goes",
        "Memory",
        "Gradient norm",
        "Learning rate",
    ]
    curves = [a["class"] for tag, a in page.tags if tag == "path" and "line" in a.get("class", "")]
    assert len(curves) == 3 + 1 + 3 + 1 + 1 + 1  # an unused GPU has no curve
    areas = [a for tag, a in page.tags if tag == "path" and "area" in a.get("class", "")]
    assert len(areas) == 5


def test_ledger_names_what_is_on_and_never_acted(run_dir):
    html, _ = read_page(run_dir)
    rows = re.findall(r"<tr><td>(\w+)</td><td>(yes|no)</td>(.*?)</tr>", html, re.DOTALL)
    found = {name: (switch, "no effect yet" in rest) for name, switch, rest in rows}
    assert found == {
        "ema": ("yes", False),
        "diff_mla": ("yes", True),
        "curriculum": ("no", False),
    }


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(run_dir):
    html, page = read_page(run_dir)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    assert "url(" not in html and "@import" not in html and "http" not in html
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all("src" not in attrs and "href" not in attrs for _, attrs in page.tags)


def test_hostile_text_stays_text(run_dir):
    texts = ["<script>alert(1)</script>", "</blockquote><b>", "\x1b[31m\u202egnp", '" onload="x']
    with (run_dir / "samples.jsonl").open("w", encoding="utf-8") as file:
        for step, text in enumerate(texts):
            file.write(json.dumps({"step": step, "text": text}) + "\n")
    html, page = read_page(run_dir)
    assert "<script" not in html and "<script>alert(1)</script>" in page.words
    assert "\x1b" not in html and "\u202e" not in html


def test_samples_are_spread_and_shortened(run_dir):
    _, page = read_page(run_dir)
    numbers = [int(number) for number in re.findall(r"sample number (\d+)\.", page.words)]
    assert numbers[0] == 39 and numbers[-1] == 0 and len(numbers) == 10
    assert numbers == sorted(numbers, reverse=True)
    assert page.words.count(" and on") < 10 * 110


def test_secrets_are_not_shown(run_dir):
    html, page = read_page(run_dir)
    assert "hf_secret" not in html
    assert '"hf_token": "(not shown)"' in page.words and '"seed": 1337' in page.words


def test_size_is_bounded_and_extremes_survive_twenty_thousand_rows(tmp_path):
    write_run(tmp_path, rows=20_000)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    spike = json.loads(lines[7_777])
    lines[7_777] = json.dumps(spike | {"grad_norm": 12_345.0})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    html, page = read_page(tmp_path)
    assert len(html.encode()) < 300_000
    norm = next(
        attrs["d"]
        for tag, attrs in page.tags
        if tag == "path" and "c5" in attrs.get("class", "").split() and "line" in attrs["class"]
    )
    points = [(int(x), int(y)) for x, y in re.findall(r"(\d+) (\d+)", norm)]
    highest = min(points, key=lambda point: point[1])
    assert highest[0] == pytest.approx(1200 * 77_770 / 200_000, abs=2)


def test_an_unfinished_run_says_where_it_is(tmp_path):
    write_run(tmp_path, rows=5, steps=1000)
    _, page = read_page(tmp_path)
    assert "at step 50 of 1,000" in page.words


@pytest.mark.parametrize("content", ["", '{"step": 0}\n', '{"step": 1, "train_loss": null}\n'])
def test_a_run_that_has_only_begun_has_a_report(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content, encoding="utf-8")
    _, page = read_page(tmp_path)
    assert "No training step has been recorded yet" in page.words


def test_a_failed_write_leaves_the_older_report(run_dir, monkeypatch):
    before = write_report(run_dir).read_bytes()
    write_run(run_dir, rows=80)

    def fail(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", fail)
    with pytest.raises(OSError, match="No space"):
        write_report(run_dir)
    monkeypatch.undo()
    assert (run_dir / "report.html").read_bytes() == before
    assert write_report(run_dir).read_bytes() != before


def test_the_same_records_give_the_same_bytes(run_dir):
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()


def test_a_directory_without_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--output-dir"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_research_journal_is_told_with_what_was_written_before(tmp_path):
    write_run(tmp_path, rows=3)
    journal = Journal(tmp_path / "research")
    entry = Registration(
        step=10, title="t", hypothesis="A <b>faster</b> rate helps.", metric="Paired difference.",
        threshold="E >= 33.", design="Two arms.",
    )  # fmt: skip
    cycle = journal.register(entry)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "A &lt;b&gt;faster&lt;/b&gt; rate helps." in page and "<b>open</b>" in page
    outcome = Outcome(step=20, result="E = 40.", interval=(0.1, 0.2), decision="promoted: all")
    journal.complete(cycle, outcome)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "promoted: all, at step 20" in page and "E &gt;= 33." in page and "0.1 to 0.2" in page
