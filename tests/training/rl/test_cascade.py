"""The cascade says what the strict verifier says, for less; its gate learns from strict words."""

import math
import random
import sys

import pytest
import torch

from tests.training.rl.completions import model_like
from training.rl.cascade import VerifierCascade
from training.rl.tasks import draw_task
from training.rl.verifier import Judgement, Verifier

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs a sandbox that was proved")
GENEROUS_MS = 60_000


def columns(rows):
    return tuple(list(column) for column in zip(*rows))


@pytest.fixture(scope="module")
def strict():
    try:
        opened = Verifier(code=True, timeout_ms=GENEROUS_MS, num_workers=2)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def labelled(strict):
    """Model-like completions and the strict word on each."""
    tasks, texts, log_probs = columns(model_like(count=160, rng=random.Random(1)))
    return tasks, texts, log_probs, strict.verify(tasks, texts, rng=random.Random(2))


class Recorder:
    """A strict verifier that remembers what it was asked."""

    def __init__(self, words=None):
        self.asked, self.words, self.recorded = [], words or {}, []

    def judge(self, tasks, texts, *, rng):
        self.asked += list(zip(tasks, texts))
        return [self._word(task, text) for task, text in zip(tasks, texts)]

    def record(self, tasks, judgements):
        self.recorded += list(zip(tasks, judgements, strict=True))

    def _word(self, task, text):
        passed = self.words.get(text, text.strip() == task.solution.strip())
        return judgement(passed=passed, answer=text)


def judgement(*, passed, answer="1", stage="strict"):
    return Judgement(
        passed=passed,
        parsed=answer is not None,
        answer=answer,
        reason="passed" if passed else "wrong",
        stage=stage,
        elapsed_s=0.01,
    )


@linux_only
def test_it_agrees_with_the_strict_verifier_and_runs_far_less(strict, labelled):
    tasks, texts, log_probs, words = labelled
    cascade = VerifierCascade(strict, audit_share=0.0)
    found = cascade.verify(tasks, texts, rng=random.Random(3), mean_log_probs=log_probs)
    accepts = sum(one.passed for one in words)
    assert 40 <= accepts <= len(words) - 40  # the set has both kinds
    wrong = [
        (task.prompt, text, word.reason, one)
        for task, text, word, one in zip(tasks, texts, words, found)
        if one.passed != word.passed
    ]
    assert wrong == []
    stages = {one.stage for one in found}
    assert stages == {"format", "light", "strict"}
    metrics = cascade.take_metrics()
    assert cascade.decided_early == sum(one.stage != "strict" for one in found)
    assert metrics["verifier_cascade_strict_calls"] < 0.5 * len(texts)
    assert metrics["verifier_cascade_stage0_rejects"] > 0
    assert metrics["verifier_cascade_stage1_accepts"] > 0
    assert metrics["verifier_cascade_cost_saved_fraction"] > 0.2
    assert math.isnan(metrics["verifier_cascade_audit_disagreement"])


@linux_only
def test_calibrating_measures_every_stage_and_finds_no_wrong_accept(strict, labelled):
    tasks, texts, log_probs, words = labelled
    cascade = VerifierCascade(strict)
    before = cascade.p_pass(tasks, texts, mean_log_probs=log_probs)
    assert set(before) == {0.0, 1.0}  # whether an answer could be read
    cascade.calibrate(tasks, texts, words, mean_log_probs=log_probs, rng=random.Random(4))
    metrics = cascade.take_metrics()
    for stage in ("format", "light"):
        name = f"verifier_cascade_{stage}"
        assert metrics[f"{name}_false_accept_share"] == metrics[f"{name}_false_reject_share"] == 0.0
        assert 0.0 < metrics[f"{name}_cost_ms"] < metrics["verifier_cascade_strict_cost_ms"]
    assert math.isnan(metrics["verifier_cascade_gate_cost_ms"])  # there was no gate yet
    chances = cascade.p_pass(tasks, texts, mean_log_probs=log_probs)
    passed = [chance for chance, word in zip(chances, words) if word.passed]
    failed = [chance for chance, word in zip(chances, words) if not word.passed]
    assert sum(passed) / len(passed) > sum(failed) / len(failed) + 0.1
    assert all(0 <= chance <= 1 for chance in chances)
    # What was learnt survives a checkpoint.
    other = VerifierCascade(strict)
    other.load_state_dict(cascade.state_dict())
    assert other.p_pass(tasks, texts, mean_log_probs=log_probs) == chances


def looks(cascade, counts, *, seed=0, passes=lambda log_prob: log_prob > -1.5):
    """Looks at programs that only the sandbox can tell, of so many each."""
    task, rng = draw_task("function", level=1, rng=random.Random(1)), random.Random(seed)
    for count in counts:
        log_probs = [rng.uniform(-4, 0) for _ in range(count)]
        texts = [undecidable(f"n{rng.getrandbits(60)}") for _ in range(count)]
        words = [
            judgement(passed=passes(value), answer=text) for value, text in zip(log_probs, texts)
        ]
        cascade.calibrate([task] * count, texts, words, mean_log_probs=log_probs, rng=rng)
    return task


def test_looks_add_up_to_a_gate_and_old_ones_go(monkeypatch):
    """A look at 16 tasks is too small for a gate; four of them are not."""
    monkeypatch.setattr("training.rl.cascade.MAX_LABELLED", 128)
    cascade = VerifierCascade(Recorder())
    task, ask = looks(cascade, [16] * 3), {"mean_log_probs": [-3.9, -0.1]}
    texts = [undecidable("n" + digit * 18) for digit in "12"]  # as long as those it learns from
    assert cascade.p_pass([task] * 2, texts, **ask) == [1.0, 1.0]
    looks(cascade, [16], seed=1)
    unlikely, likely = cascade.p_pass([task] * 2, texts, **ask)
    assert unlikely < 0.2 and likely > 0.8
    looks(cascade, [15] * 10, seed=2, passes=lambda log_prob: log_prob < -1.5)
    unlikely, likely = cascade.p_pass([task] * 2, texts, **ask)
    assert unlikely > 0.8 and likely < 0.2
    assert len(cascade.state_dict()["labelled"]) <= 128


def test_a_restored_one_learns_as_the_whole_would(monkeypatch):
    whole = VerifierCascade(Recorder())
    looks(whole, [40] * 3)
    restored = VerifierCascade(Recorder())
    restored.load_state_dict(whole.state_dict())
    for one in (whole, restored):
        looks(one, [40] * 2, seed=1)
    states = [one.state_dict() for one in (whole, restored)]
    assert torch.equal(*(state.pop("labelled") for state in states))
    assert states[0] == states[1] and states[0]["gate"] is not None


def test_what_the_gate_would_have_lost_is_counted_before_it_learns_from_it():
    cascade, _, _ = gated_cascade(num=6000)
    cascade.take_metrics()
    looks(cascade, [50], passes=lambda log_prob: True)
    share = cascade.take_metrics()["verifier_cascade_gate_false_reject_share"]
    assert share == 1.0


def test_the_gate_learns_from_strict_words_only():
    task = draw_task("add", level=1, rng=random.Random(0))
    cascade = VerifierCascade(Recorder())
    with pytest.raises(ValueError, match="strict judgements only"):
        cascade.calibrate(
            [task],
            ["1"],
            [judgement(passed=True, stage="light")],
            mean_log_probs=[-1.0],
            rng=random.Random(0),
        )


def undecidable(text="total"):
    """A function of two statements: only the sandbox can tell."""
    return f"    {text} = sum(x)\n    return {text}"


def gated_cascade(*, num=2600, audit_share=0.0, words=None):
    """A cascade calibrated on programs that pass exactly if they are likely enough."""
    task = draw_task("function", level=1, rng=random.Random(1))
    rng, recorder = random.Random(2), Recorder(words)
    log_probs = [rng.uniform(-4, 0) for _ in range(num)]
    texts = [undecidable(f"n{number}") for number in range(num)]
    cascade = VerifierCascade(recorder, audit_share=audit_share)
    cascade.calibrate(
        [task] * num,
        texts,
        [
            judgement(passed=log_prob > -1.5, answer=text)
            for log_prob, text in zip(log_probs, texts)
        ],
        mean_log_probs=log_probs,
        rng=rng,
    )
    return cascade, recorder, task


def test_the_gate_rejects_what_ranks_below_all_that_ever_passed():
    cascade, recorder, task = gated_cascade(num=6000)
    texts = [undecidable("a"), undecidable("b")]
    found = cascade.verify([task] * 2, texts, rng=random.Random(3), mean_log_probs=[-3.9, -0.1])
    assert [one.stage for one in found] == ["gate", "strict"]
    assert [text for _, text in recorder.asked] == [texts[1]]
    assert (found[0].passed, found[0].reason) == (False, "unlikely")
    assert cascade.take_metrics()["verifier_cascade_gate_rejects"] == 1


def test_the_gate_stays_closed_until_a_thousand_accepts_were_seen():
    cascade, recorder, task = gated_cascade(num=1200)  # some 225 accepts in the half that counts
    cascade.verify([task], [undecidable()], rng=random.Random(3), mean_log_probs=[-3.9])
    assert len(recorder.asked) == 1


def test_an_audit_that_finds_a_lost_accept_has_the_last_word_and_closes_the_gate():
    lost = undecidable("lost")
    cascade, recorder, task = gated_cascade(num=6000, audit_share=1.0, words={lost: True})
    (found,) = cascade.verify([task], [lost], rng=random.Random(4), mean_log_probs=[-3.0])
    assert (found.passed, found.stage) == (True, "strict") and cascade.decided_early == 0
    assert cascade.take_metrics()["verifier_cascade_audit_disagreement"] == 1.0
    recorder.asked.clear()
    (found,) = VerifierCascade.verify(  # as likely as the lost one: no longer rejected
        cascade, [task], [undecidable("next")], rng=random.Random(5), mean_log_probs=[-3.0]
    )
    assert len(recorder.asked) == 1 and found.stage == "strict"
    (found,) = cascade.verify(
        [task], [undecidable("x")], rng=random.Random(5), mean_log_probs=[-3.9]
    )
    assert cascade.take_metrics()["verifier_cascade_gate_rejects"] == 1


def test_about_a_twentieth_of_early_decisions_is_audited():
    recorder = Recorder()
    cascade = VerifierCascade(recorder)
    tasks = [draw_task("add", level=5, rng=random.Random(n)) for n in range(2000)]
    texts = [task.solution for task in tasks]
    cascade.verify(tasks, texts, rng=random.Random(6), mean_log_probs=[-1.0] * 2000)
    metrics = cascade.take_metrics()
    assert 60 <= len(recorder.asked) <= 140 and metrics["verifier_cascade_audit_disagreement"] == 0
    assert cascade.decided_early == 2000 - len(
        [1 for task, text in zip(tasks, texts) if (task, text) in recorder.asked]
    )
    assert len(recorder.recorded) == 2000  # the metrics of the verifier see every verdict


def test_equal_programs_of_one_task_run_once():
    recorder = Recorder()
    cascade = VerifierCascade(recorder, audit_share=0.0)
    one, other = (draw_task("function", level=2, rng=random.Random(n)) for n in (1, 2))
    text = undecidable()
    texts = [text, text + "  # again", text.replace("total = sum(x)", "total  =  sum( x )"), text]
    found = cascade.verify(
        [one, one, one, other], texts, rng=random.Random(7), mean_log_probs=[-1.0] * 4
    )
    assert [task.prompt for task, _ in recorder.asked] == [one.prompt, other.prompt]
    assert [word.elapsed_s > 0 for word in found] == [True, False, False, True]


def test_early_decisions_come_from_the_generator_alone():
    tasks, texts, log_probs = columns(model_like(count=80, rng=random.Random(8)))
    runs = []
    for _ in range(2):
        recorder = Recorder()
        found = VerifierCascade(recorder).verify(
            tasks, texts, rng=random.Random(9), mean_log_probs=log_probs
        )
        runs.append(([(one.passed, one.stage) for one in found], recorder.asked))
    assert runs[0] == runs[1]


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match="no share"):
        VerifierCascade(Recorder(), audit_share=5)
