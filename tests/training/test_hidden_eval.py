"""The hidden evaluation: its seal, its controls (100 %, 0 %, chance) and its arithmetic."""

import json
import math
from collections import Counter

import pytest
import torch
from scipy.stats import binomtest

from model.config import SigmaModelConfig
from model.generation import generate
from model.sigma_llm import SigmaLLM
from tests.training.hidden_models import KnowingModel, UnigramModel, true_choice
from training.hidden_eval import (
    DEFAULT_MANIFEST,
    answer_hash,
    choose_questions,
    decode_manifest,
    encode_manifest,
    evaluate_hidden,
    read_continuations,
    read_manifest,
    wilson_interval,
)
from training.sources.embedded import EmbeddedCorpus
from training.stream.contamination import RUN_WORDS, ContaminationIndex
from training.stream.word_hashes import normalize
from training.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_name("assets-4k")
MANIFEST = read_manifest("")
TINY = dict(
    d_model=32, n_heads=2, n_layers=2, mamba_ratio=1, attention_ratio=1, kv_latent_dim=16,
    rope_dim=8, mamba_head_dim=16, mamba_d_state=8, mamba_chunk_len=16, mimo_rank=2, d_ff=48,
    n_routed_experts=4, moe_top_k=2,
)  # fmt: skip


def tiny_model(seed: int) -> SigmaLLM:
    return SigmaLLM(SigmaModelConfig(vocab_size=TOKENIZER.vocab_size, **TINY), seed=seed)


def evaluate(model, questions=MANIFEST.questions):
    return evaluate_hidden(model, TOKENIZER, questions, device="cpu")


def test_the_shipped_manifest_is_sealed():
    text = DEFAULT_MANIFEST.read_text(encoding="utf-8")
    assert len(MANIFEST.questions) >= 200 and MANIFEST.chance == 0.25
    assert len(bytes.fromhex(MANIFEST.seed_commitment)) == 32
    for question in MANIFEST.questions:
        assert len(set(question.choices)) == 4
        assert true_choice(question)
        assert len(normalize(question.prompt).split()) >= RUN_WORDS
        # No plaintext: neither a question nor any of its answers can be read in the file.
        assert question.prompt not in text
    assert not set(normalize(text).split()) & {"himself", "writing", "behind", "lamp"}
    assert len({question.salt for question in MANIFEST.questions}) == len(MANIFEST.questions)
    assert len({question.prompt for question in MANIFEST.questions}) == len(MANIFEST.questions)


def test_no_answer_is_known_from_its_place_or_its_words():
    """Neither "always the third" nor "always `are`" may beat chance by more than luck."""
    places = Counter(q.choices.index(true_choice(q)) for q in MANIFEST.questions)
    assert min(binomtest(places[i], len(MANIFEST.questions), 0.25).pvalue for i in range(4)) > 1e-3
    for family in ("being", "reflexive", "brackets"):
        asked = [q for q in MANIFEST.questions if q.family == family]
        most = Counter(true_choice(q) for q in asked).most_common(1)[0][1]
        assert binomtest(most, len(asked), 0.25, alternative="greater").pvalue > 1e-3


@pytest.mark.parametrize("name", ["assets-4k", "assets-32k"])
def test_no_choice_is_the_beginning_of_another(name):
    """Else the shorter one could never be less likely than the longer."""
    tokenizer = Tokenizer.from_name(name)
    for question in MANIFEST.questions:
        encoded = [tokenizer.encode(choice) for choice in question.choices]
        for first in encoded:
            assert sum(other[: len(first)] == first for other in encoded) == 1


def test_every_answer_hash_depends_on_salt_question_and_answer():
    one = answer_hash(" are", salt=b"1" * 16, prompt="they")
    assert one != answer_hash(" are", salt=b"2" * 16, prompt="they")
    assert one != answer_hash(" are", salt=b"1" * 16, prompt="we")
    assert one != answer_hash(" is", salt=b"1" * 16, prompt="they")


def test_positive_control_a_model_that_knows_is_always_right():
    knowing = KnowingModel(TOKENIZER, [(q.prompt, true_choice(q)) for q in MANIFEST.questions])
    result = evaluate(knowing)
    assert result.hidden_eval_pass == 1.0 and result.hidden_eval_n == len(MANIFEST.questions)
    assert result.hidden_eval_greedy_pass == 1.0
    assert result.hidden_eval_ci_low > 0.99
    assert result.hidden_eval_ci_high == pytest.approx(1.0)


def test_a_model_that_is_always_wrong_scores_nothing():
    wrong = [
        (q.prompt, choice)
        for q in MANIFEST.questions
        for choice in q.choices
        if choice != true_choice(q)
    ]
    result = evaluate(KnowingModel(TOKENIZER, wrong))
    assert result.hidden_eval_pass == result.hidden_eval_greedy_pass == 0.0


def test_negative_control_models_that_know_nothing_are_at_chance():
    """Five untrained networks together: 1,000 answers, about half of them independent."""
    questions = choose_questions(MANIFEST, 200)
    passed = sum(evaluate(tiny_model(seed), questions).hidden_eval_pass for seed in range(5)) / 5
    assert abs(passed - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 500)


def test_a_model_without_context_is_at_chance():
    """The trap of trivially known answers: token frequencies alone must not help."""
    passed = [
        evaluate(UnigramModel(TOKENIZER.vocab_size, seed=seed)).hidden_eval_pass
        for seed in range(8)
    ]
    assert abs(sum(passed) / 8 - 0.25) < 0.03


def test_scores_are_log_likelihoods_per_byte_whatever_the_batch():
    model = tiny_model(3).eval()
    texts = [(q.prompt, choice) for q in MANIFEST.questions[:40] for choice in q.choices]
    together = read_continuations(model, TOKENIZER, texts, device="cpu")
    for place in range(0, len(texts), 13):
        prompt, continuation = texts[place]
        before = [TOKENIZER.end_id, *TOKENIZER.encode(prompt)]
        after = TOKENIZER.encode(continuation)
        tokens = torch.tensor([before + after])
        labels = torch.full_like(tokens, -100)
        labels[0, len(before) - 1 : -1] = torch.tensor(after)
        with torch.no_grad():
            loss = float(model(tokens, labels=labels).loss)
        expected = -loss * len(after) / len(continuation.encode())
        assert together[place][0] == pytest.approx(expected, rel=1e-5)


def test_what_counts_as_written_is_what_greedy_decoding_writes():
    """The oracle is `generate`: of each question its own greedy text, and another one."""
    model = tiny_model(3).eval()
    for question in MANIFEST.questions[:12]:
        before = [TOKENIZER.end_id, *TOKENIZER.encode(question.prompt)]
        tokens = generate(model, torch.tensor([before]), max_new_tokens=6, temperature=0.0)
        own = TOKENIZER.decode(tokens[0, len(before) :].tolist())
        other = question.choices[0]
        texts = [(question.prompt, own), (question.prompt, other)]
        found = read_continuations(model, TOKENIZER, texts, device="cpu")
        if TOKENIZER.encode(own) == tokens[0, len(before) :].tolist():
            assert found[0][1]
        assert found[1][1] == (TOKENIZER.encode(other) == TOKENIZER.encode(own)[: len(other)])


def test_evaluating_is_deterministic_and_leaves_the_model_alone():
    model = tiny_model(4).train()
    frozen = model.blocks[0].eval() if hasattr(model, "blocks") else None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    questions = choose_questions(MANIFEST, 200)
    assert evaluate(model, questions) == evaluate(model, questions)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and (frozen is None or not frozen.training)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("passed", "total"), [(0, 200), (1, 200), (50, 200), (199, 200), (7, 7)])
def test_the_interval_is_wilsons(passed, total):
    expected = binomtest(passed, total).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson_interval(passed, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        wilson_interval(0, 0)


def test_the_manifest_text_round_trips():
    text = encode_manifest(MANIFEST)
    again = decode_manifest(text)
    assert again.questions == MANIFEST.questions and encode_manifest(again) == text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d | {"schema": 9}, "has schema 9"),
        (lambda d: d | {"chance": 0.5}, "does not match its own sha256"),
        (lambda d: d | {"answers": d["answers"][1:]}, "does not match its own sha256"),
        (lambda d: {k: v for k, v in d.items() if k != "questions"}, "does not match"),
        (lambda d: {}, "is not a hidden evaluation manifest"),
        (lambda d: [1, 2], "is not a hidden evaluation manifest"),
    ],
)
def test_a_damaged_manifest_is_one_line_naming_the_flag(tmp_path, damage, message):
    document = json.loads(DEFAULT_MANIFEST.read_text(encoding="utf-8"))
    path = tmp_path / "hidden.json"
    path.write_text(json.dumps(damage(document)), encoding="utf-8")
    with pytest.raises(ValueError) as failure:
        read_manifest(str(path))
    text = str(failure.value)
    assert message in text and "--integrity-hidden-eval-manifest" in text and "\n" not in text


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"null", b"[" * 10**5])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, content):
    path = tmp_path / "hidden.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="--integrity-hidden-eval-manifest"):
        read_manifest(str(path))
    with pytest.raises(ValueError, match="leave the flag empty"):
        read_manifest(str(tmp_path / "missing.json"))


def test_more_questions_than_there_are_is_refused():
    assert choose_questions(MANIFEST, 200) == MANIFEST.questions[:200]
    families = Counter(question.family for question in choose_questions(MANIFEST, 200))
    assert set(families.values()) == {25}
    with pytest.raises(ValueError, match="--integrity-hidden-eval-tasks 9999"):
        choose_questions(MANIFEST, 9999)


def test_the_shipped_corpus_holds_no_passage_of_the_hidden_evaluation():
    index = ContaminationIndex(passages=MANIFEST.passages)
    documents = list(EmbeddedCorpus().documents())
    assert sum(index.count_runs(document.text) for document in documents) == 0
    # The check would have seen one: here it is, in the middle of the longest document.
    longest = max(documents, key=lambda document: len(document.text)).text
    prompt = MANIFEST.questions[17].prompt
    middle = longest.index(" ", len(longest) // 2)
    planted = f"{longest[:middle]} {prompt} {longest[middle:]}"
    runs = len(normalize(prompt).split()) - RUN_WORDS + 1
    assert index.count_runs(planted) == runs > 0


def test_a_batch_can_be_checked_after_decoding():
    prompt = MANIFEST.questions[3].prompt
    batch = [*TOKENIZER.encode("Some text before. "), *TOKENIZER.encode(prompt), TOKENIZER.end_id]
    runs = len(normalize(prompt).split()) - RUN_WORDS + 1
    index = ContaminationIndex(passages=MANIFEST.passages)
    assert index.count_runs(TOKENIZER.decode(batch)) == runs
