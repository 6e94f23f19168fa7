"""From the security settings to the client's options: SASL, TLS and the files with secrets."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

from aiokafka.abc import AbstractTokenProvider

from service.core.errors import WrongSettings
from service.settings import SecuritySettings


class TokenFile(AbstractTokenProvider):  # type: ignore[misc]
    """Hands out the token in a file, read anew at each connection: whoever renews it, writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def token(self) -> str:
        """The token; raises `OSError`, which the client takes for a failed connection."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> str:
        return self._path.read_text(encoding="utf-8").strip()


def sasl_options(security: SecuritySettings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "sasl_mechanism": security.sasl_mechanism or "PLAIN",
        "sasl_plain_username": None,
        "sasl_plain_password": None,
        "sasl_oauth_token_provider": None,
    }
    if security.protocol.startswith("SASL_"):
        if security.sasl_mechanism == "OAUTHBEARER":
            options["sasl_oauth_token_provider"] = _token_provider(security)
        else:
            options["sasl_plain_username"] = security.username
            options["sasl_plain_password"] = _password(security)
    return options


def _token_provider(security: SecuritySettings) -> TokenFile:
    assert security.token_file is not None, "the settings see to it"
    _secret(security.token_file, "kafka.security.token_file")
    return TokenFile(security.token_file)


def _password(security: SecuritySettings) -> str:
    if security.password is not None:
        return security.password.get_secret_value()
    assert security.password_file is not None, "the settings see to it"
    return _secret(security.password_file, "kafka.security.password_file")


def _secret(path: Path, name: str) -> str:
    """A file's text without the line end that editors add; raises `WrongSettings`."""
    try:
        text = path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(name, path, error) from error
    if not text:
        raise WrongSettings(f"{name}: {path} is empty.")
    return text


def _unreadable(name: str, path: Path, error: Exception) -> WrongSettings:
    why = (error.strerror or "no such file") if isinstance(error, OSError) else "it is no text"
    return WrongSettings(f"{name}: {path} cannot be read: {why}.")


def ssl_context(security: SecuritySettings) -> ssl.SSLContext | None:
    if not security.protocol.endswith("SSL"):
        return None
    context = ssl.create_default_context()
    if security.ca_file is not None:
        context = _trusting(security.ca_file)
    context.check_hostname = security.check_hostname
    if security.certificate_file is not None:
        _present(context, security, security.certificate_file)
    return context


def _trusting(ca_file: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except ssl.SSLError as error:
        raise WrongSettings(f"kafka.security.ca_file: {ca_file} holds no certificates.") from error
    except OSError as error:
        raise _unreadable("kafka.security.ca_file", ca_file, error) from error


def _present(context: ssl.SSLContext, security: SecuritySettings, certificate: Path) -> None:
    """Our own certificate, for brokers that ask for one."""
    password = ""
    if security.key_password_file is not None:
        password = _secret(security.key_password_file, "kafka.security.key_password_file")
    try:
        # Without a password to ask for, OpenSSL would ask the terminal.
        context.load_cert_chain(certificate, security.key_file, lambda: password)
    except ssl.SSLError as error:
        raise WrongSettings(
            f"kafka.security.certificate_file: {certificate} and its key do not fit together, "
            "are no PEM, or the key's password (key_password_file) is wrong."
        ) from error
    except OSError as error:
        raise _unreadable("kafka.security.certificate_file or key_file", certificate, error) from (
            error
        )
