"""Backends become sources with shares that add up, and every mistake is one line before a run."""

import json

import pytest

from training.config.data_sections import StreamConfig
from training.config.fields import ConfigError
from training.sources.base import SOURCE_IDS
from training.sources.registry import hub_token, open_source, source_specs


def specs_of(**options):
    return source_specs(StreamConfig(**options), seed=1)


def weights_of(**options):
    return {spec.key: pytest.approx(spec.weight) for spec in specs_of(**options)}


def test_backends_consist_of_their_sources_in_the_asked_shares():
    assert weights_of(data_backend="embedded") == {}
    assert weights_of(data_backend="hf") == {"fineweb": 0.7, "cosmopedia": 0.3}
    assert weights_of(data_backend="commoncrawl") == {"commoncrawl": 1.0}
    assert weights_of(data_backend="hybrid", commoncrawl_ratio=0.6) == {
        "fineweb": 0.4 * 0.7, "cosmopedia": 0.4 * 0.3, "commoncrawl": 0.6,
    }  # fmt: skip
    assert weights_of(data_backend="hybrid", local_path="a;b", local_ratio=0.2) == {
        "fineweb": 0.8 * 0.4 * 0.7, "cosmopedia": 0.8 * 0.4 * 0.3, "commoncrawl": 0.48,
        "local": 0.2,
    }  # fmt: skip
    assert weights_of(data_backend="hf", fineweb_ratio=1.0) == {"fineweb": 1.0}
    hub = [spec.options for spec in specs_of(data_backend="hf")]
    assert [(options["dataset"], options["config"]) for options in hub] == [
        ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
        ("HuggingFaceTB/cosmopedia", "web_samples_v2"),
    ]
    local = specs_of(data_backend="local", local_path=" a ; b ", pdf_path="c")
    assert [(spec.key, spec.options["paths"]) for spec in local] == [
        ("local", ["a", "b"]),
        ("pdf", ["c"]),
    ]
    assert {spec.kind for spec in local} <= set(SOURCE_IDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_backend": "local"}, "nothing to read: give --local-path"),
        ({"local_path": "a"}, "--local-path has no effect with --data-backend embedded"),
        ({"pdf_path": "a"}, "--pdf-path has no effect"),
        ({"data_backend": "hf", "local_path": "a"}, "read by --data-backend local or hybrid"),
        ({"data_backend": "local", "source_list": "nowhere.json"}, "--source-list nowhere.json"),
    ],
)
def test_a_backend_without_anything_to_do_is_one_line(options, message):
    with pytest.raises(ConfigError) as failure:
        specs_of(**options)
    assert message in str(failure.value) and "\n" not in str(failure.value)


def listed(tmp_path, entries):
    path = tmp_path / "sources.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return specs_of(data_backend="local", source_list=str(path))


def test_a_list_of_sources_names_any_dataset_and_file(tmp_path):
    specs = listed(
        tmp_path,
        [
            {"type": "hf", "dataset": "a/qa", "fields": ["q", "a"], "format": "{q}\n{a}",
             "split": "test", "weight": 2},
            {"type": "text", "path": "notes", "name": "notes", "max_tokens": 1000},
            {"type": "pdf", "path": "books"},
        ],
    )  # fmt: skip
    assert [(spec.key, spec.kind, spec.weight, spec.max_tokens) for spec in specs] == [
        ("a/qa", "hf", 2.0, 0),
        ("notes", "local", 1.0, 1000),
        ("books", "pdf", 1.0, 0),
    ]
    assert specs[0].options == {
        "dataset": "a/qa", "split": "test", "text_field": ["q", "a"], "template": "{q}\n{a}",
    }  # fmt: skip
    assert specs[1].options == {"paths": ["notes"]}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{", "no valid JSON"),
        ({"type": "hf"}, "a list of objects"),
        ([3], "a list of objects"),
        ([{"type": "s3", "path": "x"}], "entry 1: type must be hf, local, text or pdf, not 's3'"),
        ([{"path": "x"}], "type must be"),
        ([{"type": "hf", "path": "x"}], "unknown key 'path' for type hf"),
        ([{"type": "hf"}], "needs 'dataset'"),
        ([{"type": "pdf", "path": ""}], "needs 'path'"),
        ([{"type": "pdf", "path": "x", "weight": 0}], "weight must be a number above 0"),
        ([{"type": "pdf", "path": "x", "weight": True}], "weight must be"),
        ([{"type": "pdf", "path": "x", "max_tokens": 1.5}], "max_tokens must be a whole number"),
        ([{"type": "pdf", "path": "x"}, {"type": "pdf", "path": "x"}], "'x' is given twice"),
    ],
)
def test_a_wrong_list_is_one_line(tmp_path, entries, message):
    with pytest.raises(ConfigError) as failure:
        listed(tmp_path, entries)
    assert message in str(failure.value) and "\n" not in str(failure.value)


def test_the_identity_of_a_source_is_what_it_reads_not_how_often(tmp_path):
    one, other = specs_of(data_backend="hf"), specs_of(data_backend="hf", fineweb_ratio=0.5)
    assert [spec.identity() for spec in one] == [spec.identity() for spec in other]
    stricter = specs_of(data_backend="hf", fineweb_min_score=4.5)
    assert stricter[0].identity() != one[0].identity()


def test_the_hub_token_comes_from_the_flag_then_the_environment(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "from-environment")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert hub_token(StreamConfig()) is None
    assert hub_token(StreamConfig(hf_token_env_var="MY_TOKEN")) == "from-environment"
    assert hub_token(StreamConfig(hf_token="own", hf_token_env_var="MY_TOKEN")) == "own"


def test_own_files_are_opened_and_read(tmp_path):
    (tmp_path / "a.txt").write_text("first text\n", encoding="utf-8")
    (tmp_path / "b.md").write_text("second text\n", encoding="utf-8")
    config = StreamConfig(data_backend="local", local_path=str(tmp_path))
    source = open_source(source_specs(config, seed=1)[0], config=config)
    assert [source.next_document().text.strip() for _ in range(2)] == ["first text", "second text"]
    source.close()


@pytest.mark.parametrize("path", ["missing", "empty"])
def test_a_path_without_text_is_one_line(tmp_path, path):
    (tmp_path / "empty").mkdir()
    config = StreamConfig(data_backend="local", local_path=str(tmp_path / path))
    with pytest.raises(ValueError, match="--local-path") as failure:
        open_source(source_specs(config, seed=1)[0], config=config)
    assert "\n" not in str(failure.value)
