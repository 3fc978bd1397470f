"""Hide the passwords, tokens and signatures of URLs before a text is shown, logged or written.

The name of a parameter does not show whether its value is secret, so everything that may be secret is hidden: the part
before the ``@`` of a host, and the value of every parameter.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

MARK = "***"  # replaces a secret

_SCHEME = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*:/+")  # a URL that became a Path has one slash
_IN_TEXT = re.compile(rf"({_SCHEME.pattern})([^\s'\"]+)")  # the end is a guess: the URL may be in quotes
# The second form is for a password that contains a slash, which should have been written as %2F.
_LOGIN = re.compile(r"[^/?#]*@|[^/?#:\[]*:(?!\d*(?:[/?#]|$)).*@", re.DOTALL)
_PARAMETER = re.compile(r"(?P<name>[?&;#][^=&;#]*)=(?P<value>[^&;#]+)")
_NAMELESS = re.compile(r"\?(?P<value>[^=&;#]+)(?=$|[&;#])")
_HEADER = re.compile(r"(?i)(authorization\W{1,8}(?:basic|bearer)\s+)[\w+/=.~-]+")
_SECRET_NAME = re.compile(r"(?i)sig|token|key|secret|pass|pwd|auth|cred|code|policy")
_SHORTEST = 6  # characters of a secret that is hidden anywhere in a text: shorter ones may be parts of words


def redacted(text: str) -> str:
    """Return a text without the secrets of the URLs in it. A text without URLs is unchanged."""
    if ":/" in text:
        text = _IN_TEXT.sub(lambda url: url[1] + _redacted_rest(url[2]), text)
    return _HEADER.sub(rf"\1{MARK}", text) if "uthorization" in text else text


def redacted_config(value: Any) -> Any:
    """Return a config, or any JSON value, without the secrets of the URLs in it."""
    if isinstance(value, str):
        scheme = _SCHEME.match(value)
        return scheme[0] + _redacted_rest(value[scheme.end() :]) if scheme else redacted(value)
    if isinstance(value, Mapping):
        return {redacted_config(key): redacted_config(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted_config(part) for part in value)
    return value


def is_redacted(url: str) -> bool:
    """Return whether a URL has lost its secrets to `redacted`, so that it cannot be opened."""
    return MARK in url and redacted_config(url) == url


def secrets_in(value: Any) -> frozenset[str]:
    """Return the secrets of the URLs in a config, or in any JSON value, both as typed and with ``%xx`` decoded.

    Libraries quote parts of a URL in their errors; `hidden` removes these secrets there. Very short secrets are left
    out.
    """
    found = {secret for text in _texts(value) for secret in _secrets_of(text)}
    return frozenset(form for secret in found for form in (secret, unquote(secret)) if len(form) >= _SHORTEST)


def hidden(text: str, secrets: frozenset[str]) -> str:
    """Return a text after `redacted`, with these secrets replaced wherever they occur."""
    text = redacted(text)
    for secret in sorted(secrets, key=len, reverse=True):  # longest first: one secret may contain another
        text = text.replace(secret, MARK)
    return text


def place_of(url: str) -> str:
    """Return protocol, host and path of a URL as a relative path without secrets, such as ``s3/bucket/run``.

    The path is untrusted: check it with `core.names`. An empty part, as in ``s3://bucket//run``, becomes ``_``.
    """
    scheme, _, rest = url.partition("://")
    login = _LOGIN.match(rest)
    rest = re.split(r"[?#]", rest[login.end() :] if login else rest, maxsplit=1)[0]
    return "/".join([scheme, *(part or "_" for part in rest.rstrip("/").split("/"))])


def _redacted_rest(rest: str) -> str:
    login = _LOGIN.match(rest)
    start, rest = (f"{MARK}@", rest[login.end() :]) if login else ("", rest)
    return start + _NAMELESS.sub(f"?{MARK}", _PARAMETER.sub(rf"\g<name>={MARK}", rest))


def _secrets_of(text: str) -> Iterator[str]:
    """Yield the password of each URL (or a login that is a single token), and parameters named like secrets."""
    scheme = _SCHEME.match(text)
    for rest in [text[scheme.end() :]] if scheme else [url[2] for url in _IN_TEXT.finditer(text)]:
        login = _LOGIN.match(rest)
        if login is not None:
            user, colon, password = login[0][:-1].partition(":")
            yield password if colon else user
        parameters = rest[login.end() :] if login else rest
        yield from (found["value"] for found in _PARAMETER.finditer(parameters) if _SECRET_NAME.search(found["name"]))
        yield from (found["value"] for found in _NAMELESS.finditer(parameters))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for item in value.items() for part in item for text in _texts(part))
    elif isinstance(value, list | tuple):
        yield from (text for part in value for text in _texts(part))
