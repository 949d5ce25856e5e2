"""What the builder adds to the network that the flags describe."""

import torch

from model.engram import canonical_token_map
from tests.integration.runs import tiny_flags, train
from training.build import build_model, resume_fingerprint
from training.build_data import build_corpus, build_tokenizer
from training.build_inference import load_for_inference
from training.config.cli import parse_args

CPU = torch.device("cpu")


def canonical_ids(model) -> torch.Tensor:
    (ids,) = (value for name, value in model.state_dict().items() if "canonical_ids" in name)
    return ids


def test_tokens_that_read_the_same_are_one_for_the_memory_where_that_is_asked_for(tmp_path):
    plain, merged = (
        parse_args(tiny_flags(tmp_path, *more)) for more in ((), ("--engram-canonical",))
    )
    tokenizer = build_tokenizer(plain)
    expected = canonical_token_map(tokenizer.pieces())
    the, other = (tokenizer.encode(text)[0] for text in (" the", " The"))
    assert the != other and expected[the] == expected[other]
    assert torch.equal(canonical_ids(build_model(merged, tokenizer, CPU)), expected)
    identity = torch.arange(tokenizer.vocab_size)
    assert torch.equal(canonical_ids(build_model(plain, tokenizer, CPU)), identity)


def test_a_checkpoint_without_merged_tokens_has_no_word_of_them(tmp_path):
    """So runs of before that flag go on, and a run with it is another."""
    plain, merged = (
        parse_args(tiny_flags(tmp_path, *more)) for more in ((), ("--engram-canonical",))
    )
    tokenizer = build_tokenizer(plain)
    corpus = build_corpus(plain, tokenizer)
    before, after = (resume_fingerprint(config, tokenizer, corpus) for config in (plain, merged))
    assert after.items() - before.items() == {("--engram-canonical", "True")}
    assert "--engram-canonical" not in before


def test_a_trained_network_is_read_with_its_merged_tokens(tmp_path):
    flags = tiny_flags(tmp_path / "run", "--engram-canonical", "--steps", "2")
    train(flags)
    trained = load_for_inference(parse_args(flags))
    assert torch.equal(
        canonical_ids(trained.model), canonical_token_map(trained.tokenizer.pieces())
    )
