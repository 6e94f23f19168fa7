{{/* Names and labels, what follows from the settings, and what is refused.

A worker is one extraction: the chart's values with those of its entry in `extractions` over them.
"sluice.workers" gives them as a list, each with
  id        the name of its objects
  values    its values
  user      settings as they go into sluice.yaml: the user's, and the files of the Secrets
  settings  the same over the service's defaults: what templates compute with
*/}}

{{- define "sluice.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "sluice.fullname" -}}
{{- $name := include "sluice.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "sluice.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "sluice.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "sluice.labels" -}}
app.kubernetes.io/name: {{ include "sluice.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: sluice
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Takes (dict "root" $ "worker" a worker). They never change, as a Deployment's selector can't. */}}
{{- define "sluice.selector" -}}
app.kubernetes.io/name: {{ include "sluice.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .worker.component }}
{{- end -}}

{{- define "sluice.workerLabels" -}}
{{ include "sluice.labels" .root }}
app.kubernetes.io/component: {{ .worker.component }}
{{- end -}}

{{/* --- workers --- */}}

{{- define "sluice.workers" -}}
{{- $full := include "sluice.fullname" . -}}
{{- $base := omit .Values "extractions" "global" -}}
{{- $workers := list -}}
{{- range .Values.extractions | default (list dict) -}}
{{- $values := mergeOverwrite (deepCopy $base) (deepCopy (omit . "name")) -}}
{{- $id := ternary (printf "%s-%s" $full .name) $full (hasKey . "name") -}}
{{- $worker := dict "id" $id "component" (.name | default "worker") "values" $values -}}
{{- $_ := set $worker "user" (include "sluice.userSettings" $values | fromYaml) -}}
{{- $defaults := $.Files.Get "files/defaults.yaml" | fromYaml -}}
{{- $_ := set $worker "settings" (mergeOverwrite $defaults (deepCopy $worker.user)) -}}
{{- range $section, $setting := dict "input" "topics" "extraction" "model" -}}
{{- $named := get (get $worker.settings $section) $setting -}}
{{- if kindIs "string" $named -}}
{{- $_ := set (get $worker.settings $section) $setting (regexSplit " *, *" (trim $named) -1) -}}
{{- end -}}
{{- end -}}
{{- include "sluice.check" $worker -}}
{{- $workers = append $workers $worker -}}
{{- end -}}
{{- include "sluice.checkTogether" $workers -}}
{{- toYaml $workers -}}
{{- end -}}

{{/* The entry of the Secret, the setting, and the file that joins them. */}}
{{- define "sluice.secretFiles" -}}
password: password_file
token: token_file
ca: ca_file
certificate: certificate_file
privateKey: key_file
privateKeyPassword: key_password_file
{{- end -}}

{{- define "sluice.userSettings" -}}
{{- $settings := deepCopy (.settings | default dict) -}}
{{- if .kafkaSecret.existingSecret -}}
{{- $security := dict -}}
{{- $keys := .kafkaSecret.keys -}}
{{- range $key, $setting := include "sluice.secretFiles" . | fromYaml -}}
{{- if get $keys $key -}}
{{- $_ := set $security $setting (printf "/etc/sluice-kafka/%s" $setting) -}}
{{- end -}}
{{- end -}}
{{- if $security -}}
{{- $settings = mergeOverwrite $settings (dict "kafka" (dict "security" $security)) -}}
{{- end -}}
{{- end -}}
{{- if .cacheSecret.existingSecret -}}
{{- $settings = mergeOverwrite $settings (dict "cache" (dict "redis_url_file" "/etc/sluice-cache/redis_url")) -}}
{{- end -}}
{{- toYaml $settings -}}
{{- end -}}

{{/* --- what follows from the settings; each takes a worker --- */}}

{{/* From SIGTERM to the end: the drain, a call that was let run into its deadline, and 30 s for the
last commit, leaving the group and closing the clients (a test adds their bounds up). The clock
of Kubernetes starts before preStop. */}}
{{- define "sluice.stopSeconds" -}}
{{- $drain := .settings.delivery.drain_timeout_s | float64 -}}
{{- $call := .settings.extraction.call_timeout_s | float64 -}}
{{- addf (.values.preStopSeconds | float64) $drain $call 30 | ceil | int -}}
{{- end -}}

{{- define "sluice.graceSeconds" -}}
{{- .values.terminationGracePeriodSeconds | default (include "sluice.stopSeconds" .) | int -}}
{{- end -}}

{{/* The longest that one pod's replacement may take: its end, its start, its first assignment. */}}
{{- define "sluice.progressSeconds" -}}
{{- $start := mul .values.probes.startup.periodSeconds .values.probes.startup.failureThreshold -}}
{{- $kafka := .settings.kafka -}}
{{- $rebalance := addf (.settings.delivery.rebalance_drain_s | float64) 20 ($kafka.session_timeout_s | float64) -}}
{{- addf (include "sluice.graceSeconds" . | float64) $start $rebalance 60 | ceil | int -}}
{{- end -}}

{{/* Of a pod, over its workers: messages in windows, calls in flight, partitions that feed it. */}}
{{- define "sluice.window" -}}
{{- $factor := ternary 16 4 (eq .settings.delivery.ordering "partition") -}}
{{- $window := .settings.limits.window | default (mul $factor .settings.limits.concurrency) | int -}}
{{- mul $window (int .settings.limits.workers) -}}
{{- end -}}

{{- define "sluice.slots" -}}
{{- mul (int .settings.limits.concurrency) (int .settings.limits.workers) -}}
{{- end -}}

{{- define "sluice.partitionPods" -}}
{{- divf (float64 .values.autoscaling.partitions) (float64 .settings.limits.workers) | ceil | int -}}
{{- end -}}

{{/* Pods that the provider's quota can feed; empty without a quota. A pod makes
concurrency × workers × 60 ÷ callSeconds requests a minute; at least one pod always has something
to do. */}}
{{- define "sluice.quotaPods" -}}
{{- $auto := .values.autoscaling -}}
{{- $limits := .settings.limits -}}
{{- $perPod := divf (mulf (include "sluice.slots" . | float64) 60) (float64 $auto.callSeconds) -}}
{{- $pods := list -}}
{{- with $auto.requestsPerMinute | default (get $limits "requests_per_minute") -}}
{{- $pods = append $pods (divf (float64 .) $perPod | ceil | int) -}}
{{- end -}}
{{- with $auto.tokensPerMinute | default (get $limits "tokens_per_minute") -}}
{{- $pods = append $pods (divf (float64 .) (mulf $perPod (float64 $auto.callTokens)) | ceil | int) -}}
{{- end -}}
{{- $least := "" -}}
{{- range $pods -}}{{- $least = ternary . $least (or (eq (toString $least) "") (lt . (int $least))) -}}{{- end -}}
{{- $least -}}
{{- end -}}

{{/* More pods than this only add rebalances. */}}
{{- define "sluice.ceiling" -}}
{{- $quota := include "sluice.quotaPods" . -}}
{{- $partitions := include "sluice.partitionPods" . | int -}}
{{- ternary (min $partitions (int $quota)) $partitions (ne $quota "") | max 1 -}}
{{- end -}}

{{- define "sluice.maxReplicas" -}}
{{- .values.autoscaling.maxReplicas | default (include "sluice.ceiling" .) | int -}}
{{- end -}}

{{- define "sluice.lagThreshold" -}}
{{- $auto := .values.autoscaling -}}
{{- $done := divf (mulf (include "sluice.slots" . | float64) (float64 $auto.catchUpSeconds)) (float64 $auto.callSeconds) | floor | int -}}
{{- $auto.lagThreshold | default (max $done (include "sluice.window" . | int)) | int -}}
{{- end -}}

{{/* Bytes of a Kubernetes quantity. */}}
{{- define "sluice.bytes" -}}
{{- $text := toString . -}}
{{- $units := dict "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $unit := regexFind "[A-Za-z]+$" $text -}}
{{- mulf (trimSuffix $unit $text | float64) (get $units $unit | default 1 | float64) | int64 -}}
{{- end -}}

{{/* Ports of brokers, or of the endpoint. */}}
{{- define "sluice.kafkaPorts" -}}
{{- $ports := list -}}
{{- range splitList "," .settings.kafka.bootstrap_servers -}}
{{- $ports = append $ports (regexFind ":[0-9]+$" (trim .) | trimPrefix ":" | default "9092" | int) -}}
{{- end -}}
{{- .values.networkPolicy.kafkaPorts | default (uniq $ports) | toYaml -}}
{{- end -}}

{{- define "sluice.providerPorts" -}}
{{- $url := .values.provider.baseUrl | default "https://" | urlParse -}}
{{- $default := ternary 80 443 (eq $url.scheme "http") -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" | default $default | int -}}
{{- .values.networkPolicy.providerPorts | default (list $port) | toYaml -}}
{{- end -}}

{{/* --- what is refused: one worker, then workers together --- */}}

{{- define "sluice.check" -}}
{{- $values := .values -}}
{{- $settings := .settings -}}
{{- $kafka := $settings.kafka -}}
{{- $auto := $values.autoscaling -}}
{{- $stop := include "sluice.stopSeconds" . | int -}}
{{- if lt (include "sluice.graceSeconds" . | int) $stop -}}
{{- fail (printf "%s: terminationGracePeriodSeconds is %s, but a stop can take %d s (preStopSeconds + delivery.drain_timeout_s + extraction.call_timeout_s + 30): calls that are paid for would be killed. Leave it out, or shorten the drain." .id (toString $values.terminationGracePeriodSeconds) $stop) -}}
{{- end -}}
{{- if $kafka.security.password -}}
{{- fail (printf "%s: settings.kafka.security.password would stand in a ConfigMap: put it into a Secret, name that in kafkaSecret.existingSecret and its entry in kafkaSecret.keys.password." .id) -}}
{{- end -}}
{{- if ($settings.cache | default dict).redis_url -}}
{{- fail (printf "%s: settings.cache.redis_url would stand in a ConfigMap: put it into a Secret and name that in cacheSecret.existingSecret." .id) -}}
{{- end -}}
{{- range $values.extraEnv -}}
{{- if hasPrefix "SLUICE_" (.name | default "" | upper) -}}
{{- fail (printf "%s: extraEnv sets %s, past the chart's checks: write it under settings." $.id .name) -}}
{{- end -}}
{{- end -}}
{{- if eq (int $settings.telemetry.port) 0 -}}
{{- fail (printf "%s: settings.telemetry.port 0 takes a free port, which no probe can know: name one." .id) -}}
{{- end -}}
{{- if or (hasPrefix "127." $settings.telemetry.host) (has $settings.telemetry.host (list "localhost" "::1")) -}}
{{- fail (printf "%s: settings.telemetry.host %s is the pod's own loopback, where the kubelet's probes don't come in: leave it out." .id $settings.telemetry.host) -}}
{{- end -}}
{{- if regexMatch "(^|,) *(localhost|127[.])" $kafka.bootstrap_servers -}}
{{- fail (printf "%s: settings.kafka.bootstrap_servers is %s, but localhost is the pod itself: name the brokers." .id $kafka.bootstrap_servers) -}}
{{- end -}}
{{- if $kafka.group_instance_id -}}
{{- fail (printf "%s: settings.kafka.group_instance_id names one worker alone; all pods of a Deployment would take it and put each other out of the group: leave it out." .id) -}}
{{- end -}}
{{- $record := splitList ":" $settings.extraction.record | first -}}
{{- if and (regexMatch "^[^/]+[.](py|json)$" $record) (not (hasKey $values.files $record)) -}}
{{- fail (printf "%s: settings.extraction.record names %s, which is not in files: pass it with --set-file 'files.%s=%s'." .id $record (replace "." "\\." $record) $record) -}}
{{- end -}}
{{- $needed := addf (float64 $settings.limits.window_bytes) 268435456 -}}
{{- if eq $settings.cache.mode "memory" -}}
{{- $needed = addf $needed (float64 $settings.cache.memory_max_bytes) -}}
{{- end -}}
{{- $workers := int $settings.limits.workers -}}
{{- $each := ternary (printf " of each of %d workers" $workers) "" (gt $workers 1) -}}
{{- if gt $workers 1 -}}
{{- $needed = addf (mulf $needed (float64 $workers)) 67108864 -}}
{{- end -}}
{{- with $values.resources.limits.memory -}}
{{- if lt (include "sluice.bytes" . | float64) $needed -}}
{{- fail (printf "%s: resources.limits.memory is %s, but the process (256Mi), limits.window_bytes and a cache in memory%s can fill %dMi: a full window would be an OOM kill. Raise the limit, or lower those." $.id . $each (divf $needed 1048576 | ceil | int)) -}}
{{- end -}}
{{- end -}}
{{- if and .values.kafkaSecret.existingSecret (not (compact (values .values.kafkaSecret.keys))) -}}
{{- fail (printf "%s: kafkaSecret.existingSecret is set, but no entry of it in kafkaSecret.keys." .id) -}}
{{- end -}}
{{- if ne $auto.kind "none" -}}
{{- include "sluice.checkScaling" . -}}
{{- else if and (eq $values.mode "deployment") $auto.partitions (gt (int $values.replicas) (include "sluice.partitionPods" . | int)) -}}
{{- fail (printf "%s: replicas is %d, but there are %d partitions: the others would have nothing to do." .id (int $values.replicas) (int $auto.partitions)) -}}
{{- end -}}
{{- end -}}

{{- define "sluice.checkScaling" -}}
{{- $auto := .values.autoscaling -}}
{{- if ne .values.mode "deployment" -}}
{{- fail (printf "%s: a job is not scaled: set autoscaling.kind to none." .id) -}}
{{- end -}}
{{- if not $auto.partitions -}}
{{- fail (printf "%s: autoscaling needs autoscaling.partitions, the partitions of the input topics together: pods beyond them have nothing to do." .id) -}}
{{- end -}}
{{- $ceiling := include "sluice.ceiling" . | int -}}
{{- $quota := include "sluice.quotaPods" . -}}
{{- if gt (include "sluice.maxReplicas" . | int) $ceiling -}}
{{- $why := ternary (printf "the provider's quota feeds no more than %s" $quota) (printf "there are %d partitions" (int $auto.partitions)) (eq $quota (toString $ceiling)) -}}
{{- fail (printf "%s: autoscaling.maxReplicas is %d, but %s: more pods only add rebalances. At most %d." .id (int $auto.maxReplicas) $why $ceiling) -}}
{{- end -}}
{{- if gt (int $auto.minReplicas) (include "sluice.maxReplicas" . | int) -}}
{{- fail (printf "%s: autoscaling.minReplicas is %d, above the most of %s." .id (int $auto.minReplicas) (include "sluice.maxReplicas" .)) -}}
{{- end -}}
{{- if lt (include "sluice.lagThreshold" . | int) (include "sluice.window" . | int) -}}
{{- fail (printf "%s: autoscaling.lagThreshold is %d, but one pod alone has up to %s messages in its window, which count as lag until they are committed: more pods would come without need." .id (int $auto.lagThreshold) (include "sluice.window" .)) -}}
{{- end -}}
{{- $security := .settings.kafka.security -}}
{{- if and (eq $auto.kind "keda") (not $auto.triggerAuthentication) (hasPrefix "SASL" $security.protocol) -}}
{{- if or (eq $security.sasl_mechanism "OAUTHBEARER") (not .values.kafkaSecret.keys.username) (not .values.kafkaSecret.keys.password) -}}
{{- fail (printf "%s: KEDA logs in by itself, with user name and password from a Secret: name their entries in kafkaSecret.keys, or make a TriggerAuthentication of your own and name it in autoscaling.triggerAuthentication." .id) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "sluice.checkTogether" -}}
{{- $seen := dict -}}
{{- $groups := dict -}}
{{- range $worker := . -}}
{{- if hasKey $seen .id -}}
{{- fail (printf "extractions: two are named %s." .component) -}}
{{- end -}}
{{- $_ := set $seen .id true -}}
{{- $group := .settings.kafka.group_id -}}
{{- with get $groups $group -}}
{{- fail (printf "extractions %s and %s are both in the consumer group %q: each would take messages that are the other's. Give each its own settings.kafka.group_id." . $worker.component $group) -}}
{{- end -}}
{{- $_ := set $groups $group .component -}}
{{- end -}}
{{- end -}}
