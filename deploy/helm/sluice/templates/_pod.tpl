{{/* The pod of a worker; takes (dict "root" $ "worker" a worker). */}}
{{- define "sluice.pod" -}}
{{- $root := .root }}
{{- $worker := .worker }}
{{- $values := $worker.values }}
{{- $job := eq $values.mode "job" }}
metadata:
  labels:
    {{- include "sluice.workerLabels" . | nindent 4 }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # Settings are read once, at the start: other settings make other pods.
    checksum/config: {{ toYaml (dict "settings" $worker.user "files" $values.files) | sha256sum }}
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "sluice.serviceAccount" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with $values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- if $job }}
  restartPolicy: Never
  {{- end }}
  # Above the longest stop: preStop, drain, a call's own timeout, closing.
  terminationGracePeriodSeconds: {{ include "sluice.graceSeconds" $worker }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    seccompProfile:
      type: RuntimeDefault
  containers:
    - name: sluice
      image: {{ include "sluice.image" (dict "root" $root "image" $values.image) }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      args: [run, --config, /etc/sluice/sluice.yaml{{ if $job }}, --until-caught-up{{ end }}]
      # So that extraction.record finds a file of `files` by its bare name.
      workingDir: /etc/sluice
      {{- $env := include "sluice.env" $values }}
      {{- if $env }}
      env:
        {{- $env | nindent 8 }}
      {{- end }}
      ports:
        - name: metrics
          containerPort: {{ int $worker.settings.telemetry.port }}
          protocol: TCP
      {{- range $name, $path := dict "startup" "/livez" "readiness" "/readyz" "liveness" "/livez" }}
      {{- if not (and $job (eq $name "readiness")) }}
      {{- $probe := get $values.probes $name }}
      {{ $name }}Probe:
        httpGet:
          path: {{ $path }}
          port: metrics
        periodSeconds: {{ int $probe.periodSeconds }}
        failureThreshold: {{ int $probe.failureThreshold }}
        timeoutSeconds: {{ int $probe.timeoutSeconds }}
      {{- end }}
      {{- end }}
      {{- with int $values.preStopSeconds }}
      lifecycle:
        preStop:
          sleep:
            seconds: {{ . }}
      {{- end }}
      resources:
        {{- range $kind, $amounts := $values.resources }}
        {{ $kind }}:
          {{- range $name, $amount := $amounts }}
          {{- if $amount }}
          {{ $name }}: {{ $amount | quote }}
          {{- end }}
          {{- end }}
        {{- end }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      volumeMounts:
        - name: config
          mountPath: /etc/sluice
          readOnly: true
        - name: tmp
          mountPath: /tmp
        {{- if $values.kafkaSecret.existingSecret }}
        - name: kafka
          mountPath: /etc/sluice-kafka
          readOnly: true
        {{- end }}
        {{- if $values.cacheSecret.existingSecret }}
        - name: cache
          mountPath: /etc/sluice-cache
          readOnly: true
        {{- end }}
        {{- with $values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ $worker.id }}
    - name: tmp
      emptyDir:
        sizeLimit: 64Mi
    {{- if $values.kafkaSecret.existingSecret }}
    - name: kafka
      secret:
        secretName: {{ $values.kafkaSecret.existingSecret }}
        defaultMode: 0440
        items:
          {{- range $key, $file := include "sluice.secretFiles" $ | fromYaml }}
          {{- with get $values.kafkaSecret.keys $key }}
          - key: {{ . }}
            path: {{ $file }}
          {{- end }}
          {{- end }}
    {{- end }}
    {{- if $values.cacheSecret.existingSecret }}
    - name: cache
      secret:
        secretName: {{ $values.cacheSecret.existingSecret }}
        defaultMode: 0440
        items:
          - key: {{ $values.cacheSecret.key }}
            path: redis_url
    {{- end }}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- if and $values.topologySpread.enabled (not $job) }}
  topologySpreadConstraints:
    {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: {{ $values.topologySpread.whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "sluice.selector" $ | nindent 10 }}
      # Else a rollout's old pods push the new ones to the wrong place.
      matchLabelKeys: [pod-template-hash]
    {{- end }}
  {{- end }}
  {{- range $name := list "nodeSelector" "tolerations" "affinity" }}
  {{- with get $values $name }}
  {{ $name }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
{{- end -}}

{{- define "sluice.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "sluice.env" -}}
{{- $env := list -}}
{{- with .provider.baseUrl -}}
{{- $env = append $env (dict "name" "OPENAI_BASE_URL" "value" .) -}}
{{- end -}}
{{- if .provider.existingSecret -}}
{{- $entry := dict "name" .provider.existingSecret "key" .provider.secretKey -}}
{{- $env = append $env (dict "name" "OPENAI_API_KEY" "valueFrom" (dict "secretKeyRef" $entry)) -}}
{{- end -}}
{{- if and .kafkaSecret.existingSecret .kafkaSecret.keys.username -}}
{{- $entry := dict "name" .kafkaSecret.existingSecret "key" .kafkaSecret.keys.username -}}
{{- $env = append $env (dict "name" "SLUICE_KAFKA__SECURITY__USERNAME" "valueFrom" (dict "secretKeyRef" $entry)) -}}
{{- end -}}
{{- $env = concat $env .extraEnv -}}
{{- if $env -}}
{{- toYaml $env -}}
{{- end -}}
{{- end -}}
