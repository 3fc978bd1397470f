"""Secrets of URLs are hidden in texts and configs, and everything else stays unchanged."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.urls import hidden, is_redacted, place_of, redacted, redacted_config, secrets_in
from launch.builders.facts import facts_of_process

HIDDEN = [
    ("http://user:secret@host:80/x", "http://***@host:80/x", {"secret"}),
    ("https://token12@host/x", "https://***@host/x", {"token12"}),
    ("http://user:se@cret@host/x", "http://***@host/x", {"se@cret"}),
    ("http://user:se/cret@host/x", "http://***@host/x", {"se/cret"}),
    ("http://user:s%65cret@host", "http://***@host", {"s%65cret", "secret"}),
    ("http:/user:secret@host/x", "http:/***@host/x", {"secret"}),  # as a Path writes it
    ("https://h/x?X-Amz-Signature=0123abc&a=b", "https://h/x?X-Amz-Signature=***&a=***", {"0123abc"}),
    ("https://h/x?sig=0123abc;key=456789#access_token=abcdef", None, {"0123abc", "456789", "abcdef"}),
    ("https://h/x?0123abc", "https://h/x?***", {"0123abc"}),
]
PLAIN = ["s3://bucket/a@b", "gs://bucket/run", "http://host:8000/a@b", "http://[::1]:80/a@b", "user:secret@host", "a/b"]


@pytest.mark.parametrize(("url", "shown", "secrets"), HIDDEN, ids=[url for url, _, _ in HIDDEN])
def test_what_may_be_secret_in_a_url_is_hidden_in_a_text_and_in_a_config(
    url: str, shown: str | None, secrets: set[str]
) -> None:
    text = f"{url} cannot be read (URL('{url}')); give \"{url}\" or data.shards={url}, then {{'a': '{url}'}}"
    for place in (redacted(text), str(redacted_config({"data": {"shards": url, "more": [url, (url,)]}, url: 1}))):
        assert not any(secret in place for secret in secrets), place
        assert shown is None or shown in place
    assert secrets_in({"data": [url]}) == secrets
    assert is_redacted(redacted(url))
    assert not is_redacted(url)
    assert redacted(redacted(text)) == redacted(text)


@pytest.mark.parametrize("text", PLAIN)
def test_a_text_without_secrets_is_not_changed(text: str) -> None:
    assert redacted(f"see {text}, x") == f"see {text}, x"
    assert redacted_config({"a": [text, 3, None, 1.5, True]}) == {"a": [text, 3, None, 1.5, True]}
    assert not is_redacted(text)


@given(st.text(st.characters(codec="utf-8", exclude_characters="/?#@:"), min_size=6), st.booleans())
def test_no_password_in_a_config_is_kept_whatever_its_characters(password: str, with_user: bool) -> None:
    url = f"http://{'user:' if with_user else ''}{password}@host/x"
    kept = redacted_config({"data": {"shards": url}})
    assert kept == {"data": {"shards": "http://***@host/x"}}
    assert password not in hidden(f"the bucket {password!s} is none", secrets_in({"shards": url}))


def test_a_secret_that_a_library_quotes_alone_is_hidden_too() -> None:
    secrets = secrets_in(["http://user:secret@host", "http://h/x?token=abcdefg&versionId=imagenet"])
    assert hidden("Invalid bucket name 'user:secret@host' of imagenet", secrets) == (
        "Invalid bucket name 'user:***@host' of imagenet"
    )
    assert hidden("{'Authorization': 'Basic dXNlcjpzZWNyZXQ='}", secrets) == "{'Authorization': 'Basic ***'}"
    assert hidden("step 12, the basic recipe", secrets_in("http://user:12@h")) == "step 12, the basic recipe"


def test_the_place_of_a_url_has_neither_secrets_nor_parameters() -> None:
    assert place_of("http://user:secret@host:80/a/b/?token=x") == "http/host:80/a/b"
    assert place_of("gs://bucket/run/") == "gs/bucket/run"
    assert place_of("gs://bucket//run") == "gs/bucket/_/run"  # 'remote_dir=gs://bucket/${run_dir}' of an absolute one
    assert place_of("gs://bucket/../run") == "gs/bucket/../run"


def test_processes_that_differ_are_told_so_without_passwords() -> None:
    """Hide passwords before facts are exchanged, printed and hashed; a renewed password is not another run."""
    facts = [facts_of_process({"data": {"shards": f"http://user:{word}@host/x"}}) for word in ("secret", "renewed")]
    assert facts[0] == facts[1]
    assert facts[0]["data.shards"] == "'http://***@host/x'"
