"""Settings: where they come from, what is refused, and how that is said."""

import json
import os
from pathlib import Path

import pytest

from service.core.errors import WrongSettings
from service.settings import Settings, warnings
from service.settings.reading import load
from service.settings.wording import table

CANARY = "canary-5c1f"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(environ: dict[str, str] | None = None, text: str | None = None) -> list[str]:
    """The lines of the refusal that `environ` and the YAML `text` earn."""
    file = None
    if text is not None:
        file = Path("given.yaml")
        file.write_text(text, encoding="utf-8")
    with pytest.raises(WrongSettings) as caught:
        load(file, environ or {})
    # Nothing is chained that a traceback would show: pydantic's error holds what was given.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value).splitlines()


def variables(**settings: str) -> dict[str, str]:
    return {"SLUICE_" + name.upper(): value for name, value in settings.items()}


SASL = {
    "kafka__security__protocol": "SASL_SSL",
    "kafka__security__sasl_mechanism": "PLAIN",
    "kafka__security__username": "ann",
    "kafka__security__password": CANARY,
}


# --- sources ---


def test_nothing_is_needed() -> None:
    """Without a file and variables the defaults hold, and none of them earns a warning."""
    settings = load(None, {})
    assert settings == Settings()
    assert warnings(settings) == ()


def test_environment_wins_setting_by_setting() -> None:
    """A variable replaces one setting of the file and leaves its neighbours alone."""
    file = Path("some.yaml")
    file.write_text("kafka: {group_id: file, client_id: file, security: {protocol: SSL}}\n")
    environ = variables(kafka__group_id="variable", kafka__security__ca_file="/ca.pem")
    kafka = load(file, environ).kafka
    assert (kafka.group_id, kafka.client_id) == ("variable", "file")
    assert ("SSL", Path("/ca.pem")) == (kafka.security.protocol, kafka.security.ca_file)


def test_default_file_is_read_where_it_lies(folder: Path) -> None:
    """sluice.yaml in the working folder is read without being named."""
    (folder / "sluice.yaml").write_text("output: {topic: from-default}\n")
    assert load(None, {}).output.topic == "from-default"


def test_named_file_replaces_the_default_one(folder: Path) -> None:
    """With --config the file in the working folder plays no part."""
    (folder / "sluice.yaml").write_text("output: {topic: from-default}\n")
    (folder / "other.yaml").write_text("dead_letters: {topic: from-other}\n")
    settings = load(Path("other.yaml"), {})
    assert (settings.output.topic, settings.dead_letters.topic) == ("records", "from-other")


def test_process_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is passed in counts: the process's own variables do not leak into a value."""
    monkeypatch.setenv("SLUICE_OUTPUT__TOPIC", "leaked")
    assert "records" == Settings().output.topic == load(None, {}).output.topic


@pytest.mark.parametrize(
    ("text", "topics"), [("a", ("a",)), ("a,b", ("a", "b")), (" a , b, ", ("a", "b"))]
)
def test_topics_from_a_variable(text: str, topics: tuple[str, ...]) -> None:
    """SLUICE_INPUT__TOPICS takes one name or a comma-separated list."""
    assert load(None, variables(input__topics=text)).input.topics == topics


def test_models_and_prices_from_variables() -> None:
    """Models in their order, separated by commas; prices as JSON."""
    prices = '{"large": {"input": 2, "cached": 1, "output": 8}, "a/b.c": {"input": 0, "output": 0}}'
    loaded = load(None, variables(extraction__model="small, large", prices=prices))
    assert loaded.extraction.model == ("small", "large")
    assert loaded.prices["large"].output == 8
    assert loaded.prices["a/b.c"].cached is None


@pytest.mark.parametrize("yaml", ["[a, b]", "'a, b'"])
def test_topics_from_the_file(yaml: str) -> None:
    """The file takes a list, and the same text as the variable."""
    file = Path("some.yaml")
    file.write_text(f"input: {{topics: {yaml}}}")
    assert load(file, {}).input.topics == ("a", "b")


def test_examples_from_a_variable_are_json() -> None:
    """Few-shot examples fit into one variable."""
    examples = [{"text": "Ann is 5.", "records": {"name": "Ann", "age": 5}}]
    (example,) = load(
        None, variables(extraction__examples=json.dumps(examples))
    ).extraction.examples
    assert (example.text, example.records) == ("Ann is 5.", {"name": "Ann", "age": 5})


def test_empty_variable_counts_as_not_set() -> None:
    """Compose files pass empty variables for what was not set: they change nothing."""
    assert load(None, variables(limits__window="", output__topic="")) == Settings()


def test_empty_section_counts_as_not_there() -> None:
    """A section whose settings are all commented out keeps the defaults."""
    file = Path("some.yaml")
    file.write_text("# all by default\nkafka:\n  # group_id: x\n  security:\nlimits:\n")
    assert load(file, {}) == Settings()


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_empty_file_is_fine(text: str) -> None:
    """A file with nothing in it sets nothing."""
    file = Path("some.yaml")
    file.write_text(text)
    assert load(file, {}) == Settings()


@pytest.mark.parametrize("text", ["2026-01-31T08:00:00+02:00", "2026-01-31T06:00:00Z"])
def test_start_as_a_time(text: str) -> None:
    """A time with its offset is the same from the file and from a variable."""
    file = Path("some.yaml")
    file.write_text(f"input: {{start: {text}}}")
    assert load(file, {}).input.start == load(None, variables(input__start=text)).input.start
    assert load(file, {}).input.start.timestamp() == 1769839200  # type: ignore[union-attr]


def test_password_from_the_environment_stays_hidden() -> None:
    """The password arrives and no repr shows it."""
    settings = load(None, variables(**SASL))
    password = settings.kafka.security.password
    assert password is not None
    assert password.get_secret_value() == CANARY
    assert CANARY not in repr(settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLUICE_SERVICE_HOST", "10.0.0.1"),
        ("SLUICE_SERVICE_PORT_METRICS", "9100"),
        ("SLUICE_PORT", "tcp://10.0.0.1:9100"),
        ("SLUICE_PORT_9100_TCP_ADDR", "10.0.0.1"),
        ("SLUICE_DEMO_SERVICE_PORT", "9100"),
    ],
)
def test_variables_of_kubernetes_are_let_be(name: str, value: str) -> None:
    """Kubernetes sets these beside a Service called sluice; they are nobody's typo."""
    assert load(None, {name: value}) == Settings()


# --- refusals ---


def test_everything_wrong_is_said_at_once() -> None:
    """One start shows all mistakes, each with its own line, from both sources."""
    lines = refusal(
        variables(limits__concurrency="many", inputs__topics="a"),
        "kafka:\n  session_timeout_s: 0\n  grup: x\ndelivery:\n  ordering: random\n",
    )
    assert lines == [
        "SLUICE_INPUTS__TOPICS: there is no such setting; did you mean SLUICE_INPUT__TOPICS?",
        "given.yaml line 2: kafka.session_timeout_s: 0 is not allowed; "
        "allowed: a number from 1 up to 300",
        "given.yaml line 3: kafka.grup: there is no such setting; did you mean kafka.group_id?",
        "SLUICE_LIMITS__CONCURRENCY: 'many' is not allowed; "
        "allowed: a whole number from 1 up to 10000",
        "given.yaml line 5: delivery.ordering: 'random' is not allowed; "
        "allowed: key or partition or none",
    ]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("SLUICE_KAFKA_BOOTSTRAP_SERVERS", "SLUICE_KAFKA__BOOTSTRAP_SERVERS"),
        ("SLUICE_GROUP_ID", "SLUICE_KAFKA__GROUP_ID"),
        ("SLUICE_OUTPUT__TOPICS", "SLUICE_OUTPUT__TOPIC"),
        ("SLUICE_INPUT__TOPIC", "SLUICE_INPUT__TOPICS"),
        ("SLUICE_KAFKA__CONCURRENCY", "SLUICE_LIMITS__CONCURRENCY"),
        ("SLUICE_KAFKA__SECURITY__PASWORD", "SLUICE_KAFKA__SECURITY__PASSWORD"),
        ("SLUICE_TELEMETRY_PORT", "SLUICE_TELEMETRY__PORT"),
    ],
)
def test_unknown_variable(typo: str, meant: str) -> None:
    """A variable that looks like ours and is not is refused, with what was probably meant."""
    (line,) = refusal({typo: CANARY})
    assert line.startswith(f"{typo}: there is no such setting; ")
    assert line.endswith(f"did you mean {meant}?")
    assert CANARY not in line


@pytest.mark.parametrize(
    ("text", "meant"), [("group_id: x", "kafka.group_id"), ("inputs: {topics: a}", "input")]
)
def test_unknown_name_in_the_file(text: str, meant: str) -> None:
    """A name of the file that is not known is refused, with its line and what was meant."""
    (line,) = refusal(text=text)
    assert line.startswith("given.yaml line 1: ")
    assert line.endswith(f"there is no such setting; did you mean {meant}?")


def test_name_like_nothing() -> None:
    """Where nothing is similar, the sentence says where the names are listed."""
    (line,) = refusal({"SLUICE_QQQQ": "x"})
    assert line == (
        "SLUICE_QQQQ: there is no such setting; `sluice schema --settings` lists them all"
    )


def test_name_that_stands_twice() -> None:
    """YAML would silently take the last one; both lines are named instead."""
    (line,) = refusal(text="kafka:\n  group_id: a\n  group_id: b\n")
    assert line == "given.yaml line 3: kafka.group_id is there twice (line 2 has it too)"


def test_password_in_the_file() -> None:
    """A password in the file is refused without being shown, and nothing else is wrong with it."""
    (line,) = refusal(
        text=f"kafka:\n  security:\n    password: {CANARY}\n    protocol: PLAINTEXT\n"
    )
    assert line.startswith("given.yaml line 3: kafka.security.password is a secret and not read")
    assert "SLUICE_KAFKA__SECURITY__PASSWORD" in line
    assert CANARY not in line


def test_redis_url_in_the_file() -> None:
    """It can hold a password: refused without being shown."""
    (line,) = refusal(text=f"cache:\n  redis_url: redis://:{CANARY}@host\n")
    assert line.startswith("given.yaml line 2: cache.redis_url is a secret and not read")
    assert "SLUICE_CACHE__REDIS_URL" in line
    assert CANARY not in line


def test_redis_url_that_is_none_is_not_shown() -> None:
    """What somebody took for a URL can be the password itself."""
    (line,) = refusal(variables(cache__redis_url=CANARY))
    assert (
        line == "SLUICE_CACHE__REDIS_URL: it must start with redis://, rediss:// (TLS) or unix://"
    )


def test_cache_needs_an_address_and_one_only() -> None:
    """Redis without a URL, or with two, cannot stand."""
    (line,) = refusal(variables(cache__mode="redis"))
    assert "SLUICE_CACHE__REDIS_URL or cache.redis_url_file" in line
    both = variables(cache__redis_url=f"redis://:{CANARY}@h", cache__redis_url_file="/f")
    (line,) = refusal(both)
    assert "redis_url or redis_url_file, not both" in line
    assert CANARY not in line


@pytest.mark.parametrize("word", ["off", "'off'", "memory"])
def test_cache_mode_in_the_file(word: str) -> None:
    """YAML takes the word off for false; here it is the word."""
    file = Path("some.yaml")
    file.write_text(f"cache: {{mode: {word}}}")
    assert load(file, {}).cache.mode == word.strip("'")


@pytest.mark.parametrize(
    "text", [f"kafka: {CANARY}", f"kafka: [{CANARY}]", f"kafka: {{security: {CANARY}}}"]
)
def test_section_that_is_none(text: str) -> None:
    """A value where settings are expected is said as that, and not shown: it may be a secret."""
    (line,) = refusal(text=text)
    assert "allowed: a section with settings below it" in line
    assert CANARY not in line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("kafka:\n  a: [1\nb: 2\n", 3),
        ("kafka:\n\tgroup_id: x\n", 2),
        ("kafka: a: b\n", 1),
        ("kafka: !!python/object:os.system {}\n", 1),
    ],
)
def test_broken_yaml_names_its_line(text: str, line: int) -> None:
    """What is no YAML is one sentence with the line."""
    (sentence,) = refusal(text=text)
    assert sentence.startswith(f"given.yaml line {line}: is not YAML: ")


@pytest.mark.parametrize("text", ["a\x00b", "just text", "[1, 2]"])
def test_other_broken_files(text: str) -> None:
    """A control character, a file without sections: one sentence each."""
    (sentence,) = refusal(text=text)
    assert sentence.startswith("given.yaml: ")


def test_file_that_is_not_there() -> None:
    """A named file that cannot be read is a wrong setting, not a default."""
    with pytest.raises(WrongSettings, match=r"^none.yaml: cannot be read \(No such file"):
        load(Path("none.yaml"), {})


def test_file_that_is_not_text(folder: Path) -> None:
    """A file that is not UTF-8 is one sentence."""
    (folder / "bad.yaml").write_bytes(b"kafka: \xff")
    with pytest.raises(WrongSettings, match=r"^bad.yaml: is not UTF-8 text$"):
        load(Path("bad.yaml"), {})


def test_aliases_that_hold_themselves() -> None:
    """A value that refers to itself ends in a sentence, not in a recursion without end."""
    assert refusal(text="kafka: &a\n  security: *a\n")


HOSTILE = {
    "nested lists": "extraction:\n  parameters: {a: " + "[" * 2000 + "]" * 2000 + "}",
    "nested just too deep": "extraction: {parameters: {a: " + "[" * 62 + "]" * 62 + "}}",
    "nested by aliases": "a0: &a0 []\n"
    + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000)),
    "aliases of aliases": "a0: &a0 [x, x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 7)),
    "merges of merges": "a0: &a0 {x: 1, y: 2}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 7)),
    "a large number": f"limits: {{concurrency: 0x{'f' * 6000}}}",
    "a large number among parameters": f"extraction: {{parameters: {{seed: 0x{'f' * 6000}}}}}",
    "a long number": f"limits: {{concurrency: {'9' * 6000}}}",
    "a time that is none": "input: {start: !!timestamp x}",
    "a date that is none": "input: {start: 2026-13-01}",
    "a truth that is none": "telemetry: {tracing: !!bool x}",
    "an empty number": 'limits: {concurrency: !!int ""}',
    "a name that is no text": "? [kafka]\n: {group_id: x}",
    "a large file": "# " + "x" * (1024 * 1024),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(text: str) -> None:
    """Whatever a file holds, it ends in one short sentence that names the file."""
    (sentence,) = refusal(text=text)
    assert sentence.startswith("given.yaml")
    assert len(sentence) < 200


def test_a_value_of_another_kind_names_its_line() -> None:
    """What PyYAML itself stumbles over is told like any other broken YAML."""
    (sentence,) = refusal(text="input:\n  start: !!timestamp x\n")
    assert sentence == "given.yaml line 2: is not YAML: this is no timestamp"


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_json_in_a_variable(depth: int) -> None:
    """JSON that nests too deep is not allowed, as what is no JSON."""
    (sentence,) = refusal(
        variables(extraction__parameters='{"a": ' + "[" * depth + "]" * depth + "}")
    )
    assert sentence.startswith("SLUICE_EXTRACTION__PARAMETERS: ")
    assert len(sentence) < 200


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_file_that_never_ends(folder: Path, kind: str) -> None:
    """A pipe or a device is refused at once, by its name and as the default file."""
    if kind == "pipe":
        os.mkfifo(folder / "sluice.yaml")
    else:
        (folder / "sluice.yaml").symlink_to("/dev/zero")
    for config in (Path("sluice.yaml"), None):
        with pytest.raises(WrongSettings, match=r"^sluice.yaml: is a pipe, a socket or a device"):
            load(config, {})


@pytest.mark.parametrize(
    "value", [f"ann:{CANARY}@broker:9092", f"{CANARY}@broker", f"b:9092,ann:{CANARY},x@b:9092"]
)
def test_credentials_in_an_address_are_not_repeated(value: str) -> None:
    """An address with a user and a password is refused, by a sentence that shows neither."""
    (sentence,) = refusal(variables(kafka__bootstrap_servers=value))
    assert "kafka.security.password" in sentence
    assert CANARY not in sentence


WRONG = [
    ("input__start", "2026-01-31T08:00:00", "needs its offset from UTC"),
    ("input__start", "yesterday", "neither earliest, latest nor a time"),
    ("input__start", "1769839200", "neither earliest, latest nor a time"),
    ("input__topics", "a b", "no legal topic name"),
    ("input__topics", "a,a", "a topic is named twice"),
    ("extraction__model", "a, a", "a model is named twice"),
    ("extraction__model", ",", "no model is named"),
    ("prices", '{"gpt": {"input": 1}}', "SLUICE_PRICES.gpt.output: is missing"),
    ("prices", '{"gpt": {"input": -1, "output": 1}}', "SLUICE_PRICES.gpt.input: -1 is not allowed"),
    ("prices", "cheap", "allowed: a mapping"),
    ("input__topics", ",", "no topic is named"),
    ("output__topic", "..", "no legal topic name"),
    ("dead_letters__topic", "x" * 250, "no legal topic name"),
    ("kafka__bootstrap_servers", "http://broker:9092", "is no host:port"),
    ("kafka__bootstrap_servers", "a:9092,,b:9092", "is no host:port"),
    ("extraction__record", "service.demo.records", "is neither package.module:Model nor"),
    ("extraction__record", "service.demo.records:", "is neither package.module:Model nor"),
    ("extraction__record", "s.json", "a JSON schema is not taken yet"),
    ("extraction__call_timeout_s", "nan", "allowed: a number above 0, up to 3600"),
    ("extraction__call_timeout_s", "inf", "allowed: a number above 0, up to 3600"),
    ("dead_letters__guard__share_max", "1", "allowed: a number above 0, below 1"),
    ("extraction__examples", "[{", "allowed: a list"),
    ("extraction__examples", '[{"text": "a"}]', "[0].records: is missing"),
    ("delivery__rebalance_drain_s", "21", "allowed: a number from 0 up to 20"),
    ("delivery__mode", "at_most_once", "allowed: at_least_once or exactly_once"),
    ("telemetry__port", "65536", "allowed: a whole number from 0 up to 65535"),
]


@pytest.mark.parametrize(("name", "value", "said"), WRONG)
def test_wrong_value(name: str, value: str, said: str) -> None:
    """Each wrong value is one sentence that starts with its variable and says what is allowed."""
    (line,) = refusal(variables(**{name: value}))
    assert line.startswith("SLUICE_" + name.upper())
    assert said in line


@pytest.mark.parametrize(
    "value", ["[::1]:9092", "a:9092, b:9092", "broker.example", "10.0.0.1:9092"]
)
def test_bootstrap_servers(value: str) -> None:
    """Every way in which brokers are written is taken."""
    assert load(None, variables(kafka__bootstrap_servers=value)).kafka.bootstrap_servers == value


@pytest.mark.parametrize("value", ["a.b:Model", "a/b c.py:Model", "C:/x.py:M", "m:Outer.In"])
def test_records(value: str) -> None:
    """Every way in which a record's type is written is taken."""
    assert load(None, variables(extraction__record=value)).extraction.record == value


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in SASL.items() if key != name}


STREAMING = {
    "extraction__streaming": "true",
    "extraction__cardinality": "many",
    "delivery__ordering": "none",
}

CONTRADICTIONS = [
    ({"input__topics": "records"}, "'records' is input and output"),
    ({"input__topics": "x,dead-letters"}, "'dead-letters' is input and dead letter topic"),
    ({"output__topic": "same", "dead_letters__topic": "same"}, "output and dead letter topic"),
    ({"input__tombstones": "pass", "output__key_field": "name"}, "cannot be passed on"),
    ({"limits__window": "9", "limits__concurrency": "10"}, "a window of 9 cannot fill 10 slots"),
    ({"extraction__hedge_after_s": "60"}, "a second call after 60 s would never be made"),
    ({"extraction__message_timeout_s": "59"}, "before its first call may end"),
    (
        {"extraction__message_timeout_s": "60", "extraction__hedge_after_s": "60"},
        "the message is rejected after message_timeout_s, 60 s",
    ),
    (without("kafka__security__sasl_mechanism"), "needs a sasl_mechanism"),
    ({**SASL, "kafka__security__protocol": "SSL"}, "sasl_mechanism PLAIN needs protocol SASL_SSL"),
    (without("kafka__security__username"), "PLAIN needs a username"),
    (without("kafka__security__password"), "PLAIN needs a password"),
    ({**SASL, "kafka__security__password_file": "/p"}, "password or password_file, not both"),
    (
        {**SASL, "kafka__security__sasl_mechanism": "OAUTHBEARER"},
        "OAUTHBEARER needs token_file",
    ),
    (STREAMING | {"extraction__cardinality": "one"}, "there is nothing to stream"),
    (
        STREAMING | {"delivery__mode": "exactly_once"},
        "a transaction publishes all records",
    ),
    (STREAMING | {"cache__mode": "memory"}, "the cache stores and shares only whole answers"),
    (
        STREAMING | {"extraction__confidence__field": "sure"},
        "the confidence is known when",
    ),
    (STREAMING | {"delivery__ordering": "key"}, "don't wait for earlier messages"),
    ({"kafka__security__username": "ann"}, "username would not be used"),
    ({"kafka__security__ca_file": "/ca.pem"}, "ca_file would not be used"),
    (
        {"kafka__security__protocol": "SSL", "kafka__security__certificate_file": "/c"},
        "certificate_file and key_file belong together",
    ),
    (
        {"kafka__security__protocol": "SSL", "kafka__security__key_password_file": "/k"},
        "key_password_file needs a key_file",
    ),
]


@pytest.mark.parametrize(("settings", "said"), CONTRADICTIONS)
def test_contradiction(settings: dict[str, str], said: str) -> None:
    """Settings that cannot stand together are refused in words that name a variable that was set,
    and never a secret."""
    text = "\n".join(refusal(variables(**settings)))
    assert said in text
    assert any("SLUICE_" + name.upper() in text for name in settings)
    assert CANARY not in text


def test_contradictions_are_said_together() -> None:
    """Two contradictions of different sections are two lines of one refusal."""
    lines = refusal(
        variables(input__topics="records", kafka__security__protocol="SASL_SSL", limits__window="1")
    )
    assert len(lines) == 3


@pytest.mark.parametrize(
    "settings",
    [
        SASL,
        {**SASL, "kafka__security__sasl_mechanism": "SCRAM-SHA-512"},
        {**without("kafka__security__password"), "kafka__security__password_file": "/p"},
        {
            "kafka__security__protocol": "SASL_SSL",
            "kafka__security__sasl_mechanism": "OAUTHBEARER",
            "kafka__security__token_file": "/t",
        },
        {"kafka__security__protocol": "SSL", "kafka__security__ca_file": "/ca.pem"},
        {"limits__window": "10", "limits__concurrency": "10"},
        {"input__tombstones": "pass"},
        STREAMING,
        {"extraction__message_timeout_s": "60", "extraction__hedge_after_s": "59"},
    ],
)
def test_what_stands_together(settings: dict[str, str]) -> None:
    """The neighbours of the contradictions are taken."""
    assert load(None, variables(**settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"delivery__drain_timeout_s": "189"}, "delivery.drain_timeout_s is 189"),
        ({"extraction__reasks_max": "3"}, "can take 250 s"),
        ({"extraction__truncated": "retry"}, "can take 250 s"),
        ({"extraction__model": "small,large"}, "can take 370 s"),
        ({"extraction__confidence__field": "sure"}, "names only one"),
        ({**SASL, "kafka__security__protocol": "SASL_PLAINTEXT"}, "sends the password in clear"),
    ],
)
def test_warning(settings: dict[str, str], said: str) -> None:
    """What works but probably not as meant earns one sentence."""
    (sentence,) = warnings(load(None, variables(**settings)))
    assert said in sentence


def test_drain_that_just_covers_a_message() -> None:
    """(1 + 2) x 60 s and 10 s for publishing is enough."""
    assert warnings(load(None, variables(delivery__drain_timeout_s="190"))) == ()


# --- the table ---


def test_every_setting_has_a_meaning() -> None:
    """No row of the table is without its meaning."""
    rows = table().splitlines()[2:]
    assert len(rows) > 45
    assert all(len(row.split(" | ")[-1].removesuffix(" |")) > 10 for row in rows)


# --- retries and the reject guard ---


def test_retries_need_no_order() -> None:
    """A retry topic with an order to keep is refused, with what to do."""
    [line] = refusal(variables(retries__topic="later"))
    assert line.startswith("SLUICE_RETRIES__TOPIC and delivery.ordering: ")
    assert "set delivery.ordering to none" in line
    settings = load(None, variables(retries__topic="later", delivery__ordering="none"))
    assert settings.topics_read == ("messages", "later")


@pytest.mark.parametrize("other", ["records", "dead-letters", "messages"])
def test_retries_have_a_topic_of_their_own(other: str) -> None:
    """The retry topic is none of the others."""
    [line] = refusal(variables(retries__topic=other, delivery__ordering="none"))
    assert "give retries a topic of their own" in line


def test_the_guard_is_turned_off_by_null() -> None:
    """null, in the file as in a variable, turns a rule of the guard off."""
    Path("sluice.yaml").write_text("dead_letters: {guard: {share_max: null}}\n")
    guard = load(None, variables(dead_letters__guard__in_a_row_max="null")).dead_letters.guard
    assert (guard.share_max, guard.in_a_row_max) == (None, None)


def test_a_guard_that_could_never_trip_is_refused() -> None:
    """More outcomes than its window holds would never be there."""
    [line] = refusal(variables(dead_letters__guard__window="20"))
    assert "a window of 20 never holds 50 outcomes" in line
