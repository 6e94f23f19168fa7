"""Every value of the chart, once: name, type, bound and meaning.

`generate.py` writes values.yaml, values.schema.json and the table of the README from it; what the
chart computes from the values, and refuses, is in templates/_helpers.tpl. `settings` is the file
sluice.yaml of the service: its part of the schema is that of `service.settings`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Name: TypeAlias = Annotated[str, Field(pattern=r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$")]
"""A name of a Kubernetes object, or nothing."""

Quantity: TypeAlias = Annotated[str, Field(pattern=r"^[0-9]+([.][0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
"""An amount as Kubernetes writes it; a plain number has to stand in quotes."""

Peers: TypeAlias = list[dict[str, Any]]
"""Peers of a NetworkPolicy as Kubernetes writes them; an empty list is everybody."""

Port: TypeAlias = Annotated[int, Field(ge=1, le=65535)]


class Group(BaseModel):
    """Values that belong together; a name that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Image(Group):
    repository: str = Field(default="sluice", min_length=1)
    """Where the image of deploy/Dockerfile was pushed to."""
    tag: str = ""
    """Without it the chart's appVersion."""
    digest: str = Field(default="", pattern=r"^(sha256:[0-9a-f]{64})?$")
    """Goes before the tag: what runs is then what was tested, whoever moves the tag."""
    pullPolicy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """When the node asks for it again."""


class Provider(Group):
    baseUrl: str = Field(default="", pattern=r"^(https?://.+)?$")
    """OPENAI_BASE_URL; without it OpenAI's."""
    existingSecret: Name = ""
    """A Secret of yours with the key to the endpoint; without it none is given."""
    secretKey: str = "OPENAI_API_KEY"
    """The Secret's entry that holds it."""


class KafkaSecretKeys(Group):
    username: str = ""
    """For PLAIN and SCRAM, instead of settings.kafka.security.username."""
    password: str = ""
    """For PLAIN and SCRAM; becomes settings.kafka.security.password_file."""
    token: str = ""
    """For OAUTHBEARER; becomes token_file, read anew at each connection."""
    ca: str = ""
    """The brokers' authority (PEM); becomes ca_file."""
    certificate: str = ""
    """Our own certificate (PEM); becomes certificate_file."""
    privateKey: str = ""
    """Its private key (PEM); becomes key_file."""
    privateKeyPassword: str = ""
    """The private key's password; becomes key_password_file."""


class KafkaSecret(Group):
    existingSecret: Name = ""
    """A Secret of yours with what the brokers ask for; mounted as files, read only."""
    keys: KafkaSecretKeys = Field(default_factory=KafkaSecretKeys)
    """Which of its entries is what; those left out are not there."""


class CacheSecret(Group):
    existingSecret: Name = ""
    """A Secret of yours with the URL of the Redis that keeps answers; for cache.mode redis."""
    key: str = "url"
    """The Secret's entry; becomes settings.cache.redis_url_file."""


class Job(Group):
    schedule: str = ""
    """A CronJob at these times (cron's five fields); without it one Job for each `helm upgrade`."""
    backoffLimit: int = Field(default=6, ge=0)
    """How often a failed pod is tried again; wrong settings (exit code 2) and a
    topic of which every message was rejected (3) never are."""
    activeDeadlineSeconds: int | None = Field(default=None, ge=1)
    """The longest that it may take; without it no bound."""
    ttlSecondsAfterFinished: int = Field(default=86_400, ge=0)
    """How long a finished Job is kept for its log."""


class Amounts(Group):
    cpu: Quantity | None = None
    """One process with one event loop: more than one core is never used."""
    memory: Quantity | None = None
    """Above 256Mi, settings.limits.window_bytes and the cache in memory; the limit is checked."""
    ephemeral_storage: Quantity | None = Field(default=None, alias="ephemeral-storage")
    """Logs and /tmp; nothing else is written."""


class Resources(Group):
    requests: Amounts = Amounts(
        cpu="250m",
        memory="512Mi",
        **{"ephemeral-storage": "64Mi"},  # type: ignore[arg-type]
    )
    """What the scheduler keeps free for a pod."""
    limits: Amounts = Amounts(memory="1Gi", **{"ephemeral-storage": "256Mi"})  # type: ignore[arg-type]
    """No limit of CPU by default: throttling would delay heartbeats and the drain."""


class Probe(Group):
    periodSeconds: int = Field(ge=1)
    """Seconds between two looks."""
    failureThreshold: int = Field(ge=1)
    """So many in a row count."""
    timeoutSeconds: int = Field(default=5, ge=1)
    """Seconds for an answer."""


class Probes(Group):
    startup: Probe = Probe(periodSeconds=2, failureThreshold=60)
    """/livez: the process answers; until then the other two wait. Not /readyz: a provider or a
    broker that is down at the start must not restart the pod for ever."""
    readiness: Probe = Probe(periodSeconds=5, failureThreshold=1)
    """/readyz: it takes messages. A rollout waits for it; no traffic depends on it."""
    liveness: Probe = Probe(periodSeconds=10, failureThreshold=3)
    """/livez: fails only where a restart would help, never because the broker or the provider is
    down; its patience is in the service, and follows the settings."""


class ServiceAccount(Group):
    create: bool = True
    """One account for all extractions, without rights and without a token."""
    name: Name = ""
    """Without it the release's full name, or `default` where none is created."""
    annotations: dict[str, str] = {}
    """For a cloud's own identity."""


class PodDisruptionBudget(Group):
    enabled: bool = True
    """One pod at a time; pods that are not ready may always be evicted, so that an outage of the
    provider does not block the drain of a node."""
    maxUnavailable: int = Field(default=1, ge=1)
    """Pods that may be away at once."""


class TopologySpread(Group):
    enabled: bool = True
    """Over zones and nodes."""
    whenUnsatisfiable: Literal["ScheduleAnyway", "DoNotSchedule"] = "ScheduleAnyway"
    """Whether an uneven pod waits."""


class NetworkPolicy(Group):
    enabled: bool = True
    """In: only the metrics' port. Out: only DNS, brokers and the model's endpoint."""
    scrapeFrom: Peers = []
    """Who may read /metrics (it holds no texts); the kubelet's probes pass anyway."""
    dnsTo: Peers = [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
    ]
    """Where DNS is; nodes with a local cache need its address here."""
    kafkaTo: Peers = []
    """Where the brokers are."""
    kafkaPorts: list[Port] = []
    """Their advertised ports; without them those of settings.kafka.bootstrap_servers."""
    providerTo: Peers = []
    """Where the model's endpoint is."""
    providerPorts: list[Port] = []
    """Its ports; without them that of provider.baseUrl."""
    redisTo: Peers = []
    """Where Redis is, with settings.cache.mode redis."""
    redisPorts: list[Port] = [6379]
    """Its ports; its URL is in a Secret, which the chart does not read."""
    extraEgress: list[dict[str, Any]] = []
    """Further rules, as for an OTLP collector."""


class Autoscaling(Group):
    kind: Literal["none", "keda", "hpa"] = "none"
    """keda: on the consumer group's lag (KEDA must be installed). hpa: on the CPU, or on
    `metrics`: weaker, as a worker mostly waits for the model."""
    minReplicas: int = Field(default=1, ge=1)
    """Never 0: with brokers away a scaler reads nothing, and 0 workers notice nothing."""
    maxReplicas: int | None = Field(default=None, ge=1)
    """Without it the ceiling itself: the smaller of the partitions and of the pods that the
    provider's quota can feed. Above the ceiling it is refused."""
    partitions: int | None = Field(default=None, ge=1)
    """Partitions of the input topics together: a pod beyond them has nothing to do."""
    requestsPerMinute: int | None = Field(default=None, ge=1)
    """The provider's quota; without it settings.limits.requests_per_minute, where there is one."""
    tokensPerMinute: int | None = Field(default=None, ge=1)
    """The same in tokens; without it settings.limits.tokens_per_minute."""
    callSeconds: float = Field(default=2.0, gt=0)
    """How long a call takes as a rule (sluice_call_duration_seconds)."""
    callTokens: int = Field(default=1000, ge=1)
    """Tokens of a call as a rule, in and out."""
    catchUpSeconds: int = Field(default=60, ge=1)
    """How fast a pod should work off its share of the lag: lagThreshold follows from it."""
    lagThreshold: int | None = Field(default=None, ge=1)
    """Messages of lag for each pod; without it what a pod does in catchUpSeconds, and at least its
    window: the lag is that of committed offsets and includes what is in flight."""
    pollingSeconds: int = Field(default=15, ge=1)
    """How often KEDA asks the brokers."""
    scaleDownSeconds: int = Field(default=300, ge=0)
    """How long fewer pods must do before one goes (then one every two minutes): each step is a
    rebalance."""
    excludePersistentLag: bool = True
    """A partition whose offset does not move calls for no more pods: they would not help it."""
    triggerAuthentication: Name = ""
    """A TriggerAuthentication of yours; without it one is made from kafkaSecret."""
    cpuUtilization: int = Field(default=70, ge=1, le=100)
    """With hpa: percent of the requested CPU."""
    metrics: list[dict[str, Any]] = []
    """With hpa: metrics of your own (autoscaling/v2) instead of the CPU."""


class Monitor(Group):
    enabled: bool = False
    """Needs the Prometheus operator."""
    interval: str = "15s"
    """Seconds between scrapes."""
    labels: dict[str, str] = {}
    """What your Prometheus selects by."""


class Extra(Group):
    enabled: bool = False
    """Needs the Prometheus operator for rules, Grafana's sidecar for dashboards."""
    labels: dict[str, str] = {}
    """What your Prometheus, or Grafana's sidecar, selects by."""
    annotations: dict[str, str] = {}
    """Such as the sidecar's folder."""


class Monitoring(Group):
    podMonitor: Monitor = Field(default_factory=Monitor)
    """Scrapes the pods; the better choice, as nothing needs a Service."""
    serviceMonitor: Monitor = Field(default_factory=Monitor)
    """Scrapes by way of a Service without an address of its own, made for it."""
    rules: Extra = Field(default_factory=Extra)
    """Recording rules and alerts of deploy/prometheus as a PrometheusRule."""
    dashboards: Extra = Extra(labels={"grafana_dashboard": "1"})
    """Dashboards of deploy/grafana as ConfigMaps."""


class Extraction(BaseModel):
    """One of several: its name, and any of the values of one worker over those of the chart."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,28}[a-z0-9])?$")
    """Ends the names of its objects."""


class Values(Group):
    image: Image = Field(default_factory=Image)
    """The image."""
    imagePullSecrets: list[dict[str, str]] = []
    """As Kubernetes writes them."""
    nameOverride: Name = ""
    """Instead of the chart's name."""
    fullnameOverride: Name = ""
    """Instead of the release's and the chart's name."""
    extractions: list[Extraction] = []
    """Several workers from one release: each has a `name` and any value of this file (but image
    names, serviceAccount, monitoring.rules and .dashboards) over it. Without a list: one."""
    settings: dict[str, Any] = {"kafka": {"bootstrap_servers": "kafka:9092"}}
    """sluice.yaml: every setting of docs/settings.md but secrets."""
    files: dict[str, str] = {}
    """Files beside sluice.yaml, by name: a record's .py, as in --set-file files.records\\.py=…"""
    provider: Provider = Field(default_factory=Provider)
    """The model's endpoint."""
    kafkaSecret: KafkaSecret = Field(default_factory=KafkaSecret)
    """What the brokers ask for."""
    cacheSecret: CacheSecret = Field(default_factory=CacheSecret)
    """Where answers are kept."""
    mode: Literal["deployment", "job"] = "deployment"
    """deployment: until it is stopped. job: `--until-caught-up`, then it ends."""
    job: Job = Field(default_factory=Job)
    """Of mode job."""
    replicas: int = Field(default=2, ge=1)
    """Pods, where nothing scales them; more than partitions only wait."""
    terminationGracePeriodSeconds: int | None = Field(default=None, ge=1)
    """Without it drain_timeout_s + call_timeout_s + 30 (+ preStopSeconds). A shorter one is
    refused: it would kill calls that are paid for."""
    preStopSeconds: int = Field(default=0, ge=0)
    """Seconds between the pod's end being decided and SIGTERM. A consumer has no traffic to be
    taken off, so none are needed; a sidecar that must stay may need some."""
    resources: Resources = Field(default_factory=Resources)
    """What a pod may use."""
    probes: Probes = Field(default_factory=Probes)
    """How the kubelet looks at a pod."""
    serviceAccount: ServiceAccount = Field(default_factory=ServiceAccount)
    """Whom the pods are for Kubernetes."""
    podDisruptionBudget: PodDisruptionBudget = Field(default_factory=PodDisruptionBudget)
    """How many pods may be evicted at once."""
    topologySpread: TopologySpread = Field(default_factory=TopologySpread)
    """Where pods go."""
    networkPolicy: NetworkPolicy = Field(default_factory=NetworkPolicy)
    """Whom pods may speak with."""
    autoscaling: Autoscaling = Field(default_factory=Autoscaling)
    """How many pods there are."""
    monitoring: Monitoring = Field(default_factory=Monitoring)
    """What Prometheus and Grafana get."""
    podAnnotations: dict[str, str] = {}
    """On the pods."""
    podLabels: dict[str, str] = {}
    """On the pods."""
    priorityClassName: Name = ""
    """Of the pods."""
    nodeSelector: dict[str, str] = {}
    """Of the pods."""
    tolerations: list[dict[str, Any]] = []
    """Of the pods."""
    affinity: dict[str, Any] = {}
    """Of the pods."""
    extraEnv: list[dict[str, Any]] = []
    """Further environment, as Kubernetes writes it; SLUICE_… is refused: it would go past the
    chart's checks."""
    extraVolumes: list[dict[str, Any]] = []
    """Further volumes."""
    extraVolumeMounts: list[dict[str, Any]] = []
    """And where they are mounted."""


SHARED = ("nameOverride", "fullnameOverride", "extractions", "serviceAccount")
"""Values of the whole release: an extraction cannot have its own."""
