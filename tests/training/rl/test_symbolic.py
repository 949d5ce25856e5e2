"""Formulas are compared by what they mean; what never ends is ended, and the next one is served."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.soak_sandbox import processes_below
from training.rl.polynomials import (
    NotPolynomial,
    add,
    derivative,
    multiply,
    parse_polynomial,
    polynomial_text,
)
from training.rl.symbolic import SymbolicPool, SymbolicWorker
from training.rl.symbolic_worker import math_verify_compare, sympy_compare

POLYNOMIALS = st.dictionaries(st.integers(0, 6), st.integers(-99, 99).filter(bool), max_size=4)


def value(polynomial, x):
    return sum(count * x**power for power, count in polynomial.items())


@given(POLYNOMIALS, POLYNOMIALS, st.integers(-9, 9))
def test_the_ring_is_that_of_its_values(left, right, x):
    assert value(add(left, right, factor=-1), x) == value(left, x) - value(right, x)
    assert value(multiply(left, right), x) == value(left, x) * value(right, x)
    step = add(multiply(left, derivative(right)), multiply(derivative(left), right))
    assert derivative(multiply(left, right)) == step


@given(POLYNOMIALS)
def test_a_polynomial_is_read_as_it_is_written(polynomial):
    text = polynomial_text(polynomial)
    assert parse_polynomial(text) == polynomial
    assert parse_polynomial(text.replace("*", "")) == polynomial
    assert parse_polynomial(text.replace("^", "**").replace("+", " + ")) == polynomial


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "y",
            "x2",
            "0x10",
            "x^-1",
            "x^1.5",
            "x^17",
            "x^x",
            "2^3^4",
            "1.5",
            "x(",
            "x;x",
            "007",
        ),
        *("x/2", "\u0663", "x" * 201, "(" * 150, "-" * 200, "9^16^16", "True", "x.real", "__x"),
    ],
)
def test_what_is_no_polynomial_is_refused(text):
    with pytest.raises(NotPolynomial):
        parse_polynomial(text)


@given(POLYNOMIALS, POLYNOMIALS)
@settings(deadline=None)
def test_sympy_and_the_normal_form_decide_alike(left, right):
    compare = sympy_compare()
    texts = polynomial_text(left), polynomial_text(right)
    assert compare(*texts) == (left == right)
    assert compare(texts[0], texts[0])


@pytest.fixture
def pool():
    opened = SymbolicPool(num_workers=2, limit_s=60.0)
    yield opened
    opened.close()


def test_each_pair_gets_its_own_answer(pool):
    pairs = [("x^2-1", "x*x-1"), ("x^2-1", "x^2+1"), ("2*x", "4*x^2/2/x"), ("1", "x^0")]
    pairs += [("x", "1/0"), ("x", "y"), ("x", "x+(1"), ("x/x", "1"), ("3/2", "1.5")]
    found = [one.reason for one in pool.compare_many(pairs * 5)]
    wanted = ["passed", "wrong", "passed", "passed", "wrong", "malformed", "malformed"]
    assert found == (wanted + ["passed", "passed"]) * 5
    assert pool.compare_many([]) == []


def test_what_never_ends_is_ended_and_leaves_nothing():
    pool = SymbolicPool(num_workers=1, limit_s=60.0)
    assert pool.compare_many([("x", "x")])[0].reason == "passed"
    pool.close()
    before = len(processes_below(os.getpid())) if sys.platform == "linux" else 0
    hurried = SymbolicPool(num_workers=1, limit_s=0.3)
    found = hurried.compare_many([("x", "9^9^9^9")] * 2)
    assert {one.reason for one in found} <= {"timeout", "oversize"}
    assert hurried.workers[0].pid is None or {one.reason for one in found} != {"timeout"}
    hurried.close()
    if sys.platform == "linux":
        # What stays is the tracker that `multiprocessing` starts once for the whole program.
        assert len(processes_below(os.getpid())) <= before + 1


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_worker_is_replaced(pool):
    pool.compare_many([("x", "x")] * 4)
    pids = [worker.pid for worker in pool.workers if worker.pid]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert [one.reason for one in pool.compare_many([("x", "x")] * 4)] == ["passed"] * 4


@pytest.mark.skipif(sys.platform == "win32", reason="processes there are not reaped")
def test_a_worker_that_another_thread_has_reaped_is_replaced():
    """To start a process reaps all that have ended, in whichever thread that is."""
    worker = SymbolicWorker("sympy")
    try:
        assert worker.compare("x + x", "2*x", limit_s=30.0).reason == "passed"
        first = worker.pid
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        assert worker.compare("x + x", "2*x", limit_s=30.0).reason == "passed"
        assert worker.pid != first
    finally:
        worker.close()


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_ctrl_c_in_the_terminal_leaves_the_worker_to_its_parent(capfd):
    """It reaches every process there, and the parent finishes its step."""
    worker = SymbolicWorker("sympy")
    try:
        assert worker.compare("x + x", "2*x", limit_s=60.0).reason == "passed"
        first = worker.pid
        os.kill(first, signal.SIGINT)
        assert worker.compare("x + x", "2*x", limit_s=60.0).reason == "passed"
        assert worker.pid == first and "KeyboardInterrupt" not in capfd.readouterr().err
    finally:
        worker.close()


def test_an_unknown_engine_is_named():
    with pytest.raises(ValueError, match="sympy, math-verify"):
        SymbolicPool(num_workers=1, limit_s=1.0, engine="magic")


@pytest.fixture(scope="module")
def latex():
    pytest.importorskip("math_verify", reason="needs math-verify")
    return math_verify_compare()


@given(POLYNOMIALS, POLYNOMIALS)
@settings(deadline=None, max_examples=25)
def test_math_verify_decides_like_the_normal_form(latex, left, right):
    texts = polynomial_text(left), polynomial_text(right)
    assert latex(*texts) == (left == right)
    assert latex(texts[0], texts[0].replace("^", "**"))


def test_math_verify_serves_a_pool(latex):
    pool = SymbolicPool(num_workers=1, limit_s=60.0, engine="math-verify")
    pool.try_engine()
    pairs = [("x^2-1", "-1+x^2"), ("x^2-1", "x^2+1"), ("x^12", "x^1*2"), ("x", "x+(1")]
    assert [one.reason == "passed" for one in pool.compare_many(pairs)] == [True] + [False] * 3
    pool.close()


@pytest.mark.parametrize("finds", [False, True])
def test_an_engine_that_reads_nothing_or_passes_everything_is_refused(finds, monkeypatch):
    """What math-verify does on Windows, where its time limits make every parse empty."""
    module = SimpleNamespace(parse=lambda *a, **k: [], verify=lambda *a, **k: True)
    if finds:
        module.parse = lambda *a, **k: [1]
    monkeypatch.setitem(sys.modules, "math_verify", module)
    with pytest.raises(RuntimeError, match=r"1/2 is 0\.5"):
        math_verify_compare()


def test_the_missing_engine_is_named_with_the_flag(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RuntimeError, match=r"pip install math-verify.*--verifier-symbolic-engine"):
        math_verify_compare()
