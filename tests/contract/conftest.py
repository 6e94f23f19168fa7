"""What tests of the extractor share: a scripted endpoint, and certificates read once."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator

import httpx2
import pytest

from tests.support.endpoint import Endpoint

_tls = functools.cache(httpx2.create_ssl_context)


@pytest.fixture
def certificates_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client would read the system's certificates anew, a tenth of a second each."""
    monkeypatch.setattr(httpx2, "create_ssl_context", _tls)


@pytest.fixture
async def endpoint(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Endpoint]:
    """Where calls go, without a key."""
    async with Endpoint() as serving:
        monkeypatch.setenv("OPENAI_BASE_URL", serving.url)
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        yield serving
