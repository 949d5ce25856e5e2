"""The rules of a verdict: what counts as equal, and that no reply can do more than fail."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.rl.sandbox_child import decode, encode
from training.rl.sandbox_job import ENDED, OVERSIZE, PROGRAM_LIMIT_CHARS, TIMEOUT, Reply
from training.rl.verdict import (
    MALFORMED,
    RAISED,
    WRONG,
    CodeTask,
    decide,
    draw_exam,
    judge,
    judge_many,
    values_equal,
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.complex_numbers(),
)
HASHABLE = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner), max_leaves=4)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.sets(HASHABLE, max_size=3),
        st.frozensets(HASHABLE, max_size=3),
        st.dictionaries(HASHABLE, inner, max_size=3),
    ),
    max_leaves=8,
)
TASK = CodeTask(
    function="f", reference=lambda x: x + 1, draw=lambda rng: (rng.randrange(99),), num_cases=4
)


@given(PLAIN)
@settings(max_examples=300, deadline=None)
def test_a_value_survives_the_journey_with_its_exact_types(value):
    returned = decode(json.loads(json.dumps(encode(value))))
    assert values_equal(value, returned) and values_equal(returned, value)


@given(PLAIN, PLAIN)
@settings(max_examples=300, deadline=None)
def test_values_that_are_equal_have_equal_text(left, right):
    """`repr` is another definition of sameness, but for the order in sets and the sign of zero."""
    if repr(left) == repr(right):
        assert values_equal(left, right)
    elif values_equal(left, right):
        assert type(left) is type(right)


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (1, True),
        (1, 1.0),
        (0, None),
        ([1], (1,)),
        ([1], [True]),
        ({1: 2}, {True: 2}),
        ({1}, {True}),
        ({1}, frozenset({1})),
        ({(1, 2)}, {(1, 2.0)}),
        ({1j}, {2j}),
        ({frozenset({1})}, {frozenset({2})}),
        ("1", 1),
        (b"a", "a"),
        ([], None),
        ([1, 2], [1]),
        ({1: 2}, {}),
        (1.0, math.nan),
        (math.inf, -math.inf),
        (math.inf, 1e308),
        (1.0, math.inf),
    ],
)
def test_a_neighbour_is_not_the_value(expected, actual):
    assert values_equal(expected, actual, rel_tol=1.0, abs_tol=0.0) is False
    assert values_equal(actual, expected, rel_tol=1.0, abs_tol=0.0) is False


def test_zero_has_no_sign_inside_a_set_either():
    assert values_equal({(0.0, 1)}, {(-0.0, 1)}) and values_equal({0j}, {-0j})


class NothingToRun:
    """A sandbox that must not be given a program."""

    def run_many(self, jobs, *, limit_s):
        assert list(jobs) == []
        return []


@pytest.mark.parametrize("program", ["", " \n", "x" * (PROGRAM_LIMIT_CHARS + 1)])
def test_a_program_that_needs_no_run_never_passes(program):
    sandbox = NothingToRun()
    verdict = judge(program, task=TASK, sandbox=sandbox, rng=random.Random(0), limit_s=1.0)
    assert not verdict.passed and verdict.num_right == 0 and verdict.num_cases == TASK.num_cases


class Obedient:
    """Runs nothing: it knows what the programs below give."""

    known = {"x + 1": lambda x: x + 1, "x * 2": lambda x: x * 2, "[x] * 2000": lambda x: [x] * 2000}

    def run_many(self, jobs, *, limit_s):
        return [reply_of(self.answers(job)) for job in jobs]

    def answers(self, job):
        function = self.known[job.program.strip()]
        return [json.dumps({"value": encode(function(x))}).encode() for (x,) in job.cases]


def test_each_program_is_judged_by_its_own_task_and_in_order():
    double = CodeTask(function="g", reference=lambda x: 2 * x, draw=TASK.draw)
    padded = "x + 1".ljust(PROGRAM_LIMIT_CHARS)  # as long as a program may be
    entries = [(TASK, padded), (double, "x + 1"), (TASK, ""), (double, "x * 2"), (TASK, "x * 2")]
    found = judge_many(entries, sandbox=Obedient(), rng=random.Random(0), limit_s=1.0)
    assert [one.passed for one in found] == [True, False, False, True, False]
    assert [one.num_cases for one in found] == [4, 8, 4, 8, 4]


def test_a_long_right_answer_is_right():
    task = CodeTask(function="f", reference=lambda x: [x] * 2000, draw=TASK.draw)
    verdict = judge("[x] * 2000", task=task, sandbox=Obedient(), rng=random.Random(0), limit_s=1.0)
    assert verdict.passed and verdict.num_right == 8


def test_what_is_not_a_number_equals_itself_only():
    assert values_equal([math.nan, math.inf, 0.0], [math.nan, math.inf, -0.0])
    assert not values_equal(math.nan, 0.0, abs_tol=math.inf)
    assert values_equal(1.0, 1.0 + 1e-12, rel_tol=1e-9)
    assert not values_equal(1.0, 1.0 + 1e-12)
    assert not values_equal({1.0}, {1.0 + 1e-12}, rel_tol=1e-9)


class Always(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize("value", [Always(1), [Always(1)], object(), {1: lambda: 0}, range(3)])
def test_a_value_with_code_in_it_does_not_travel(value):
    with pytest.raises(TypeError):
        encode(value)


def reply_of(lines, *, outcome=ENDED):
    return Reply(outcome=outcome, elapsed_s=0.1, data=b"".join(line + b"\n" for line in lines))


def right_lines(exam):
    return [json.dumps({"value": encode(value)}).encode() for value in exam.expected]


def test_only_the_right_values_in_time_and_nothing_else_pass():
    exam = draw_exam(TASK, "x", rng=random.Random(0))
    lines = right_lines(exam)
    assert decide(TASK, exam, reply_of(lines)).passed
    assert decide(TASK, exam, reply_of(lines)).num_right == len(lines)
    assert decide(TASK, exam, reply_of([*lines[1:], lines[-1]])).num_right == 1
    wrong = [
        (reply_of(lines, outcome=TIMEOUT), "timeout"),
        (reply_of(lines, outcome=OVERSIZE), "oversize"),
        (reply_of(lines[:-1]), "malformed"),
        (reply_of([*lines, lines[0]]), "malformed"),
        (reply_of([*lines[1:], lines[0]]), "wrong"),
        (reply_of([b'{"error": "ValueError"}', *lines[1:]]), "raised"),
        (reply_of([]), "malformed"),
        (Reply(outcome=ENDED, elapsed_s=0.1, data=reply_of(lines).data + b"x"), "malformed"),
        (Reply(outcome=ENDED, elapsed_s=0.1, data=reply_of(lines).data[:-1]), "malformed"),
        (reply_of([line.replace(b'"value"', b'"passed"') for line in lines]), "malformed"),
    ]
    for reply, reason in wrong:
        verdict = decide(TASK, exam, reply)
        assert (verdict.passed, verdict.reason) == (False, reason)


HOSTILE = (
    b"[" * 200_000,
    b'{"value": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    b'{"value": ' + b"9" * 100_000 + b"}",
    b'{"value": {"i": "0x"}}',
    b'{"value": {"f": "0x1p999999"}}',
    b'{"value": {"s": [[]]}}',
    b'{"value": {"d": [[[], 1]]}}',
    b'{"value": {"i": "' + b" " * 9 + b'1"}}',
    b'{"value": NaN}',
    b"\xff\xfe\x00",
    b"null",
    b'{"value": {"i": ["0x1"]}}',
    b'{"value": {"t": {"i": "0x1"}}}',
)


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_a_forged_reply_can_only_fail(line):
    exam = draw_exam(TASK, "x", rng=random.Random(0))
    verdict = decide(TASK, exam, reply_of([line, *right_lines(exam)[1:]]))
    assert not verdict.passed and verdict.reason in (WRONG, RAISED, MALFORMED)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_bytes_raise_or_pass(data):
    exam = draw_exam(TASK, "x", rng=random.Random(0))
    assert not decide(TASK, exam, Reply(outcome=ENDED, elapsed_s=0.0, data=data)).passed


def test_a_reply_of_colliding_hashes_is_not_even_parsed():
    """2**61 - 1 is the modulus of Python's hash of integers: all of these fall together."""
    body = ", ".join(f'{{"i": "{hex(n * (2**61 - 1))}"}}' for n in range(30_000))
    exam = draw_exam(TASK, "x", rng=random.Random(0))
    line = f'{{"value": {{"s": [{body}]}}}}'.encode()
    assert decide(TASK, exam, reply_of([line] * 4)).reason == "wrong"


def test_two_cases_are_enough_to_tell_a_constant_and_one_is_never_told():
    one, two = (
        CodeTask(function="f", reference=lambda x: 7, draw=TASK.draw, num_cases=count)
        for count in (1, 2)
    )
    assert draw_exam(one, "x", rng=random.Random(0)).expected == (7,)
    with pytest.raises(ValueError, match="constant"):
        draw_exam(two, "x", rng=random.Random(0))


@pytest.mark.parametrize("line", [b"[1]", b'{"value": {"i": "0x1"}, "error": "x"}', b"{}"])
def test_a_line_holds_one_thing(line):
    exam = draw_exam(TASK, "x", rng=random.Random(0))
    assert decide(TASK, exam, reply_of([line] * 4)).reason == "malformed"


def test_a_task_that_a_constant_solves_is_a_mistake():
    constant = CodeTask(function="f", reference=lambda x: 7, draw=TASK.draw)
    with pytest.raises(ValueError, match="constant"):
        draw_exam(constant, "x", rng=random.Random(0))
    strange = CodeTask(function="f", reference=lambda x: object(), draw=TASK.draw)
    with pytest.raises(ValueError, match="plain"):
        draw_exam(strange, "x", rng=random.Random(0))
    with pytest.raises(ValueError, match="num_cases"):
        draw_exam(
            CodeTask(function="f", reference=abs, draw=TASK.draw, num_cases=0),
            "x",
            rng=random.Random(0),
        )


def test_a_reference_that_changes_its_arguments_does_not_change_the_program_s():
    def empties(x):
        first = x[0]
        x.clear()
        return first

    task = CodeTask(function="f", reference=empties, draw=lambda rng: ([rng.randrange(9), 1],))
    exam = draw_exam(task, "x", rng=random.Random(0))
    assert all(len(case[0]) == 2 for case in exam.job.cases)


def test_equal_generators_draw_equal_exams():
    draws = [draw_exam(TASK, "x", rng=random.Random(seed)).job.cases for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
