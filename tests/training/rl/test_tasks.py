"""Tasks are right, disjoint between splits, and their level follows what a model can do."""

import json
import operator
import random
import re
import runpy

import pytest

from training.rl.code_tasks import evaluate, expression_text, expression_words
from training.rl.polynomials import parse_polynomial, polynomial_text
from training.rl.sandbox_child import encode
from training.rl.tasks import FAMILIES, LEVELS, TaskSampler, draw_task, num_levels, split_of
from training.rl.verdict import draw_exam, values_equal

EVERY_LEVEL = [(family, level) for family in FAMILIES for level in range(1, LEVELS[family] + 1)]


SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@pytest.fixture
def names_of(tmp_path):
    """Runs a source and gives its names."""

    def run(source):
        (tmp_path / "source.py").write_text(source, encoding="utf-8")
        return runpy.run_path(str(tmp_path / "source.py"))

    return run


def several(family, level, *, count=60, seed=0):
    rng = random.Random(seed)
    return [draw_task(family, level=level, rng=rng) for _ in range(count)]


@pytest.mark.parametrize(("family", "level"), EVERY_LEVEL)
def test_tasks_come_from_the_generator_alone_and_reach_every_split(family, level):
    tasks = several(family, level, count=200)
    assert [task.prompt for task in tasks] == [
        task.prompt for task in several(family, level, count=200)
    ]
    assert {split_of(task.prompt) for task in tasks} == {"train", "val", "test"}
    assert len({task.prompt for task in tasks}) >= 50
    assert {(task.family, task.level) for task in tasks} == {(family, level)}
    # One prompt has one answer: otherwise no model could learn it.
    assert len({(task.prompt, task.answer) for task in tasks}) == len(
        {task.prompt for task in tasks}
    )


@pytest.mark.parametrize("family", ["add", "subtract", "multiply"])
def test_the_answer_of_arithmetic_is_what_python_calculates(family):
    for level in range(1, LEVELS[family] + 1):
        for task in several(family, level):
            first, sign, second = re.fullmatch(r"(\d+)([-+*])(\d+)=", task.prompt).groups()
            assert task.answer == str(SIGNS[sign](int(first), int(second)))
            assert task.solution == f"{task.answer}\n"


def test_the_operands_have_the_digits_of_their_level():
    first, last = several("add", 1), several("multiply", 5)
    assert {len(task.prompt) for task in first} == {4}
    assert all(100 <= int(part) <= 999 for task in last for part in task.prompt[:-1].split("*"))
    negative = [
        task
        for level in range(1, 6)
        for task in several("subtract", level)
        if "=-" in task.prompt + str(task.answer)
    ]
    assert {task.level for task in negative} == {5}


@pytest.mark.parametrize("level", range(1, LEVELS["expression"] + 1))
def test_the_words_the_reference_and_the_solution_of_an_expression_agree(level, names_of):
    for task in several("expression", level):
        exam = draw_exam(task.code, "x", rng=random.Random(1))
        solution = names_of(task.prompt + task.solution)["f"]
        assert [solution(*case) for case in exam.job.cases] == list(exam.expected)
        # The words, read by a route of their own, are the same function.
        words = task.prompt.split("# ")[1].split("\n")[0]
        for word, sign in (
            ("divided by", "//"),
            ("plus", "+"),
            ("minus", "-"),
            ("times", "*"),
            ("mod", "%"),
        ):
            words = words.replace(word, sign)
        spoken = names_of(f"f = lambda x, y, z: {words}")["f"]
        assert [spoken(*case) for case in exam.job.cases] == list(exam.expected)


def test_a_tree_is_written_with_parentheses_where_they_are_needed():
    tree = ("%", ("+", ("*", "x", "y"), "z"), ("+", "x", 3))
    assert expression_text(tree) == "((x*y)+z)%(x+3)"
    assert expression_words(tree) == "((x times y) plus z) mod (x plus 3)"
    assert evaluate(tree, {"x": 2, "y": 5, "z": 4}) == 4


@pytest.mark.parametrize("level", range(1, LEVELS["function"] + 1))
def test_the_solution_of_a_function_is_its_reference(level, names_of):
    for task in several("function", level):
        names = names_of(task.prompt + task.solution)
        exam = draw_exam(task.code, "x", rng=random.Random(2))
        found = [names["f"](*case) for case in exam.job.cases]
        assert values_equal(found, list(exam.expected))


NEAR_MISSES = (
    ("function", 3, "n<{c}", "n<{d}"),
    ("function", 3, "n>{c}", "n>{d}"),
    ("function", 2, "n%{c}", "n%{d}"),
    ("expression", 3, "//{c}", "//{d}"),
    ("expression", 3, "%{c}", "%{d}"),
    ("expression", 4, "+{c})", "+{d})"),
)


def same_everywhere(one, other, *, family):
    """Whether two functions agree on far more arguments than a verdict has."""
    rng = random.Random(9)
    for number in range(-300, 300):
        small = (rng.randint(2, 60) for _ in range(3))
        arguments = ([number],) if family == "function" else tuple(small)
        if one(*arguments) != other(*arguments):
            return False
    return True


@pytest.mark.parametrize(("family", "level", "old", "new"), NEAR_MISSES)
def test_the_hidden_inputs_tell_a_near_miss_from_the_solution(family, level, old, new, names_of):
    """A constant that is off by one hardly shows on inputs drawn without thought."""
    missed, tried = [], 0
    for task in several(family, level, count=400):
        for c in range(2, 31):
            solution = re.sub(
                re.escape(old.format(c=c)) + r"(?![0-9])", new.format(c=c, d=c + 1), task.solution
            )
            if solution == task.solution:
                continue
            near = names_of(task.prompt + solution)
            exam = draw_exam(task.code, "x", rng=random.Random(tried))
            tried += 1
            if [near["f"](*case) for case in exam.job.cases] == list(exam.expected):
                if not same_everywhere(near["f"], task.code.reference, family=family):
                    missed.append((task.solution, solution))
    print(f"{len(missed)} of {tried} near misses pass")
    assert tried >= 20 and len(missed) <= tried / 200, missed


@pytest.mark.parametrize("level", range(1, LEVELS["symbolic"] + 1))
def test_symbolic_answers_are_those_of_sympy(level):
    sympy = pytest.importorskip("sympy")
    for task in several("symbolic", level, count=30):
        kind, question = task.prompt.removesuffix(" = ").split(" ")
        formula = sympy.parse_expr(question.replace("^", "**"))
        wanted = sympy.diff(formula, sympy.Symbol("x")) if kind == "d/dx" else sympy.expand(formula)
        assert sympy.expand(sympy.parse_expr(task.answer.replace("^", "**")) - wanted) == 0
        assert polynomial_text(parse_polynomial(task.answer)) == task.answer


def test_what_travels_to_a_program_is_plain():
    for family in ("expression", "function"):
        for level in range(1, LEVELS[family] + 1):
            for task in several(family, level, count=20):
                exam = draw_exam(task.code, task.prompt + task.solution, rng=random.Random(3))
                json.dumps([encode(list(case)) for case in exam.job.cases])


@pytest.mark.parametrize(
    ("family", "level", "words"),
    [("add", 6, "levels 1 to 5"), ("add", 0, "levels 1 to 5"), ("magic", 1, "no task family")],
)
def test_what_there_is_not_is_named(family, level, words):
    with pytest.raises(ValueError, match=words):
        draw_task(family, level=level, rng=random.Random(0))


def test_samplers_of_two_splits_share_no_task():
    drawn = {}
    for split in ("train", "val", "test"):
        sampler = TaskSampler(FAMILIES, split=split, seed=7)
        drawn[split] = {sampler.draw(family=f, level=1).prompt for f in FAMILIES for _ in range(30)}
    assert not drawn["train"] & drawn["val"]
    assert not drawn["train"] & drawn["test"] and not drawn["val"] & drawn["test"]


def test_levels_are_mixed_around_the_current_one():
    sampler = TaskSampler(["add"], seed=1)
    sampler.observe_val("add", [True] * 64)
    drawn = [sampler.draw().level for _ in range(1000)]
    shares = [drawn.count(level) / 1000 for level in (1, 2, 3)]
    assert shares == pytest.approx([0.2, 0.7, 0.1], abs=0.05)
    assert {TaskSampler(["add"], seed=s).draw().level for s in range(50)} == {1, 2}


def test_the_level_rises_and_falls_with_what_was_passed():
    sampler = TaskSampler(["add", "multiply"])
    sampler.observe_val("add", [True] * 63)
    assert sampler.level("add") == 1  # 64 are needed
    sampler.observe_val("add", [False])
    assert (sampler.level("add"), sampler.level("multiply")) == (2, 1)
    sampler.observe_val("add", ([True] * 7 + [False] * 3) * 7)  # 45 of 64 are above 0.7
    assert sampler.level("add") == 3
    sampler = TaskSampler(["add"])
    sampler.observe_val("add", [True] * 44 + [False] * 20)  # 0.6875
    assert sampler.level("add") == 1
    for _ in range(9):
        sampler.observe_val("add", [True] * 64)
    assert sampler.level("add") == num_levels("add") == 5
    sampler.observe_val("add", [True] * 12 + [False] * 52)  # below 0.2
    assert sampler.level("add") == 4 and sampler.mean_level() == 4.0
    for _ in range(9):
        sampler.observe_val("add", [False] * 64)
    assert sampler.level("add") == 1


def test_a_resumed_sampler_goes_on_as_if_nothing_had_happened():
    sampler = TaskSampler(FAMILIES, seed=3)
    for _ in range(5):
        sampler.draw()
    sampler.observe_val("add", [True] * 70)
    state = json.loads(json.dumps(sampler.state_dict()))
    other = TaskSampler(FAMILIES, seed=3)
    other.load_state_dict(state)
    assert [t.prompt for t in (sampler.draw() for _ in range(20))] == [
        t.prompt for t in (other.draw() for _ in range(20))
    ]
    other.observe_val("add", [True] * 58)  # 6 were kept
    assert other.level("add") == 3


@pytest.mark.parametrize("change", [{"seed": 4}, {"families": ["add"]}, {"split": "val"}])
def test_the_state_of_other_tasks_is_refused(change):
    state = TaskSampler(["add", "symbolic"], seed=3).state_dict()
    with pytest.raises(ValueError, match="the saved tasks have"):
        TaskSampler(["add", "symbolic"], seed=3).load_state_dict({**state, **change})


@pytest.mark.parametrize(
    ("families", "split", "words"),
    [
        ([], "train", "no task family is left"),
        (["add"], "hidden", "no split"),
        (["x"], "val", "'x'"),
    ],
)
def test_a_sampler_without_tasks_is_refused(families, split, words):
    with pytest.raises(ValueError, match=words):
        TaskSampler(families, split=split)
