"""Where calls go: what the environment says, and what is wrong with it, in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.core.errors import WrongSettings
from service.llm.endpoint import Endpoint, main_endpoint
from service.settings import ExtractionSettings

AZURE = "https://me.openai.azure.com/openai/deployments/small"


def endpoint() -> Endpoint:
    """That of the environment, with settings that say nothing of it."""
    return main_endpoint(ExtractionSettings())


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.mark.parametrize(
    ("url", "base_url", "query", "headers"),
    [
        ("http://localhost/v1", "http://localhost/v1", {}, {}),
        ("http://h/v1?a=1&b=", "http://h/v1", {"a": "1", "b": ""}, {}),
        (f"{AZURE}?api-version=1", AZURE, {"api-version": "1"}, {"api-key": "sk-1"}),
        (
            "https://me.openai.azure.com/openai/v1/",
            "https://me.openai.azure.com/openai/v1/",
            {},
            {},
        ),
        ("https://h/openai/deployments/small", "https://h/openai/deployments/small", {}, {}),
    ],
)
def test_an_address_is_taken_apart(
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    base_url: str,
    query: dict[str, str],
    headers: dict[str, str],
) -> None:
    """The query goes behind each path; Azure's older address takes the key in its own header."""
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    found = endpoint()
    assert (found.base_url, found.key.value) == (base_url, "sk-1")
    assert (found.query, found.headers) == (query, headers)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks://127.0.0.1:1080"),
        ("all_proxy", "socks5h://127.0.0.1:1080"),
        ("HTTPS_PROXY", "ftp://proxy:21"),
        ("https_proxy", "http://proxy:port"),
        ("HTTP_PROXY", "http://"),
        ("SSL_CERT_FILE", "/nope"),
        ("SSL_CERT_FILE", __file__),
        ("SSL_CERT_DIR", "/nope"),
        ("OPENAI_BASE_URL", f"{AZURE}/chat/completions?api-version=1"),
        ("OPENAI_BASE_URL", "localhost:8000/v1"),
    ],
)
def test_what_cannot_be_used_is_a_sentence_that_names_it(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """No traceback, and no AttributeError when the first call is made."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(WrongSettings, match=f"^{variable}: .*\\.$"):
        endpoint()


@pytest.mark.parametrize("proxy", ["http://proxy:3128", "https://u:p@proxy", "proxy:3128", ""])
def test_a_proxy_that_can_be_used(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    """As most tools take it."""
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    monkeypatch.setenv("SSL_CERT_DIR", str(Path(__file__).parent))
    assert endpoint().key.value == "sk-1"
