"""Where calls go: URLs, keys and headers, and what an endpoint's list of models says."""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, urlsplit

import httpx2

from service.core.errors import CannotRun, NotReachable, WrongSettings
from service.settings import EndpointSettings, ExtractionSettings, legal_headers, legal_url

DEFAULT_BASE_URL = "https://api.openai.com/v1"
"""Where calls go when OPENAI_BASE_URL is not set."""
NO_KEY = "none"
"""Sent to an endpoint of one's own when no key is set: many need none, the SDK insists."""
KEY_LOOK_S = 1.0
"""How often a key's file is looked at (its time of change, not its content)."""
SECRET_MIN_BYTES = 8
"""A shorter key may be a word, which is left where it stands."""
LISTED_MAX = 10
"""Models that a sentence names of those that an endpoint lists."""


class Key:
    """A key, or the file that holds it: tokens of Entra, Vertex or Bedrock live for an hour."""

    def __init__(self, origin: str, value: str = NO_KEY, file: Path | None = None) -> None:
        """`origin` is what sentences call it. Raises `WrongSettings` for a file without a key."""
        self.origin, self._file = origin, file
        self._stamp: tuple[int, int, int] | None = None
        self._looked_s = float("-inf")
        self._known: tuple[str, ...] = (value,)
        if file is not None:
            self._stamp = _stamp(file)
            self._known = (_read_key(file, origin),)

    @property
    def is_fixed(self) -> bool:
        return self._file is None

    @property
    def value(self) -> str:
        return self._known[-1]

    @property
    def secrets(self) -> tuple[bytes, ...]:
        """All keys that may be echoed: the present one and the one before."""
        return tuple(key.encode() for key in self._known)

    def changed(self, *, refused: str | None = None) -> bool:
        """Whether the file holds another key now than before. It is looked at once a second, and
        at once when the endpoint has refused the key `refused`."""
        if self._file is None:
            return False
        if refused is not None and refused != self.value:
            return True  # another call has read it anew
        now_s = time.monotonic()
        if refused is None and now_s - self._looked_s < KEY_LOOK_S:
            return False
        self._looked_s = now_s
        stamp = _stamp(self._file)
        if refused is None and stamp == self._stamp:
            return False
        try:
            key = _read_key(self._file, self.origin)
        except WrongSettings:
            return False  # it is being written; the old key counts until there is a new one
        self._stamp = stamp
        if key == self.value:
            return False
        self._known = (self.value, key)
        return True


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _read_key(file: Path, origin: str) -> str:
    try:
        key = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise WrongSettings(f"{origin}: {str(file)!r} cannot be read ({why}).") from None
    if not key or not key.isascii() or not key.isprintable():
        raise WrongSettings(f"{origin}: {str(file)!r} holds no key, or more than one line.")
    return key


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place that models are asked at. `setting` is what names its URL, for sentences."""

    base_url: str
    """Without its query, which may hold a key."""
    key: Key
    setting: str = "OPENAI_BASE_URL"
    query: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What goes behind each path: a version, perhaps a key."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    hidden: tuple[bytes, ...] = field(default=(), repr=False)
    """Values of headers that are secrets."""

    def scrubbed(self, content: bytes) -> bytes:
        """Without our secrets, which some servers repeat in what they say."""
        for secret in (*self.key.secrets, *self.hidden):
            if len(secret) >= SECRET_MIN_BYTES and secret in content:
                content = content.replace(secret, b"[" + self.key.origin.encode() + b"]")
        return content


def main_endpoint(extraction: ExtractionSettings) -> Endpoint:
    """That of the environment, from where the SDK takes it. Raises `WrongSettings`, `CannotRun`."""
    _usable_proxies()
    _usable_certificates()
    base_url = os.environ.get("OPENAI_BASE_URL", "").strip() or DEFAULT_BASE_URL
    further = _further_headers(extraction.headers_file)
    made = _endpoint(base_url, _main_key(base_url), "OPENAI_BASE_URL")
    return replace(
        made,
        headers={**made.headers, **extraction.headers, **further},
        hidden=tuple(value.encode() for value in further.values()),
    )


def endpoint_of(model: str, given: EndpointSettings) -> Endpoint:
    """A model's own, which gets nothing that was meant for the main one."""
    setting = f"extraction.endpoints.{model}"
    origin = f"{setting}.key_file"
    key = Key(origin) if given.key_file is None else Key(origin, file=given.key_file)
    return _endpoint(given.base_url, key, f"{setting}.base_url")


def _endpoint(base_url: str, key: Key, setting: str) -> Endpoint:
    try:
        url = urlsplit(legal_url(base_url))
    except ValueError as error:
        raise WrongSettings(f"{setting}: {error}.") from None
    if url.path.rstrip("/").endswith("/chat/completions"):
        raise WrongSettings(
            f"{setting}: leave /chat/completions away from its end; it is added for each call."
        )
    # The SDK would put the path of a call behind the query.
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    return Endpoint(shown(base_url), key, setting, query, _azure_header(url, key))


def shown(base_url: str) -> str:
    """The URL without its query, which may hold a key."""
    return urlsplit(base_url)._replace(query="", fragment="").geturl()


def _azure_header(url: SplitResult, key: Key) -> dict[str, str]:
    """Azure's URL of one deployment takes a key in a header of its own; what a file holds there is
    a token of Entra, which goes where it always does."""
    if key.is_fixed and key.value != NO_KEY and _is_classic_azure(url):
        return {"api-key": key.value}
    return {}


def _main_key(base_url: str) -> Key:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    file = os.environ.get("OPENAI_API_KEY_FILE", "").strip()
    if key and file:
        raise WrongSettings("OPENAI_API_KEY_FILE: set it or OPENAI_API_KEY, not both.")
    if file:
        return Key("OPENAI_API_KEY_FILE", file=Path(file))
    if not key.isascii() or not key.isprintable():
        raise WrongSettings("OPENAI_API_KEY: it holds characters that no key has; set it anew.")
    if not key and shown(base_url) == DEFAULT_BASE_URL:
        raise CannotRun(
            "OPENAI_API_KEY is not set: set it to a key for api.openai.com, or set "
            "OPENAI_BASE_URL to an endpoint of your own."
        )
    return Key("OPENAI_API_KEY", key or NO_KEY)


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


def _further_headers(file: Path | None) -> dict[str, str]:
    if file is None:
        return {}
    place = "extraction.headers_file"
    try:
        headers = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise WrongSettings(f"{place}: {str(file)!r} cannot be read ({error.strerror}).") from None
    except ValueError:
        raise WrongSettings(f"{place}: {str(file)!r} is no JSON.") from None
    match headers:
        case dict() if all(isinstance(value, str) for value in headers.values()):
            pass
        case _:
            raise WrongSettings(
                f"{place}: {str(file)!r} must hold one object of names and texts, as in "
                '{"x-gateway-key": "…"}.'
            )
    try:
        return legal_headers(headers)
    except ValueError as error:
        # Its sentences name a header, and never repeat a value.
        raise WrongSettings(f"{place}: {error}.") from None


# --- what it lists ------------------------------------------------------------------------------


def listed_models(response: httpx2.Response) -> list[str] | None:
    """Names in the order of the list; None where it is none as OpenAI's."""
    try:
        return [str(row["id"]) for row in response.json()["data"]]
    except (ValueError, TypeError, KeyError):
        return None


def only_model(endpoint: Endpoint, names: Sequence[str] | None) -> str:
    """The model to ask where none is named. Raises `WrongSettings` unless it is the only one."""
    if names is not None and len(names) == 1:
        return names[0]
    name_it = "extraction.model is not set: set it (SLUICE_EXTRACTION__MODEL) to a model that"
    if not names:
        raise WrongSettings(f"{name_it} {endpoint.base_url} has; it does not list its models.")
    more = f" and {len(names) - LISTED_MAX} more" if len(names) > LISTED_MAX else ""
    raise WrongSettings(
        f"{name_it} {endpoint.base_url} has: {', '.join(names[:LISTED_MAX])}{more}."
    )


def missing_models(
    endpoint: Endpoint, models: Iterable[str], names: Sequence[str] | None
) -> str | None:
    """A warning where the endpoint's list lacks one of `models`."""
    if names is None:
        return f"{endpoint.base_url} does not list its models as OpenAI does."
    missing = [repr(model) for model in models if model not in names]
    if not missing:
        return None
    some = ", ".join(names[:5]) or "none"
    what = "the model" if len(missing) == 1 else "the models"
    return f"{endpoint.base_url} does not list {what} {', '.join(missing)}; it has: {some}."


def unlisted(endpoint: Endpoint, status: int) -> str:
    """What a refused list of models means: a warning, or `CannotRun`."""
    place = endpoint.base_url
    if status == 401:
        raise CannotRun(
            f"{place} refuses the credentials: set {endpoint.key.origin} to a key it knows."
        )
    if status >= 500:
        raise NotReachable(f"{place} answers {status}: the model endpoint is not well.")
    return f"{place} does not list its models ({status}); calls may work all the same."
