"""The Helm chart, rendered by helm itself: golden files, what follows from settings, refusals."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import yaml

from service.settings import Settings
from service.settings.reading import load
from tests.support.chart import CASES, CHART, EXAMPLES, Refused, golden, rendered, values_of
from tests.support.helm import NoHelm, helm
from tests.support.started import do_without
from tests.support.stopping import CLOSING_S, longest_stop_s

BROKERS = {"kafka": {"bootstrap_servers": "kafka:9092"}}


@pytest.fixture(autouse=True, scope="module")
def _a_helm() -> None:
    try:
        helm()
    except NoHelm as reason:
        do_without(str(reason), "TEST_HELM")


def only(kind: str, objects: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = (each for each in objects if each["kind"] == kind)
    return found


def pod(values: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = only("Deployment", rendered(values))["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize("case", CASES)
def test_examples_render_as_committed(case: str) -> None:
    """What a change does to each example is seen in its diff: `python -m tests.support.chart`."""
    assert golden(case) == (EXAMPLES / case / "rendered.yaml").read_text()


@pytest.mark.parametrize("case", ["defaults", "full"])
def test_helm_finds_nothing_to_say(case: str) -> None:
    """`helm lint --strict` passes."""
    command = [helm(), "lint", "--strict", str(CHART), "-f", str(EXAMPLES / case / "values.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("case", CASES)
def test_the_service_takes_the_settings_of_the_chart(case: str) -> None:
    """Each rendered sluice.yaml loads, as the file it becomes."""
    maps = [each for each in rendered(values_of(case)) if "sluice.yaml" in each.get("data", {})]
    assert maps
    for each in maps:
        path = EXAMPLES / case / "rendered.yaml"  # only its name is used
        settings = yaml.safe_load(each["data"]["sluice.yaml"])
        if "SASL" in str(settings):
            settings["kafka"]["security"]["username"] = "from the Secret"
        assert Settings(**settings).kafka.bootstrap_servers, path


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"delivery": {"drain_timeout_s": 12.5}, "extraction": {"call_timeout_s": 3}},
        {"extraction": {"call_timeout_s": 600}},
    ],
)
def test_the_grace_period_covers_the_longest_stop(settings: dict[str, Any]) -> None:
    """Kubernetes waits for drain, call timeout and closing, as the settings have them."""
    grace_s = pod({"settings": {**BROKERS, **settings}})["terminationGracePeriodSeconds"]
    loaded = Settings(**settings)
    assert grace_s >= longest_stop_s(loaded)
    assert grace_s < longest_stop_s(loaded) + CLOSING_S


def test_probes_ask_what_they_mean() -> None:
    """Readiness decides nothing but rollouts; only liveness, and the start, restart a pod."""
    (container,) = pod({"settings": {**BROKERS, "telemetry": {"port": 9200}}})["containers"]
    asked = {
        name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")
    }
    assert {name: one["path"] for name, one in asked.items()} == {
        "startup": "/livez",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    assert container["ports"][0]["containerPort"] == 9200
    assert container["ports"][0]["name"] == asked["liveness"]["port"]


def test_a_rollout_is_given_the_time_that_a_pod_takes() -> None:
    """A replacement that uses its whole grace period is not yet a failed rollout."""
    spec = only("Deployment", rendered({}))["spec"]
    assert (
        spec["progressDeadlineSeconds"] > spec["template"]["spec"]["terminationGracePeriodSeconds"]
    )


@pytest.mark.parametrize(
    ("scaling", "most"),
    [
        ({"partitions": 12}, 12),
        ({"partitions": 12, "requestsPerMinute": 6000}, 4),  # 1,500 a pod
        ({"partitions": 3, "requestsPerMinute": 60000}, 3),
        ({"partitions": 12, "tokensPerMinute": 1_500_001}, 2),  # 1,500,000 a pod
        ({"partitions": 12, "requestsPerMinute": 1}, 1),
        ({"partitions": 12, "requestsPerMinute": 15000, "tokensPerMinute": 3_000_000}, 2),
    ],
)
def test_partitions_and_quota_bound_the_pods(scaling: dict[str, Any], most: int) -> None:
    """The smaller of both; 50 slots with calls of 2 s make 1,500 requests a minute."""
    values = {"autoscaling": {"kind": "keda", **scaling}}
    assert only("ScaledObject", rendered(values))["spec"]["maxReplicaCount"] == most


def test_workers_of_a_pod_count_towards_its_ceiling() -> None:
    """Two of 50 slots make 3,000 requests a minute and take two partitions: half as many pods."""
    for scaling, most in (
        ({"partitions": 11}, 6),
        ({"partitions": 12, "requestsPerMinute": 6000}, 2),
    ):
        values = {
            "settings": {**BROKERS, "limits": {"workers": 2}},
            "autoscaling": {"kind": "keda", **scaling},
            "resources": {"limits": {"memory": "2Gi"}},
        }
        assert only("ScaledObject", rendered(values))["spec"]["maxReplicaCount"] == most


@pytest.mark.parametrize(
    ("settings", "threshold"),
    [
        ({}, "1500"),
        ({"limits": {"window": 9000}}, "9000"),
        ({"limits": {"concurrency": 10}}, "300"),
        ({"limits": {"concurrency": 10, "workers": 2}}, "600"),
        ({"limits": {"window": 9000, "workers": 2}}, "18000"),
    ],
)
def test_a_full_window_calls_for_no_second_pod(settings: dict[str, Any], threshold: str) -> None:
    """The lag of one pod's own work is below the threshold."""
    values = {
        "settings": {**BROKERS, **settings},
        "autoscaling": {"kind": "keda", "partitions": 12},
        "resources": {"limits": {"memory": "2Gi"}},
    }
    trigger = only("ScaledObject", rendered(values))["spec"]["triggers"][0]["metadata"]
    assert trigger["lagThreshold"] == threshold
    given = Settings(**settings)
    assert int(threshold) >= given.window * given.limits.workers


def test_topics_with_commas_are_several() -> None:
    """Each has a trigger, however they are written; sluice.yaml keeps the user's words."""
    values = {
        "settings": {**BROKERS, "input": {"topics": "a, b"}},
        "autoscaling": {"kind": "keda", "partitions": 12},
    }
    triggers = only("ScaledObject", rendered(values))["spec"]["triggers"]
    assert [one["metadata"]["topic"] for one in triggers] == ["a", "b"]


def test_who_scales_decides_alone_how_many() -> None:
    """With autoscaling an upgrade does not put the number of pods back."""
    values = {"autoscaling": {"kind": "hpa", "partitions": 6}}
    assert "replicas" not in only("Deployment", rendered(values))["spec"]
    assert only("Deployment", rendered({}))["spec"]["replicas"] == 2


KEDA = {"kind": "keda", "partitions": 12}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"terminationGracePeriodSeconds": 230}, "a stop can take 290 s"),
    ({"terminationGracePeriodSeconds": 290, "preStopSeconds": 5}, "a stop can take 295 s"),
    (
        {"terminationGracePeriodSeconds": 300, "settings": {"delivery": {"drain_timeout_s": 400}}},
        "a stop can take 490 s",
    ),
    ({"settings": {"kafka": {"security": {"password": "x"}}}}, "would stand in a ConfigMap"),
    ({"extraEnv": [{"name": "SLUICE_INPUT__TOPICS", "value": "x"}]}, "past the chart's checks"),
    ({"settings": {"telemetry": {"port": 0}}}, "takes a free port"),
    ({"settings": {"telemetry": {"host": "127.0.0.1"}}}, "the pod's own loopback"),
    ({"settings": {"kafka": {"bootstrap_servers": "localhost:9092"}}}, "is the pod itself"),
    ({"settings": {"kafka": {"group_instance_id": "a"}}}, "names one worker alone"),
    ({"settings": {"extraction": {"record": "records.py:A"}}}, "which is not in files"),
    ({"resources": {"limits": {"memory": "500Mi"}}}, "would be an OOM kill"),
    ({"settings": {"limits": {"window_bytes": 900_000_000}}}, "would be an OOM kill"),
    ({"settings": {"cache": {"redis_url": "redis://a"}}}, "would stand in a ConfigMap"),
    (
        {"settings": {"cache": {"mode": "memory", "memory_max_bytes": 600_000_000}}},
        "would be an OOM kill",
    ),
    ({"kafkaSecret": {"existingSecret": "a"}}, "no entry of it"),
    ({"replicas": 4, "autoscaling": {"partitions": 3}}, "the others would have nothing to do"),
    (
        {
            "autoscaling": {"partitions": 3},
            "settings": {"limits": {"workers": 2}},
            "resources": {"limits": {"memory": "2Gi"}},
            "replicas": 3,
        },
        "the others would have nothing to do",
    ),
    ({"settings": {"limits": {"workers": 2}}}, "of each of 2 workers can fill 1088Mi"),
    ({"autoscaling": {"kind": "keda"}}, "needs autoscaling.partitions"),
    ({"mode": "job", "autoscaling": KEDA}, "a job is not scaled"),
    ({"autoscaling": {**KEDA, "maxReplicas": 13}}, "there are 12 partitions"),
    (
        {"autoscaling": {**KEDA, "maxReplicas": 5, "requestsPerMinute": 6000}},
        "the provider's quota feeds no more than 4",
    ),
    ({"autoscaling": {**KEDA, "minReplicas": 13}}, "above the most of 12"),
    ({"autoscaling": {**KEDA, "lagThreshold": 199}}, "has up to 200 messages in its window"),
    (
        {
            "autoscaling": KEDA,
            "settings": {
                "kafka": {"security": {"protocol": "SASL_SSL", "sasl_mechanism": "PLAIN"}}
            },
        },
        "KEDA logs in by itself",
    ),
    ({"extractions": [{"name": "a"}, {"name": "b"}]}, 'both in the consumer group "sluice"'),
    ({"extractions": [{"name": "a"}, {"name": "a"}]}, "two are named a"),
    # By the schema:
    ({"replica": 1}, "replica"),
    ({"settings": {"kafka": {"group": "a"}}}, "group"),
    ({"settings": {"delivery": {"rebalance_drain_s": 21}}}, "rebalance_drain_s"),
    ({"autoscaling": {**KEDA, "minReplicas": 0}}, "minReplicas"),
    ({"extractions": [{"replicas": 1}]}, "name"),
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED)
def test_a_wrong_value_fails_the_render_with_a_sentence(
    values: dict[str, Any], sentence: str
) -> None:
    """Each says what is wrong, before anything reaches a cluster."""
    with pytest.raises(Refused) as refused:
        rendered(values)
    assert sentence in str(refused.value)


def test_settings_of_the_chart_load_from_a_file(tmp_path: Any) -> None:
    """Large numbers survive the way through helm, and the file reads as the service reads it."""
    text = only(
        "ConfigMap",
        rendered(
            {"settings": {**BROKERS, "limits": {"window_bytes": 268435457, "concurrency": 50}}}
        ),
    )
    path = tmp_path / "sluice.yaml"
    path.write_text(text["data"]["sluice.yaml"])
    assert load(path, {}).limits.window_bytes == 268435457
