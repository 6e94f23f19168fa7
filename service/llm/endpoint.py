"""Where calls go: the URL and the key from the environment, and what its list of models says."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from urllib.parse import SplitResult, parse_qsl, urlsplit

import httpx2

from service.core.errors import CannotRun, NotReachable, WrongSettings

DEFAULT_BASE_URL = "https://api.openai.com/v1"
"""Where calls go when OPENAI_BASE_URL is not set."""
_NO_KEY = "none"
"""Sent to an endpoint of one's own when no key is set: many need none, the SDK insists."""


class Place(NamedTuple):
    """Where calls go, and with what. `query` goes behind each path: a version, perhaps a key."""

    base_url: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]


def endpoint() -> Place:
    """Base URL and key, from where the SDK takes them. Raises `WrongSettings`, `CannotRun`."""
    _usable_proxies()
    _usable_certificates()
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
    if not key and shown(base_url) == DEFAULT_BASE_URL:
        raise CannotRun(
            "OPENAI_API_KEY is not set: set it to a key for api.openai.com, or set "
            "OPENAI_BASE_URL to an endpoint of your own."
        )
    if url.path.rstrip("/").endswith("/chat/completions"):
        raise WrongSettings(
            "OPENAI_BASE_URL: leave /chat/completions away from its end; it is added for each call."
        )
    # The SDK would put the path of a call behind the query.
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    headers = {"api-key": key} if key and _is_classic_azure(url) else {}
    return Place(shown(base_url), key or _NO_KEY, query, headers)


def _is_classic_azure(url: SplitResult) -> bool:
    """Azure's URL of one deployment, which takes a key in a header of its own."""
    return "/openai/deployments/" in url.path and (url.hostname or "").endswith(
        (".azure.com", ".azure.us", ".azure.cn")
    )


def _usable_proxies() -> None:
    """What the HTTP client could not use would end a run with a traceback."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        for variable in (name, name.lower()):
            proxy = os.environ.get(variable, "").strip()
            if proxy and not _is_proxy(proxy):
                raise WrongSettings(
                    f"{variable}: a proxy must be given as http://host:port or https://host:port "
                    "(others, socks among them, are not supported); correct or unset it."
                )


def _is_proxy(proxy: str) -> bool:
    try:
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        return url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
    except ValueError:  # a port that is no number
        return False


def _usable_certificates() -> None:
    for variable, exists in (("SSL_CERT_FILE", os.path.isfile), ("SSL_CERT_DIR", os.path.isdir)):
        path = os.environ.get(variable, "").strip()
        if path and not exists(path):
            raise WrongSettings(f"{variable}: there is no {path!r}: correct or unset it.")
    file = os.environ.get("SSL_CERT_FILE", "").strip()
    if not file:
        return
    try:
        ssl.create_default_context(cafile=file)
    except (ssl.SSLError, OSError):
        raise WrongSettings(f"SSL_CERT_FILE: {file!r} holds no certificates in PEM.") from None


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
