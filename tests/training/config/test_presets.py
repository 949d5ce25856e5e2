"""JSON presets: partial files, and every way to get one wrong."""

from __future__ import annotations

import json

import pytest

from training.config.fields import ConfigError
from training.config.presets import from_json, load_json, to_dict, to_json
from training.config.sigma_config import SigmaConfig


def test_a_partial_preset_leaves_the_rest_at_its_default():
    config = from_json('{"optim": {"lr": 1}, "curriculum": {"enabled": true}}')
    expected = SigmaConfig()
    expected.optim.lr, expected.curriculum.enabled = 1.0, True
    assert config == expected
    assert type(config.optim.lr) is float


def test_the_written_form_holds_every_setting_as_plain_json():
    values = json.loads(to_json(SigmaConfig()))
    assert values == to_dict(SigmaConfig())
    assert values["model"]["engram_orders"] == [2, 3, 4]
    assert values["ema"] == {"enabled": False, "decay": 0.997, "start_fraction": 0.4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid JSON"),
        ("[1]", "the file must be a JSON object"),
        ('{"run": 3}', "section 'run' must be a JSON object"),
        ('{"runs": {}}', "unknown section 'runs'; did you mean run?"),
        ('{"run": {"stpes": 1}}', "unknown setting 'stpes' in section 'run'; did you mean steps?"),
        ('{"run": {"steps": "5"}}', "--steps takes a whole number, not '5'"),
        ('{"run": {"steps": 5.0}}', "--steps takes a whole number, not 5.0"),
        ('{"run": {"steps": true}}', "--steps takes a whole number, not True"),
        ('{"run": {"require_cuda": 1}}', "--require-cuda takes true or false, not 1"),
        ('{"optim": {"lr": NaN}}', "NaN is no JSON number"),
        ('{"optim": {"lr": 1e999}}', "--lr must be a finite number"),
        ('{"optim": {"lr": null}}', "--lr takes a number, not None"),
        ('{"model": {"engram_orders": 3}}', "--engram-orders takes whole numbers"),
        ('{"run": {"seed": 1, "seed": 2}}', "'seed' is given twice"),
        ('{"run": {"output_dir": "a\\u0000b"}}', "--output-dir must be a path on one line"),
        ('{"eval": {"sample_prompt": "\\ud800"}}', "--sample-prompt holds bytes"),
        ("[" * 100_000, "no valid JSON"),
    ],
)
def test_a_wrong_preset_is_one_line(text, message):
    with pytest.raises(ConfigError) as failure:
        from_json(text)
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_file_is_named_in_its_error(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"run": {"steps": 0}}')
    with pytest.raises(ConfigError, match=r"--steps must be at least 1, not 0 \(.*config\.json\)"):
        load_json(path)
