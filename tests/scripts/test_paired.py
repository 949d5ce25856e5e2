"""Student's interval against tabled values, and verdicts on planted differences."""

import pytest
import torch

from scripts.paired import compare, overall_verdict, t_quantile


@pytest.mark.parametrize(
    ("probability", "degrees", "value"),
    [
        (0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 3, 3.1824), (0.975, 4, 2.7764),
        (0.975, 9, 2.2622), (0.975, 30, 2.0423), (0.95, 7, 1.8946), (0.5, 5, 0.0),
    ],
)  # fmt: skip
def test_quantiles_are_those_of_the_tables(probability, degrees, value):
    assert t_quantile(probability, degrees=degrees) == pytest.approx(value, abs=1e-4)


def test_the_interval_is_over_paired_differences():
    found = compare([1.0, 2.0, 3.0], [1.5, 2.4, 3.6])
    error = 0.1 / 3**0.5
    assert found.mean == pytest.approx(-0.5)
    assert (found.low, found.high) == pytest.approx(
        (-0.5 - 4.3027 * error, -0.5 + 4.3027 * error), abs=1e-5
    )
    assert found.verdict == "helps" and compare([3.0, 4.1], [1.0, 2.0]).verdict == "harms"


def test_equal_arms_have_no_effect_and_their_error_rate_is_the_nominal_one():
    assert compare([1.0, 2.0], [1.0, 2.0]).verdict == "no effect"
    noise = torch.randn(2000, 2, 4, generator=torch.Generator().manual_seed(0)).tolist()
    wrong = sum(compare(ours, theirs).verdict != "no effect" for ours, theirs in noise)
    assert 0.03 < wrong / 2000 < 0.07


def test_all_comparisons_must_agree_to_help_and_one_suffices_to_harm():
    helps, nothing = compare([0.0, 0.1], [1.0, 1.1]), compare([0.0, 1.0], [1.0, 0.0])
    harms = compare([1.0, 1.1], [0.0, 0.1])
    assert overall_verdict([helps, helps]) == "helps"
    assert overall_verdict([helps, nothing]) == "no effect"
    assert overall_verdict([helps, harms]) == "harms"
    assert overall_verdict([]) == "no effect"


@pytest.mark.parametrize(("left", "right"), [([1.0], [2.0]), ([1.0, 2.0], [1.0])])
def test_seeds_must_pair(left, right):
    with pytest.raises(ValueError, match="seeds"):
        compare(left, right)
