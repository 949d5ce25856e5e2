"""Only the completion's first line answers, and only in one form."""

import inspect
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.rl import answers
from training.rl.answers import candidate_program, canonical_integer, extract_answer
from training.rl.tasks import draw_task

ADD = draw_task("add", level=2, rng=random.Random(0))
SYMBOLIC = draw_task("symbolic", level=2, rng=random.Random(0))
EXPRESSION = draw_task("expression", level=4, rng=random.Random(0))
FUNCTION = draw_task("function", level=3, rng=random.Random(0))


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("22", "22"),
        (" 22 \n17+5=23", "22"),
        ("Answer: 22\n", "22"),
        ("Answer:-22", "-22"),
        ("+22\r\n", "22"),
        ("007", "7"),
        ("-0", "0"),
        ("", None),
        ("\n22", None),  # the first line is empty
        ("22 23", None),
        ("22, 23", None),
        ("17+5=22", None),
        ("the answer is 22", None),
        ("22.", None),
        ("22.0", None),
        ("2e1", None),
        ("0x16", None),
        ("2_2", None),
        ("- 22", None),
        ("--22", None),
        ("Answer: Answer: 22", None),
        ("answer: 22", None),
        ("22\r23", None),
        ("22\x0b", None),
        ("22\x00", None),
        ("\u00a022", None),
        ("22\u2028", None),
        ("\u0662\u0662", None),  # Arabic-Indic digits, which int() reads
        ("\uff12\uff12", None),  # full width
        ("\u00b2", None),
        ("9" * 65, None),
        ("9" * 10**6, None),
        ("9" * 64, "9" * 64),
    ],
)
def test_an_integer_is_read_in_one_form_only(completion, answer):
    assert extract_answer(completion, ADD) == answer


@given(st.text(alphabet="0123456789+- \n\r\t\u0662\u00b2Ansewr:.", max_size=12))
def test_whatever_is_read_is_an_integer_of_ascii_digits(text):
    found = extract_answer(text, ADD)
    assert found is None or (found.isascii() and found == str(int(found)))


@given(st.integers(-(10**60), 10**60))
def test_every_integer_is_read_back(number):
    assert canonical_integer(str(number)) == str(number)
    assert canonical_integer(f"{number:+d}") == str(number)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("x^2-3*x+2", "x^2-3*x+2"),
        (" 2 - 3x + x**2\n", "x^2-3*x+2"),
        ("x*x-x-2*x+2", "x^2-3*x+2"),
        ("x^2/1", "x^2/1"),  # left to the strict stage
        ("(x-1)*(x-2)", None),  # not multiplied out
        ("x^2-3*y", None),
        ("__import__('os')", None),
        ("", None),
        ("\u0661", None),
        ("x" * 300, None),
    ],
)
def test_a_formula_is_read_in_one_form_only(completion, answer):
    assert extract_answer(completion, SYMBOLIC) == answer


def test_an_expression_is_one_line():
    assert extract_answer(" x + y # comment\nimport os", EXPRESSION) == extract_answer(
        "(x+y)", EXPRESSION
    )
    assert candidate_program("x + y\rimport os", EXPRESSION) == f"{EXPRESSION.prompt} x + y\n"
    for nothing in ("", "\n", "   \nx+y", "x" * 500):
        assert candidate_program(nothing, EXPRESSION) is None
        assert extract_answer(nothing, EXPRESSION) is None
    assert extract_answer("x +", EXPRESSION) is None
    assert extract_answer("(" * 390, EXPRESSION) is None


def test_a_function_ends_where_its_body_ends():
    body = "    if x:\n        return 1\n\n    return 2"
    program = candidate_program(body + "\nprint('more')\n    return 3", FUNCTION)
    assert program == f"{FUNCTION.prompt}{body}\n"
    assert extract_answer(body, FUNCTION) == extract_answer(body + " # so\n\nx = 1", FUNCTION)
    assert extract_answer("return 1", FUNCTION) is None
    assert extract_answer("   " + "x" * 5000, FUNCTION) is None
    assert candidate_program("", FUNCTION) is None and candidate_program("\n \n", FUNCTION) is None


@given(st.text(max_size=40))
def test_no_text_breaks_the_reading_of_code(text):
    for task in (EXPRESSION, FUNCTION):
        found = extract_answer(text, task)
        assert found is None or candidate_program(text, task) is not None


def test_nothing_here_reads_the_prompt_for_an_answer():
    """The prompt opens a program and nothing else; for text it is not looked at at all."""
    used = [line for line in inspect.getsource(answers).splitlines() if ".prompt" in line]
    assert len(used) == 2 and all('f"{task.prompt}' in line for line in used)
