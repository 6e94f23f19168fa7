"""Where calls go: the URL and the key from the environment, and what its list of models says."""

from __future__ import annotations

import os
from collections.abc import Iterable
from urllib.parse import urlsplit

import httpx2

from service.core.errors import CannotRun, NotReachable, WrongSettings

DEFAULT_BASE_URL = "https://api.openai.com/v1"
"""Where calls go when OPENAI_BASE_URL is not set."""
_NO_KEY = "none"
"""Sent to an endpoint of one's own when no key is set: many need none, the SDK insists."""


def endpoint() -> tuple[str, str]:
    """Base URL and key, from where the SDK takes them."""
    base_url = os.environ.get("OPENAI_BASE_URL", "").strip() or DEFAULT_BASE_URL
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    url = urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise WrongSettings(
            "OPENAI_BASE_URL: it must start with http:// or https:// and name a host, "
            "as in http://localhost:8000/v1."
        )
    if url.username is not None or url.password is not None:
        raise WrongSettings(
            "OPENAI_BASE_URL: it must hold no user and no password; keys go into OPENAI_API_KEY."
        )
    if not key.isascii() or not key.isprintable():
        raise WrongSettings("OPENAI_API_KEY: it holds characters that no key has; set it anew.")
    if not key and base_url == DEFAULT_BASE_URL:
        raise CannotRun(
            "OPENAI_API_KEY is not set: set it to a key for api.openai.com, or set "
            "OPENAI_BASE_URL to an endpoint of your own."
        )
    return base_url, key or _NO_KEY


def shown(base_url: str) -> str:
    """The URL without its query, which may hold a key."""
    return urlsplit(base_url)._replace(query="", fragment="").geturl()


def missing_models(place: str, models: Iterable[str], response: httpx2.Response) -> str | None:
    """A warning where the endpoint's list lacks one of `models`."""
    try:
        names = [str(row["id"]) for row in response.json()["data"]]
    except (ValueError, TypeError, KeyError):
        return f"{place} does not list its models as OpenAI does."
    missing = [repr(model) for model in models if model not in names]
    if not missing:
        return None
    some = ", ".join(names[:5]) or "none"
    what = "the model" if len(missing) == 1 else "the models"
    return f"{place} does not list {what} {', '.join(missing)}; it has: {some}."


def unlisted(place: str, status: int) -> str:
    """What a refused list of models means: a warning, or `CannotRun`."""
    if status == 401:
        raise CannotRun(f"{place} refuses the credentials: set OPENAI_API_KEY to a key it knows.")
    if status >= 500:
        raise NotReachable(f"{place} answers {status}: the model endpoint is not well.")
    return f"{place} does not list its models ({status}); calls may work all the same."
