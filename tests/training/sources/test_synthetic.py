"""Tasks are right, vary, and follow from seed, epoch and number alone."""

import hashlib
import json
import re
from itertools import pairwise

import pytest

from training.config.data_sections import StreamConfig
from training.config.fields import ConfigError
from training.sources.base import SOURCE_IDS, SourceExhausted
from training.sources.registry import open_source, source_specs
from training.sources.synthetic import TASKS, Draw, SyntheticSource
from training.stream.near_duplicates import NearDuplicateWindow


def is_right(line: str) -> bool:
    """An independent reading of a task's line."""
    if match := re.fullmatch(r"([\d +*-]+) = (-?\d+)", line):
        total, sign = 0, 1
        for token in re.findall(r"\d+ \* \d+|\d+|[+-]", match[1]):
            if token in "+-":
                sign = 1 if token == "+" else -1
                continue
            first, _, second = token.partition(" * ")
            total += sign * int(first) * int(second or 1)
        return total == int(match[2])
    if match := re.fullmatch(r"(\d+) divided by (\d+) is (\d+), remainder (\d+)", line):
        number, by, quotient, rest = map(int, match.groups())
        return quotient * by + rest == number and rest < by
    if match := re.fullmatch(r"(\d+) is (less than|more than|equal to) (\d+)", line):
        sign = (int(match[1]) > int(match[3])) - (int(match[1]) < int(match[3]))
        return {"less than": -1, "equal to": 0, "more than": 1}[match[2]] == sign
    if match := re.fullmatch(r"(\w+) reversed is (\w+)", line):
        return "".join(reversed(match[1])) == match[2]
    if match := re.fullmatch(r"number of letters (\w) in (\w+): (\d+)", line):
        return len(match[2].split(match[1])) - 1 == int(match[3])
    if match := re.fullmatch(r"the series ([\d, ]+) goes on with (\d+)", line):
        shown = [*map(int, match[1].split(", ")), int(match[2])]
        return len({after - before for before, after in pairwise(shown)}) == 1
    given, _, answer = line.partition(": ")[2].partition(" -> ")
    rank = int if line.startswith("sorted") else str
    ordered = list(map(rank, answer.split()))
    in_order = all(first <= second for first, second in pairwise(ordered))
    return bool(given) and sorted(given.split()) == sorted(answer.split()) and in_order


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_answers_are_right(kind):
    lines = [TASKS[kind](Draw(f"{kind} {number}")) for number in range(400)]
    assert [line for line in lines if not is_right(line)] == []
    assert len(set(lines)) > 20
    wrong = [line[:-1] + ("7" if line[-1] != "7" else "8") for line in lines]
    assert kind == "comparison" or not any(map(is_right, wrong))


def test_documents_are_the_same_for_ever():
    source = SyntheticSource(seed=1)
    text = "".join(source.next_document().text for _ in range(50))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "06999e29b0b1f2353a3074b3875565c4ae26ff52b84d5da8355768c65ef0183d"
    assert SyntheticSource(seed=2).next_document().text not in text


def test_resume_costs_nothing_and_epochs_differ():
    source = SyntheticSource(seed=3, documents_per_epoch=40)
    documents = [source.next_document() for _ in range(40)]
    with pytest.raises(SourceExhausted):
        source.next_document()
    for place in (0, 7, 39):
        resumed = SyntheticSource(seed=3, documents_per_epoch=40)
        resumed.load_state_dict(json.loads(json.dumps({"epoch": 0, "index": place})))
        assert resumed.next_document() == documents[place]
    source.rewind(epoch=1)
    assert source.next_document().text not in {document.text for document in documents}
    window = NearDuplicateWindow()
    assert not any(window.check(document.text) for document in documents)


def test_the_flag_makes_it_the_only_source():
    config = StreamConfig(synthetic_data=True, data_backend="hybrid")
    (spec,) = source_specs(config, seed=9)
    assert SOURCE_IDS[spec.kind] == 4
    source = open_source(spec, config=config)
    assert source.next_document() == SyntheticSource(seed=9).next_document()
    assert all(spec.kind != "synthetic" for spec in source_specs(
        StreamConfig(data_backend="hybrid"), seed=9))  # fmt: skip
    with pytest.raises(ConfigError, match="--local-path has no effect with --synthetic-data"):
        source_specs(StreamConfig(synthetic_data=True, local_path="texts"), seed=9)
