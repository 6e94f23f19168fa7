"""From settings to a Kafka client."""

import asyncio
import shlex
import ssl
import subprocess
from pathlib import Path

import pytest
from aiokafka import errors
from pydantic import SecretStr

from service.core.errors import CannotRun, WrongSettings
from service.kafka.client.connection import client_options, reach
from service.kafka.client.credentials import TokenFile
from service.kafka.client.deadlines import within
from service.kafka.client.meaning import is_lasting, stop_for
from service.settings import KafkaSettings, SecuritySettings
from tests.support.kafka import free_ports


def kafka(**security: object) -> KafkaSettings:
    return KafkaSettings(security=SecuritySettings(**security))  # type: ignore[arg-type]


def test_plaintext_has_neither_tls_nor_credentials() -> None:
    """Without security settings nothing secret is built."""
    options = client_options(KafkaSettings(bootstrap_servers="a:1", request_timeout_s=2))

    assert options["bootstrap_servers"] == "a:1"
    assert options["request_timeout_ms"] == 2000
    assert options["ssl_context"] is None
    assert options["sasl_plain_password"] is None


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_a_password_comes_from_the_settings_or_from_a_file(mechanism: str, tmp_path: Path) -> None:
    """Both ways give the same credentials; a file's last line end is no part of it."""
    file = tmp_path / "password"
    file.write_text("s3 cret\n")
    login = {"protocol": "SASL_PLAINTEXT", "sasl_mechanism": mechanism, "username": "u"}

    given = client_options(kafka(**login, password=SecretStr("s3 cret")))
    read = client_options(kafka(**login, password_file=file))

    for options in (given, read):
        assert options["sasl_mechanism"] == mechanism
        assert options["sasl_plain_username"] == "u"
        assert options["sasl_plain_password"] == "s3 cret"


@pytest.mark.parametrize(
    ("login", "sentence"),
    [
        ({"username": "u", "password_file": Path("/nowhere")}, "password_file: /nowhere cannot"),
        (
            {"sasl_mechanism": "OAUTHBEARER", "token_file": Path("/nowhere")},
            "token_file: /nowhere cannot be read",
        ),
    ],
)
def test_an_unreadable_secret_is_a_sentence(login: dict[str, object], sentence: str) -> None:
    """Which file it is, before anything is sent."""
    with pytest.raises(WrongSettings, match=sentence):
        client_options(kafka(**{"protocol": "SASL_SSL", "sasl_mechanism": "PLAIN", **login}))


def test_an_empty_password_file_is_a_sentence(tmp_path: Path) -> None:
    """A secret that was mounted empty is found at the start, not as refused credentials."""
    (tmp_path / "password").write_text("\n")
    with pytest.raises(WrongSettings, match="is empty"):
        client_options(
            kafka(
                protocol="SASL_SSL",
                sasl_mechanism="PLAIN",
                username="u",
                password_file=tmp_path / "password",
            )
        )


async def test_a_token_is_read_anew_at_each_connection(tmp_path: Path) -> None:
    """A renewed token is used without a restart."""
    file = tmp_path / "token"
    file.write_text("first\n")
    provider = client_options(
        kafka(protocol="SASL_SSL", sasl_mechanism="OAUTHBEARER", token_file=file)
    )["sasl_oauth_token_provider"]

    assert isinstance(provider, TokenFile)
    assert await provider.token() == "first"
    file.write_text("second")
    assert await provider.token() == "second"


def test_tls_checks_certificate_and_host() -> None:
    """TLS without further settings trusts the system's certificates and checks the name."""
    context = client_options(kafka(protocol="SSL"))["ssl_context"]

    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_only_the_host_name_can_be_left_unchecked() -> None:
    """`check_hostname: false` still checks who signed the certificate."""
    context = client_options(kafka(protocol="SSL", check_hostname=False))["ssl_context"]

    assert context.verify_mode is ssl.CERT_REQUIRED
    assert not context.check_hostname


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cert.pem and the key.pem behind the password `open sesame`."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -days 2 -subj /CN=sluice"
    command += " -passout pass:open_sesame -keyout key.pem -out cert.pem"
    subprocess.run(shlex.split(command), cwd=folder, check=True, capture_output=True)
    return folder


def test_a_client_certificate_with_an_encrypted_key(certificate: Path, tmp_path: Path) -> None:
    """The key's password comes from a file; a wrong or missing one is a sentence, no prompt."""
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text("open_sesame\n")
    wrong.write_text("please\n")
    own = {
        "protocol": "SSL",
        "ca_file": certificate / "cert.pem",
        "certificate_file": certificate / "cert.pem",
        "key_file": certificate / "key.pem",
    }

    context = client_options(kafka(**own, key_password_file=right))["ssl_context"]
    assert len(context.get_ca_certs()) == 1

    for missing_or_wrong in ({}, {"key_password_file": wrong}):
        with pytest.raises(WrongSettings, match="do not fit together"):
            client_options(kafka(**own, **missing_or_wrong))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"ca_file": Path("/nowhere")}, "ca_file: /nowhere cannot be read"),
        ({"ca_file": Path(__file__)}, "ca_file: .* holds no certificates"),
        ({"certificate_file": Path("/nowhere")}, "certificate_file or key_file: /nowhere cannot"),
    ],
)
def test_a_wrong_tls_file_is_a_sentence(files: dict[str, object], sentence: str) -> None:
    """Which file, and what is the matter with it."""
    with pytest.raises(WrongSettings, match=sentence):
        client_options(kafka(protocol="SSL", **files))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.TopicAuthorizationFailedError("in"), "use topic in: give it READ"),
        (errors.TopicAuthorizationFailedError({"b", "a"}), "use topic a, b:"),
        (errors.GroupAuthorizationFailedError("g"), "use the group sluice"),
        (errors.TransactionalIdAuthorizationFailed("x"), "begin with sluice-sluice:"),
        (errors.InvalidTransactionTimeout(), "transaction.max.timeout.ms"),
        (errors.SaslAuthenticationFailed(), "localhost:9092 refused the credentials"),
        (errors.UnknownTopicOrPartitionError(), "sluice topics create"),
        (ssl.SSLCertVerificationError(), "ca_file"),
        (ConnectionRefusedError(), "No Kafka broker answers at localhost:9092"),
        (TimeoutError(), "No Kafka broker answers at localhost:9092"),
    ],
)
def test_an_error_of_the_client_becomes_a_sentence(error: Exception, words: str) -> None:
    """What, where, what to do."""
    stop = stop_for(error, KafkaSettings())

    assert isinstance(stop, CannotRun)
    assert words in str(stop)


def test_what_waiting_mends_is_told_from_what_it_does_not() -> None:
    """A broker that is away comes back; a missing permission does not."""
    assert is_lasting(errors.GroupAuthorizationFailedError("g"))
    assert not is_lasting(errors.KafkaConnectionError())
    assert not is_lasting(errors.NotCoordinatorForGroupError())


async def test_nobody_at_the_address_is_a_sentence() -> None:
    """Each address is tried; the sentence names them all."""
    first, second = free_ports(2)
    servers = f"127.0.0.1:{first},127.0.0.1:{second}"

    with pytest.raises(CannotRun, match=f"No Kafka broker answers at {servers}"):
        await reach(KafkaSettings(bootstrap_servers=servers))


async def test_a_broker_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An open port without a Kafka behind it does not hold the start up for good."""
    monkeypatch.setattr("service.kafka.client.connection.REACH_S", 0.2)
    ended = asyncio.Event()

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ended.wait()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        with pytest.raises(CannotRun, match="No Kafka broker answers"):
            await reach(KafkaSettings(bootstrap_servers=f"127.0.0.1:{port}"))
    finally:
        ended.set()
        server.close()


async def test_a_deadline_cancels_what_it_waits_for() -> None:
    """Nothing goes on behind a deadline's back."""
    cancelled = False

    async def endless() -> None:
        nonlocal cancelled
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled = True
            raise

    with pytest.raises(TimeoutError):
        await within(0.01, endless())
    assert cancelled
