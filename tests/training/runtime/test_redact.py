"""What the redactor must leave readable, and the shapes of secrets it must know."""

from __future__ import annotations

import base64

import pytest

from training.runtime.redact import MARK, Redactor, is_secret_name


@pytest.mark.parametrize(
    "text",
    [
        "step 5000 loss 2.5 tokens_total 81920 core_tokens_per_s 1200.5",
        "--tokenizer-name assets-32k --max-new-tokens 20 is too long",
        "size mismatch for blocks.0.mixer.key_norm.weight: torch.Size([64])",
        "https://host/path?page=2 answered 404",
        "for token, key in sorted(pairs, key=len): next_token = logits.argmax()",
        "mean per-token loss 2.5, unknown token: 50256, hf_configuration, sk-learn",
        "expected 3 tokens, got 4; asked for secrets of training",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert Redactor.from_environment({}).clean(text) == text


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "OPENAI_API_KEY", "PGPASSWORD", "aws-secret", "--hf-token", "apiKey"]
)
def test_secret_names_are_known(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["tokens_total", "TOKENIZERS_PARALLELISM", "--tokenizer-name", "PATH", "step", "monkey"]
)
def test_ordinary_names_are_not_secret(name: str) -> None:
    assert not is_secret_name(name)


def test_command_lines_lose_their_secrets_and_keep_the_rest() -> None:
    redactor = Redactor.from_environment({"WANDB_API_KEY": "zzzz1111"})
    argv = ["train.py", "--hf-token", "abc", "--api-key=def", "--steps", "5", "--note", "zzzz1111"]
    assert redactor.clean_argv(argv) == [
        "train.py",
        "--hf-token",
        MARK,
        f"--api-key={MARK}",
        "--steps",
        "5",
        "--note",
        MARK,
    ]


def test_basic_authorization_is_removed() -> None:
    encoded = base64.b64encode(b"user:secret-password").decode()
    assert encoded not in Redactor.from_environment({}).clean(f"Authorization: Basic {encoded}")


@pytest.mark.parametrize(
    "text",
    [
        "GET https://host/file?X-Amz-Date=2026&X-Amz-Signature={}&x-id=GetObject answered 403",
        "https://host/file?X-Amz-Security-Token={}",
        "Authorization: {}",
        "{{'authorization': 'token {}'}}",
        '{{\\"Authorization\\": \\"{}\\"}}',
        "Set-Cookie: session={}; Path=/",
        "cookie: a=1; session={}",
    ],
)
def test_what_lets_one_into_a_web_server_is_removed(text: str) -> None:
    """A signed address of a hub's file store, and headers of any scheme."""
    secret = "Zx81Qw-longEnough_0987"
    assert secret in text.format(secret)
    assert secret not in Redactor.from_environment({}).clean(text.format(secret))


def test_values_of_secret_variables_are_removed_in_every_spelling() -> None:
    redactor = Redactor.from_environment({"DB_PASSWORD": 'p/a"s s\n%'})
    for text in ('p/a"s s\n%', r"p/a\"s s\n%", r'p/a"s s\n%', "p%2Fa%22s%20s%0A%25"):
        assert redactor.clean(f"<{text}>") == f"<{MARK}>"


def test_a_password_inside_a_url_variable_is_known() -> None:
    redactor = Redactor.from_environment({"DATABASE_URL": "postgres://me:hunter22@db:5432/x"})
    assert "hunter22" not in redactor.clean("login failed for me with hunter22")


def test_variables_that_only_sound_secret_do_not_blank_common_words() -> None:
    redactor = Redactor.from_environment({"TOKENIZERS_PARALLELISM": "false", "USE_TOKEN": "true"})
    assert redactor.clean("false and true") == "false and true"
