"""Which files make a split, by the card or by their names."""

import pytest

from training.sources.base import SourceError
from training.sources.hub_files import choose_config, files_of_split, glob_expression

FILES = [
    "README.md",
    "data/CC-MAIN-2024-10/train-00000-of-00002.parquet",
    "data/CC-MAIN-2024-10/train-00001-of-00002.parquet",
    "sample/10BT/000_00000.parquet",
    "sample/10BT/001_00000.parquet",
    "sample/100BT/000_00000.parquet",
]
CARD = {  # the shape of FineWeb-Edu's
    "configs": [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
        {
            "config_name": "sample-10BT",
            "data_files": [{"split": "train", "path": "sample/10BT/*"}],
        },
    ]
}


def files(entry, *, paths=FILES, split="train"):
    return files_of_split(paths, entry, dataset="own/set", split=split)


def test_patterns_of_the_card():
    assert files(choose_config(CARD, dataset="own/set", config=None)) == FILES[1:3]
    assert files(choose_config(CARD, dataset="own/set", config="sample-10BT")) == FILES[3:5]


@pytest.mark.parametrize(
    "stated",
    [
        "sample/10BT/*.parquet",
        ["sample/10BT/000*", "sample/10BT/001*"],
        {"train": "sample/10BT/*"},
        [{"split": "train", "path": ["./sample/10BT/0??_*.parquet"]}],
    ],
)
def test_patterns_in_every_shape(stated):
    assert files({"data_files": stated}) == FILES[3:5]


def test_a_folder_of_the_card():
    assert files({"data_dir": "sample/10BT"}) == FILES[3:5]
    assert files({"data_dir": "./sample", "data_files": "10BT/*"}) == FILES[3:5]


def test_splits_by_names():
    paths = ["train-0.parquet", "validation-0.parquet", "dev/x.parquet", "test_a.parquet", "a.txt"]
    assert files({}, paths=paths) == ["train-0.parquet"]
    assert files({}, paths=paths, split="validation") == ["validation-0.parquet", "dev/x.parquet"]
    assert files({}, paths=paths, split="test") == ["test_a.parquet"]
    plain = ["part-0.parquet", "contest.parquet", ".hidden/x.parquet", "notes.txt"]
    assert files({}, paths=plain) == ["part-0.parquet", "contest.parquet"]


def test_a_wrong_split_names_those_there_are():
    with pytest.raises(SourceError, match="no split 'dev'; it has: train") as caught:
        files({}, paths=["train-0.parquet"], split="dev")
    assert not caught.value.transient


def test_the_configuration():
    def choose(config, *entries):
        return choose_config({"configs": list(entries)}, dataset="own/set", config=config)

    a, b = {"config_name": "a"}, {"config_name": "b", "default": True}
    assert choose(None, a) == a and choose("a", a, b) == a and choose(None, a, b) == b
    assert choose_config({}, dataset="own/set", config=None) == {}
    with pytest.raises(SourceError, match="choose one of: a, c"):
        choose(None, a, {"config_name": "c"})
    with pytest.raises(SourceError, match="no configuration 'x'"):
        choose_config({}, dataset="own/set", config="x")


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("data/*", "data/a.parquet", "data/b/a.parquet"),
        ("data/**", "data/b/a.parquet", "more/data/a"),
        ("**/*.parquet", "a.parquet", "a.parquet.txt"),
        ("**/a.parquet", "x/y/a.parquet", "x/ya.parquet.b"),
        ("a[0-2].x", "a1.x", "a3.x"),
        ("a[!0-2].x", "a3.x", "a1.x"),
        ("a?b", "a.b", "a/b"),
        ("a+(b).c", "a+(b).c", "aab.c"),
    ],
)
def test_globs(pattern, inside, outside):
    assert glob_expression(pattern).match(inside)
    assert not glob_expression(pattern).match(outside)
