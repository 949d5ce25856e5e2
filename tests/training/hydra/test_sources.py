"""What domains ask and pay: held-out gates, the cap of unverified text, exact words, levels."""

from __future__ import annotations

import random

import pytest

from tests.training.rl.boxes import open_or_skip
from tests.training.rl.small_learner import OddBytes
from training.hydra.sources import (
    Passage,
    TaskSource,
    TextSource,
    draw_passage,
    overlap,
    passage_reward,
)
from training.rl.tasks import TaskSampler
from training.rl.verifier import Verifier

RNG = random.Random(0)
WORDS = "river stone bridge meadow lantern harbour winter garden silver window".split()


def make_text(seed, size=120):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(size)) + "\n"


TEXTS = [make_text(seed) for seed in range(60)]


def text_source(**options):
    return TextSource(TEXTS.__getitem__, len(TEXTS), **({"cap": 0.2, "seed": 3} | options))


def task_source(families=("add", "subtract"), verifier=None):
    return TaskSource(
        TaskSampler(families, seed=3),
        TaskSampler(families, split="val", seed=3),
        verifier or Verifier(code=False, timeout_ms=2500),
    )


def test_a_reward_of_nine_tenths_without_a_verifier_is_a_fifth():
    passage = Passage(text="", following="one two three four five six seven eight nine", word=None)
    said = " one two three four five six seven eight"
    assert overlap(passage.following, said) > 0.9
    assert passage_reward(passage, said, cap=0.2) == 0.2
    assert passage_reward(passage, said, cap=1.0) > 0.9
    assert passage_reward(passage, "nothing of it", cap=0.2) == 0.0
    weak = passage_reward(passage, " one", cap=0.5)
    assert weak == pytest.approx(0.2) == pytest.approx(2 * 1 / (9 + 1))


def test_a_cloze_is_verified_and_not_capped():
    passage = Passage(text="a lantern and a", following=" lantern", word="lantern")
    for said in (" lantern", "lantern", " lantern, which", "  lantern."):
        assert passage_reward(passage, said, cap=0.2) == 1.0
    for said in ("", " Lantern", " lanterns", " the lantern", "\nlantern", " 'lantern", " lan"):
        assert passage_reward(passage, said, cap=0.2) == 0.0


def test_a_passage_ends_where_its_solution_begins():
    for seed in range(40):
        text = TEXTS[seed % len(TEXTS)]
        cloze = draw_passage(text, random.Random(seed), cloze=True)
        going_on = draw_passage(text, random.Random(seed), cloze=False)
        assert cloze is not None and going_on is not None
        assert cloze.text + cloze.following in text and cloze.following == f" {cloze.word}"
        assert cloze.word in cloze.text.split()
        assert going_on.text + going_on.following in text
    assert draw_passage("short", RNG, cloze=True) is None
    assert draw_passage("short", RNG, cloze=False) is None


def test_what_is_learned_from_is_never_in_the_gate():
    for source, count in ((text_source(), 40), (task_source(), 100)):
        gate = source.gate_items(count)
        assert len({item.prompt for item in gate}) == count
        assert source.gate_items(count) == gate
        drawn = [source.draw() for _ in range(300)]
        assert not {item.prompt for item in gate} & {item.prompt for item in drawn}
        assert source.gate_items(count) == gate
    documents = [text for text in TEXTS if any(item.prompt in text for item in gate_of_text())]
    assert not any(item.prompt in text for item in drawn_text() for text in documents)


def gate_of_text():
    return text_source().gate_items(40)


def drawn_text():
    source = text_source()
    return [source.draw() for _ in range(100)]


def test_solutions_earn_what_they_are_said_to():
    for source in (text_source(), task_source()):
        items = [source.draw() for _ in range(60)]
        found = source.rewards(items, [item.solution for item in items], rng=RNG)
        assert found == [item.solution_reward for item in items]
    assert {item.solution_reward for item in drawn_text()} == {0.2, 1.0}


def test_gates_of_text_ask_for_words_only():
    assert all(item.solution_reward == 1.0 for item in gate_of_text())


def test_programs_are_judged_in_the_sandbox():
    open_or_skip().close()
    families = ("expression", "function")
    source = task_source(families, Verifier(code=True, timeout_ms=60_000))
    items = [source.draw() for _ in range(3)]
    assert source.rewards(items, [item.solution for item in items], rng=RNG) == [1.0] * 3
    assert source.rewards(items, ["0"] * 3, rng=RNG) == [0.0] * 3
    source.close()


def test_levels_follow_the_verdicts_on_what_was_drawn():
    source = task_source(("add",), OddBytes())
    for _ in range(200):
        items = [source.draw()]
        source.observe(items, [1.0])
    assert source.state_dict()["levels"]["add"] > 1


def test_a_source_goes_on_where_it_was():
    for make in (text_source, task_source):
        source = make()
        [source.draw() for _ in range(7)]
        state = source.state_dict()
        expected = [source.draw() for _ in range(5)]
        other = make()
        other.load_state_dict(state)
        assert [other.draw() for _ in range(5)] == expected


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="too few"):
        TextSource(TEXTS.__getitem__, 1, cap=0.2, seed=0)
    empty = TextSource(lambda number: "nothing", 60, cap=0.2, seed=0)
    with pytest.raises(ValueError, match="no document"):
        empty.draw()
