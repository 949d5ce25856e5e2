"""The tokenizer loses nothing, and text cannot forge the special token."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from training.sources.base import ASSETS_DIRECTORY
from training.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

NAMES = ("assets-4k", "assets-32k")
TOKENIZERS = {name: Tokenizer.from_name(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=400))
def test_random_bytes_round_trip(name, content):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode_bytes(tokenizer.encode(content)) == content


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=300))
def test_random_text_round_trips_and_equals_its_bytes(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text.encode()) == ids


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 9,
        bytes(range(256)),
        b"\xff\xfe half \xe2\x82 of a euro sign \xed\xa0\x80 and a surrogate",
        b"\xf0\x9f\x98\x80 whole \xf0\x9f\x98 cut",
        b"caf\xc3\xa9 \xc3",
    ],
)
def test_broken_utf8_round_trips(content):
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode_bytes(tokenizer.encode(content)) == content


def test_valid_parts_of_broken_text_are_still_merged():
    tokenizer = TOKENIZERS["assets-4k"]
    assert len(tokenizer.encode(b"the function returns\xff the function returns")) < 12


def test_text_with_lone_surrogates_is_kept_as_bytes():
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode_bytes(tokenizer.encode("a\ud800b")) == b"a\xed\xa0\x80b"
        assert tokenizer.encode_batch(["a\ud800b", "plain"]) == [
            tokenizer.encode("a\ud800b"),
            tokenizer.encode("plain"),
        ]


@pytest.mark.parametrize("name", NAMES)
def test_special_token_cannot_be_injected(name):
    tokenizer = TOKENIZERS[name]
    for text in (END_OF_TEXT, f"before{END_OF_TEXT}after {END_OF_TEXT}", END_OF_TEXT * 3):
        for ids in (
            tokenizer.encode(text),
            tokenizer.encode(text.encode()),
            tokenizer.encode(text.encode() + b"\xff")[:-1],
            tokenizer.encode_batch([text])[0],
        ):
            assert tokenizer.end_id not in ids
            assert tokenizer.decode(ids) == text


def test_injection_would_succeed_without_the_guard():
    content = (ASSETS_DIRECTORY / "tokenizer_4k.json").read_bytes()
    unguarded = tokenizers.Tokenizer.from_buffer(content)
    assert TOKENIZERS["assets-4k"].end_id in unguarded.encode(f"a{END_OF_TEXT}b").ids


@pytest.mark.parametrize("name", NAMES)
def test_byte_lengths_add_up_to_the_text(name):
    tokenizer = TOKENIZERS[name]
    content = "Größe 12345 \n\n    return x  # naïve\t😀".encode() + b"\x80\x81"
    assert tokenizer.token_byte_lengths[tokenizer.encode(content)].sum() == len(content)
    assert tokenizer.token_byte_lengths.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_byte_lengths[tokenizer.end_id] == 0
    assert (np.delete(tokenizer.token_byte_lengths, tokenizer.end_id) > 0).all()


def test_special_token_decodes_to_nothing():
    tokenizer = TOKENIZERS["assets-4k"]
    ids = [tokenizer.end_id, *tokenizer.encode("In the beginning"), tokenizer.end_id]
    assert tokenizer.decode(ids) == "In the beginning"


def test_digits_come_in_groups_of_at_most_three():
    tokenizer = TOKENIZERS["assets-32k"]
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("x = 1234567890")]
    assert max(sum(c.isdigit() for c in piece) for piece in pieces) <= 3


def test_names_and_sizes():
    assert TOKENIZERS["assets-4k"].vocab_size == 4096
    assert TOKENIZERS["assets-32k"].vocab_size == 32768
    assert Tokenizer.from_name("assets").sha256 == TOKENIZERS["assets-32k"].sha256
    assert TOKENIZERS["assets-4k"].sha256 != TOKENIZERS["assets-32k"].sha256


def test_a_path_loads_the_same_tokenizer():
    path = ASSETS_DIRECTORY / "tokenizer_4k.json"
    assert Tokenizer.from_name(str(path)).sha256 == TOKENIZERS["assets-4k"].sha256


def test_plain_tokenizers_library_agrees_on_ordinary_text():
    content = (ASSETS_DIRECTORY / "tokenizer_4k.json").read_bytes()
    oracle = tokenizers.Tokenizer.from_buffer(content)
    text = "For God so loved the world; SELECT * FROM t WHERE x >= 10 -- café"
    assert TOKENIZERS["assets-4k"].encode(text) == oracle.encode(text).ids
    assert oracle.decode(oracle.encode(text).ids) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "not a tokenizer.json"),
        (b"\xff\xfe", "not a tokenizer.json"),
        (b"{}", "not a tokenizer.json"),
    ],
)
def test_unfit_files_are_named(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_name(str(path))
    assert "--tokenizer-name" in str(caught.value)


def test_missing_file_names_the_flag_and_the_choices(tmp_path):
    with pytest.raises(ValueError, match=r"--tokenizer-name .*assets-32k"):
        Tokenizer.from_name(str(tmp_path / "absent.json"))


def test_tokenizers_that_are_not_byte_level_are_refused():
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "die Größe": 1, END_OF_TEXT: 2}, unk_token="[UNK]")
    )
    with pytest.raises(ValueError, match="byte"):
        Tokenizer(words.to_str().encode())


def test_tokenizer_without_the_end_token_is_refused():
    document = json.loads(train_bpe(["some text"], vocab_size=300))
    document["added_tokens"] = []
    del document["model"]["vocab"][END_OF_TEXT]
    document["model"]["vocab"] = {
        token: index for index, token in enumerate(document["model"]["vocab"])
    }
    with pytest.raises(ValueError, match="endoftext"):
        Tokenizer(json.dumps(document).encode())


def test_training_is_reproducible_and_covers_all_bytes():
    texts = ["the cat sat on the mat", "the hat and the cat", "a mat for the cat"] * 5
    first = train_bpe(texts, vocab_size=280)
    assert first == train_bpe(texts, vocab_size=280)
    tokenizer = Tokenizer(first.encode())
    assert tokenizer.decode_bytes(tokenizer.encode(bytes(range(256)))) == bytes(range(256))
    assert len(tokenizer.encode(" the cat")) < len(" the cat")
