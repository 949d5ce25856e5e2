"""The small coder reads solved tasks, a third of them wrong, and is asked for others."""

import itertools
import random

from scripts.bench_verification import found_by, ratios, sampled_pools
from scripts.rl_coder import LEVELS, code_lines, held_out, main, written_solution
from scripts.rl_text import byte_tokenizer
from training.rl.tasks import draw_task, split_of


def test_what_it_reads_is_mostly_right_and_never_what_it_is_asked():
    rng, task = random.Random(0), draw_task("expression", level=2, rng=random.Random(1))
    written = [written_solution(task, rng) for _ in range(1000)]
    assert 0.6 < written.count(task.solution) / 1000 < 0.75
    assert all(len(text) == len(task.solution) for text in written)
    tokenizer = byte_tokenizer()
    read = {
        tokenizer.decode(line[1:]).rpartition("\n    return")[0]
        for line in itertools.islice(code_lines(tokenizer, random.Random(2)), 300)
    }
    for family, level in LEVELS:
        for _, asked in held_out(family, level, count=20, seed=0):
            assert split_of(asked.prompt) == "test"
            assert asked.prompt.rpartition("\n    return")[0] not in read


def test_its_pools_are_what_the_bench_reads(tmp_path):
    out = tmp_path / "pools.json"
    wanted = ["--steps", "1", "--tasks", "1", "--pool", "3", "--work", str(tmp_path)]
    assert main([str(out), *wanted]) == 0
    pools = sampled_pools(out)
    assert [(pool[0][0].family, pool[0][0].level) for pool in pools] == list(LEVELS)
    assert all(len(pool) == 3 and pool[0][0] is pool[2][0] for pool in pools)
    assert all(log_prob < 0.0 for pool in pools for *_, log_prob in pool)


def test_rates_of_shortlists_are_those_counted_by_hand():
    correct, seconds = [True, False, False, True], [1.0, 2.0, 3.0, 4.0]
    lucky, both = found_by(correct, seconds, [[0]]), found_by(correct, seconds, [[0], [1, 2]])
    assert (lucky.solved, lucky.verify_s, lucky.recall) == (1.0, 1.0, 0.5)
    assert (both.solved, both.verify_s, both.recall) == (0.5, 3.0, 0.25)
    found = ratios([lucky] * 4, [both] * 4, draft_s=1.0)
    assert found["verifying_alone"] == {"ratio": 6.0, "interval": [6.0, 6.0]}
    assert found["with_drafting"]["ratio"] == 4.0  # (1 / 2) over (0.5 / 4)
