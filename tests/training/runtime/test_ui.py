"""What a person sees, read back from a recorded console; a closed terminal ends nothing."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from training.runtime.text import (
    format_duration,
    format_number,
    format_quantity,
    one_line,
    printable,
)
from training.runtime.ui import RunConsole, RunDisplay, StepRate

ROW = {
    "step": 20,
    "train_loss": 5.125,
    "loss_ema": 5.25,
    "eval_bpb": None,
    "lr": 0.003,
    "tokens_per_s_ema": 3080.4,
    "tokens_total": 40960,
    "wall_s": 125.0,
    "phase_data_s": 0.1,
    "phase_train_s": 0.9,
    "phase_forward_s": 0.3,
    "phase_backward_s": 0.4,
    "phase_opt_step_s": 0.15,
    "ram_process_gb": 1.25,
    "gpu_mem_peak_gb": 0.0,
    "checkpoint_step": 10,
}


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def make_display(*, terminal: bool, width: int = 100, file=None):
    clock, file = Clock(), file or io.StringIO()
    console = RunConsole(
        file=file,
        force_terminal=terminal,
        width=width,
        height=40,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
        _environ={"TERM": "xterm-256color"},
    )
    return RunDisplay(console=console, now=clock), clock, file


def screen_text(raw: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)


def test_pipe_gets_one_plain_line_per_row_message_and_sample():
    display, clock, file = make_display(terminal=False)
    display.start(step=0, total_steps=100)
    clock.seconds += 40.0
    display.update(ROW)
    display.message("checkpoint not written:\n disk full")
    display.sample("In the\nbeginning \x1b[31m")
    display.update({**ROW, "step": 40, "eval_bpb": 2.5})
    display.close()
    lines = file.getvalue().splitlines()
    assert lines == [
        "step 20/100  loss 5.1250  average 5.2500  lr 0.003  3,080 tok/s  1.2 GiB  left 2 min 40 s",
        "checkpoint not written: disk full",
        "sample: In the beginning \ufffd[31m",
        "step 40/100  loss 5.1250  average 5.2500  bpb 2.5000  lr 0.003  3,080 tok/s  1.2 GiB  "
        "left 1 min 0 s",
    ]


def test_long_lines_are_not_cut_or_wrapped_in_a_pipe():
    display, _, file = make_display(terminal=False, width=20)
    display.start(step=0, total_steps=1)
    display.message("word " * 50)
    assert file.getvalue() == "word " * 49 + "word\n"


def test_terminal_shows_the_newest_row_and_keeps_messages_and_evaluations():
    display, clock, file = make_display(terminal=True)
    display.start(step=0, total_steps=100)
    assert display.is_live
    clock.seconds += 40.0
    display.update({**ROW, "eval_bpb": 2.75})
    display.message("resumed from step 10")
    display.sample("And God said")
    display.update({**ROW, "step": 30})
    display.close()
    text = screen_text(file.getvalue())
    final = text[text.rindex("SIGMA") :]
    for part in (
        "step 30 of 100",
        "30.0%",
        "5.1250 nats per token, average 5.2500",
        "2.7500 bits per byte, held-out text, at step 20",
        "3,080 tokens/s, 40,960 tokens in 2 min 5 s",
        "data 10%  forward 30%  backward 40%  optimizer 15%  other 5%",
        "1.2 GiB",
        "checkpoint of step 10",
        "And God said",
        "Ctrl+C finishes the step, saves and stops",
    ):
        assert part in final, part
    assert "resumed from step 10" in text
    assert re.search(r"step 20/100  loss 5\.1250 .* bpb 2\.7500", text)
    assert not display.is_live


def test_narrow_terminal_is_never_overrun():
    display, _, file = make_display(terminal=True, width=40)
    display.start(step=0, total_steps=100)
    display.update(ROW)
    display.sample("unbroken" * 40)
    display.close()
    panel = [line for line in screen_text(file.getvalue()).splitlines() if "│" in line]
    assert panel and max(len(line) for line in panel) <= 40


def test_model_text_cannot_give_the_terminal_orders():
    display, _, file = make_display(terminal=True)
    display.start(step=0, total_steps=100)
    display.update(ROW)
    display.sample("a\x1b]0;owned\x07b [bold]c[/bold] :smile:")
    display.close()
    assert "\x1b]0;" not in file.getvalue() and "\x07" not in file.getvalue()
    assert "[bold]c[/bold] :smile:" in screen_text(file.getvalue())


def test_characters_outside_the_consoles_encoding_are_replaced_not_fatal():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="cp1252", errors="strict")
    display, _, _ = make_display(terminal=False, file=file)
    display.start(step=0, total_steps=1)
    display.sample("Zürich \u65e5\u672c")
    display.message("still there")
    file.flush()
    assert raw.getvalue().decode("cp1252").split(os.linesep) == [
        "sample: Zürich ??",
        "still there",
        "",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_closed_terminal_silences_the_display_and_no_more(terminal):
    class Gone(io.StringIO):
        broken = False

        def write(self, text):
            if self.broken:
                raise BrokenPipeError(32, "Broken pipe")
            return super().write(text)

    file = Gone()
    display, _, _ = make_display(terminal=terminal, file=file)
    display.start(step=0, total_steps=100)
    file.broken = True
    display.update({**ROW, "eval_bpb": 2.0})
    display.message("nobody reads this")
    display.sample("nor this")
    display.close()
    display.close()


def test_every_method_works_before_start_and_after_close():
    display, _, file = make_display(terminal=True)
    display.message("before")
    display.start(step=5, total_steps=10)
    display.close()
    display.update(ROW)
    display.message("after")
    assert "before" in file.getvalue() and "after" in file.getvalue()


def test_rows_with_nothing_but_a_step_are_shown():
    for terminal in (True, False):
        display, _, file = make_display(terminal=terminal)
        display.start(step=0, total_steps=0)
        display.update({"step": 0})
        display.close()
        assert "step 0" in screen_text(file.getvalue())


def test_time_left_is_the_mean_pace_without_a_suspended_hour():
    display, clock, _ = make_display(terminal=False)
    display.start(step=0, total_steps=1000)
    assert display.seconds_left() is None
    for step in range(10, 210, 10):
        clock.seconds += 3600.0 if step == 100 else 20.0
        display.update({"step": step})
    # 19 gaps of 20 s and one cut to 200 s, for 200 steps; 800 are left.
    assert display.seconds_left() == pytest.approx((19 * 20 + 200) / 200 * 800)
    clock.seconds += 30.0
    assert display.seconds_left() == pytest.approx((19 * 20 + 200) / 200 * 800 - 30)
    clock.seconds += 1e9
    assert display.seconds_left() == 0.0


def test_evaluations_that_recur_count_as_work():
    rate = StepRate()
    seconds = 0.0
    for step in range(0, 1000, 10):
        seconds += 35.0 if step % 50 == 0 else 10.0
        rate.add(step, seconds)
    assert rate.seconds_per_step == pytest.approx((4 * 10 + 35) / 50, rel=0.05)


def test_rate_starts_anew_after_a_step_back():
    rate = StepRate()
    rate.add(100, 0.0)
    rate.add(110, 1000.0)
    rate.add(90, 1001.0)
    assert rate.seconds_per_step is None
    rate.add(100, 1011.0)
    assert rate.seconds_per_step == pytest.approx(1.0)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_leaves_does_not_end_the_program():
    program = (
        "import sys\n"
        "from training.runtime.ui import RunDisplay\n"
        "display = RunDisplay()\n"
        "display.start(step=0, total_steps=9)\n"
        "for number in range(3000):\n"
        "    display.message(f'line {number} ' + 'x' * 200)\n"
        "display.close()\n"
        "print('survived', file=sys.stderr)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("line 0")
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert errors == "survived\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_live_panel_in_a_real_pseudo_terminal(monkeypatch):
    import pty
    import threading

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "90")
    reader, writer = pty.openpty()
    received = bytearray()

    def drain() -> None:
        try:
            while chunk := os.read(reader, 4096):
                received.extend(chunk)
        except OSError:
            pass  # Linux reports EIO when the other end is closed

    thread = threading.Thread(target=drain)
    thread.start()
    with os.fdopen(writer, "w", encoding="utf-8") as file:
        display = RunDisplay(console=RunConsole(file=file, highlight=False, markup=False))
        display.start(step=0, total_steps=100)
        assert display.is_live
        display.update(ROW)
        display.close()
    thread.join(timeout=10)
    os.close(reader)
    raw = received.decode("utf-8")
    assert "step 20 of 100" in screen_text(raw)
    # The cursor is visible in the end, also if the process dies before close.
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599.7, "1 h 0 min"),
        (90061, "1 d 1 h"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1.00k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (999_400, "999k"),
        (3_441_000, "3.44M"),
        (1.2e9, "1.20B"),
    ],
)
def test_quantities(value, text):
    assert format_quantity(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.23456, "1.235"),
        (12.3456, "12.35"),
        (123.456, "123.5"),
        (12345.6, "12,346"),
        (0.003, "0.003"),
        (0.00015, "1.50e-4"),
        (2.5e7, "2.50e7"),
    ],
)
def test_numbers(value, text):
    assert format_number(value) == text


def test_printable_keeps_text_and_shows_controls():
    assert printable("tab\tline\r\nwörld 日本") == "tab\tline\nwörld 日本"
    assert printable("\x00\x1b[2J\u202e\x9b\ud800") == "\ufffd\ufffd[2J\ufffd\ufffd\ufffd"
    assert one_line(" a\n\n b\tc ") == "a b c"
