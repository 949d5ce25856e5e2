"""`<output_dir>/report.html`: what a run was, did and learned, in one file that needs nothing else.

Built from metrics.jsonl, samples.jsonl and config.json alone, so it can be rebuilt at any time,
also for a run that died (`--mode report`). Its size is bounded by downsampling that keeps extremes.
Fields named `reference_bpb_<name>` become lines to compare the quality with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from research.journal import describe_interval, read_trials
from training.report.chart import Chart, Curve, Reference, line_chart, stacked_chart
from training.report.page import STYLE, TEMPLATE
from training.report.record import RunRecord, Sample, read_run
from training.runtime.atomic_io import FileOps, replace_file
from training.runtime.text import (
    format_duration,
    format_number,
    format_quantity,
    printable,
)

REPORT_NAME = "report.html"
MAX_SAMPLES = 10
MAX_SAMPLE_CHARACTERS = 700
MAX_FEATURES = 40
MAX_TRIALS = 40
REFERENCE_PREFIX = "reference_bpb_"
SECRET = re.compile(r"(hf|api|access|auth)_?(token|key)$|secret|password", re.IGNORECASE)
PHASES = {
    "data": ("phase_data_s",),
    "forward": ("phase_forward_s",),
    "backward": ("phase_backward_s",),
    "optimizer": ("phase_opt_step_s", "phase_zero_grad_s"),
    "features": ("phase_train_other_s",),
    "reinforcement learning": ("phase_ttrl_s",),
    "records": ("phase_metrics_s",),
}


@dataclass(slots=True, kw_only=True, frozen=True)
class Line:
    """A column as a curve; marked: evaluations; optional: left out while it is 0 throughout."""

    label: str
    column: str
    style: str
    marked: bool = False
    optional: bool = False


@dataclass(slots=True, kw_only=True, frozen=True)
class LinePlan:
    """What a line chart shows of a run."""

    title: str
    unit: str
    caption: str
    lines: tuple[Line, ...]
    with_references: bool = False
    logarithmic: bool = False
    from_zero: bool = False


LINE_PLANS = (
    LinePlan(
        title="Loss",
        unit="nats per token",
        caption="Training loss of single steps, its moving average, and the loss on text that is "
        "never trained on.",
        lines=(
            Line(label="step", column="train_loss", style="raw"),
            Line(label="average", column="loss_ema", style="c1"),
            Line(label="held-out", column="eval_loss", style="c2", marked=True),
        ),
    ),
    LinePlan(
        title="Quality",
        unit="bits per byte, lower is better",
        caption="On held-out text, comparable across models and tokenizers.",
        lines=(Line(label="held-out", column="eval_bpb", style="c2", marked=True),),
        with_references=True,
    ),
    LinePlan(
        title="Speed",
        unit="tokens per second",
        caption="Whole steps with everything around them, their moving average, and the training "
        "computation alone.",
        lines=(
            Line(label="step", column="effective_tokens_per_s", style="raw"),
            Line(label="training alone", column="core_tokens_per_s", style="c3"),
            Line(label="average", column="tokens_per_s_ema", style="c1"),
        ),
        from_zero=True,
    ),
    LinePlan(
        title="Memory",
        unit="GiB",
        caption="Main memory of the process, and device memory where a GPU is used.",
        lines=(
            Line(label="process", column="ram_process_gb", style="c1"),
            Line(label="GPU in use", column="gpu_mem_alloc_gb", style="c2", optional=True),
            Line(label="GPU reserved", column="gpu_mem_reserved_gb", style="c3", optional=True),
            Line(label="GPU peak", column="gpu_mem_peak_gb", style="c4", optional=True),
        ),
        from_zero=True,
    ),
    LinePlan(
        title="Gradient norm",
        unit="before clipping",
        caption="How hard the loss pulls on the weights.",
        lines=(Line(label="norm", column="grad_norm", style="c5"),),
        logarithmic=True,
    ),
    LinePlan(
        title="Learning rate",
        unit="of the main optimizer",
        caption="Warm-up, plateau, and the fall at the end in which much of the quality comes.",
        lines=(Line(label="rate", column="lr", style="c4"),),
        from_zero=True,
    ),
)
PHASE_CHART_PLACE = 3
COLUMNS = (
    *(line.column for plan in LINE_PLANS for line in plan.lines),
    *(name for names in PHASES.values() for name in names),
)


@dataclass(slots=True, kw_only=True)
class Fact:
    """A named value; note: what it is or is made of."""

    name: str
    value: str
    note: str = ""


@dataclass(slots=True, kw_only=True)
class FeatureLine:
    """One feature's evidence; idle: switched on and never had an effect."""

    name: str
    enabled: bool
    idle: bool
    calls: str
    ms: str


def write_report(output_dir: Path) -> Path:
    """Build the report of the run in `output_dir`, replacing an older one in one move.

    ValueError when there is no metrics.jsonl; OSError when the file cannot be written (an older
    report then stays as it was).
    """
    record = read_run(output_dir, columns=COLUMNS)
    path = output_dir / REPORT_NAME
    journal = read_trials(output_dir / "research")
    content = render(record, name=output_dir.resolve().name, journal=journal).encode()
    replace_file(FileOps(), path, content, durable=False)
    return path


def render(record: RunRecord, *, name: str, journal: Sequence[dict[str, Any]] = ()) -> str:
    """The report's HTML; journal: trials as `research.journal.read_trials` gives them."""
    state, note = _state(record)
    # Every value is text from files and is escaped; only the style sheet and the charts are markup.
    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(
        title=printable(name) or "SIGMA run",
        style=Markup(STYLE),
        state=state,
        state_note=note,
        tiles=_tiles(record),
        charts=_charts(record),
        samples=_samples(record.samples),
        features=_features(record.known),
        trials=_trials(journal),
        facts=_facts(record),
        settings=_settings(record.config),
    )


def _state(record: RunRecord) -> tuple[str, str]:
    step = int(record.known.get("step", 0))
    total = record.config.get("run", {}).get("steps")
    since = str(record.known.get("time_utc", ""))[:16].replace("T", " ")
    note = f", last entry {since} UTC" if since else ""
    if isinstance(total, int) and step >= total:
        return f"finished {total:,} steps", note
    return f"at step {step:,}" + (f" of {total:,}" if isinstance(total, int) else ""), note


def _tiles(record: RunRecord) -> list[Fact]:
    known, tiles = record.known, []
    steps, bpb = record.points("eval_bpb")
    if len(bpb):
        best = int(bpb.argmin())
        note = "bits per byte, held-out"
        if best != len(bpb) - 1:
            note = f"best {format_number(bpb[best])} at step {steps[best]:,.0f}"
        tiles.append(Fact(name="Quality", value=f"{bpb[-1]:.4f}", note=note))
    if "loss_ema" in known:
        loss = Fact(name="Loss", value=f"{known['loss_ema']:.4f}", note="average, nats per token")
        tiles.append(loss)
    if "parameters_total" in known:
        active = known.get("parameters_active")
        note = f"{format_quantity(active)} active per token" if active else ""
        value = format_quantity(known["parameters_total"])
        tiles.append(Fact(name="Parameters", value=value, note=note))
    if "tokens_total" in known:
        value = format_quantity(known["tokens_total"])
        tiles.append(Fact(name="Tokens read", value=value, note="of training text"))
    if "wall_s" in known:
        tiles.append(Fact(name="Time", value=format_duration(known["wall_s"]), note="wall clock"))
    _, speed = record.points("effective_tokens_per_s")
    if len(speed):
        value = format_quantity(float(np.median(speed)))
        tiles.append(Fact(name="Speed", value=value, note="tokens/s, median"))
    return tiles


def _charts(record: RunRecord) -> list[Chart]:
    if len(record.steps) == 0:
        return []
    span = (float(record.steps[0]), float(record.steps[-1]))
    charts = [_line_chart(record, plan, span=span) for plan in LINE_PLANS]
    charts.insert(PHASE_CHART_PLACE, _phase_chart(record, span=span))
    return [chart for chart in charts if chart is not None]


def _line_chart(record: RunRecord, plan: LinePlan, *, span: tuple[float, float]) -> Chart | None:
    curves = []
    for line in plan.lines:
        steps, values = record.points(line.column)
        if line.optional and not values.any():
            continue
        curves.append(
            Curve(
                label=line.label,
                steps=steps,
                values=values,
                style=line.style,
                marked=line.marked,
            )
        )
    references = _references(record) if plan.with_references else []
    more = " Dashed lines: what other methods reach on the same text." if references else ""
    return line_chart(
        title=plan.title,
        unit=plan.unit,
        caption=plan.caption + more,
        curves=curves,
        span=span,
        references=references,
        logarithmic=plan.logarithmic,
        from_zero=plan.from_zero,
    )


def _phase_chart(record: RunRecord, *, span: tuple[float, float]) -> Chart | None:
    present = np.isfinite(record.columns["phase_forward_s"])
    if not present.any():
        return None
    layers = []
    for label, names in PHASES.items():
        parts = np.stack([np.nan_to_num(record.columns[name][present]) for name in names])
        layers.append((label, 1000.0 * parts.sum(axis=0)))
    return stacked_chart(
        title="Where a step's time goes",
        unit="milliseconds, median in the legend",
        caption="Parts of logged steps, on top of each other; the upper edge is the whole step.",
        steps=record.steps[present],
        layers=layers,
        span=span,
    )


def _references(record: RunRecord) -> list[Reference]:
    return [
        Reference(label=name.removeprefix(REFERENCE_PREFIX).replace("_", " "), value=float(value))
        for name, value in record.known.items()
        if name.startswith(REFERENCE_PREFIX) and isinstance(value, int | float)
    ]


def _samples(samples: list[Sample]) -> list[dict[str, str]]:
    """Samples spread over the run, with the first and the last, newest first."""
    if len(samples) > MAX_SAMPLES:
        places = np.linspace(0, len(samples) - 1, MAX_SAMPLES).round().astype(int)
        samples = [samples[place] for place in places]
    chosen = []
    for sample in reversed(samples):
        text = printable(sample.text).strip()
        if len(text) > MAX_SAMPLE_CHARACTERS:
            text = text[:MAX_SAMPLE_CHARACTERS] + " ..."
        chosen.append({"step": f"{sample.step:,}", "text": text})
    return chosen


def _features(known: dict[str, Any]) -> list[FeatureLine]:
    lines = []
    for field, value in known.items():
        match = re.fullmatch(r"feature_(\w+)_enabled", field)
        if match is None:
            continue
        name, enabled = match[1], bool(value)
        calls = int(known.get(f"feature_{name}_effective_calls", 0))
        milliseconds = known.get(f"feature_{name}_ms")
        lines.append(
            FeatureLine(
                name=name,
                enabled=enabled,
                idle=enabled and calls == 0,
                calls=f"{calls:,}",
                ms="" if milliseconds is None else f"{milliseconds:,.0f}",
            )
        )
    return sorted(lines, key=lambda line: (not line.enabled, line.name))[:MAX_FEATURES]


def _trials(journal: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The newest trials of the research journal, newest first, as plain text."""
    lines = []
    for trial in list(reversed(journal))[:MAX_TRIALS]:
        outcome = trial["outcome"]
        told = {name: str(trial[name]) for name in ("cycle", "step", "hypothesis", "metric")}
        told |= {"threshold": str(trial.get("threshold", "")), "result": "", "decision": "open"}
        if outcome is not None:
            told["result"] = f"{outcome['result']} {describe_interval(outcome['interval'])}"
            told["decision"] = f"{outcome['decision']}, at step {outcome['step']}"
        lines.append({name: printable(text) for name, text in told.items()})
    return lines


def _facts(record: RunRecord) -> list[Fact]:
    known = record.known
    facts = [
        Fact(name=name.removeprefix("version_"), value=printable(str(value)))
        for name, value in known.items()
        if name.startswith("version_")
    ]
    if "torch_initial_seed" in known:
        facts.append(Fact(name="seed", value=str(known["torch_initial_seed"])))
    if "data_rejected" in known:
        facts += _data_facts(known)
    if known.get("checkpoint_resume_step"):
        value = f"from step {int(known['checkpoint_resume_step']):,}"
        facts.append(Fact(name="resumed", value=value))
    return facts


def _data_facts(known: dict[str, Any]) -> list[Fact]:
    """Where the tokens came from, and what was left out of them; of a stream of several sources."""
    prefix = "data_source_fraction_"
    shares = {n.removeprefix(prefix): v for n, v in known.items() if n.startswith(prefix)}
    spoken = ", ".join(f"{printable(name)} {share:.1%}" for name, share in shares.items() if share)
    left_out = ", ".join(
        f"{known.get(column, 0):,.0f} {what}"
        for column, what in (
            ("data_rejected", "in all"),
            ("data_dedup_dropped", "as duplicates"),
            ("data_contaminated", "that hold text of an evaluation"),
        )
    )
    return [Fact(name="text from", value=spoken), Fact(name="documents left out", value=left_out)]


def _settings(config: dict[str, Any]) -> str:
    return printable(json.dumps(_without_secrets(config), indent=2)) if config else ""


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: "(not shown)" if SECRET.search(str(name)) and item else _without_secrets(item)
            for name, item in value.items()
        }
    return [_without_secrets(item) for item in value] if isinstance(value, list) else value
