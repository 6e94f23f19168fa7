#!/usr/bin/env bash
# The chart on a real cluster: strict server-side dry runs, restricted Pod Security, install,
# upgrade, a refused upgrade, rollback, uninstall. In a namespace of its own, which it makes and
# removes; nothing else is touched.
#
#   KUBECONFIG=… deploy/helm/apply.sh         NAMESPACE (sluice-chart-test), HELM, KUBECTL
#
# Examples whose kinds the cluster does not know (KEDA's, the Prometheus operator's) are dry-run
# without them, and it says so. With WAIT=1 install and upgrade wait for ready pods: for a cluster
# that has the image and a Kafka (VALUES names a values file for it), or whose nodes are simulated.
set -euo pipefail
cd "$(dirname "$0")"
helm="${HELM:-helm}" kubectl="${KUBECTL:-kubectl}" space="${NAMESPACE:-sluice-chart-test}"
values="${VALUES:-examples/defaults/values.yaml}"
wait=()
[ "${WAIT:-0}" = 1 ] && wait=(--wait --timeout 10m)

work="$(mktemp -d)"
clean_up() {
  "$helm" uninstall sluice --namespace "$space" --ignore-not-found >/dev/null 2>&1 || true
  "$kubectl" delete namespace "$space" --ignore-not-found --wait=false >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap clean_up EXIT
step() { printf '\n== %s\n' "$1"; }

step "a namespace with restricted Pod Security, enforced"
"$kubectl" create namespace "$space"
"$kubectl" label namespace "$space" pod-security.kubernetes.io/{enforce,warn}=restricted

step "it refuses a pod that is not locked down"
if "$kubectl" -n "$space" run plain --image=sluice --dry-run=server 2>"$work/refused"; then
  echo "a plain pod was let in: Pod Security is not enforced here" >&2
  exit 1
fi
grep -o 'violates PodSecurity[^:]*' "$work/refused"

known="$("$kubectl" api-resources --no-headers | awk '{print $NF}')"
for example in examples/*/; do
  name="$(basename "$example")"
  step "example $name: every object, strictly, and its pods as Pod Security sees them"
  "$helm" template sluice ../helm/sluice --namespace "$space" --values "$example/values.yaml" >"$work/all.yaml"
  python3 split.py "$work/all.yaml" "$work/known.yaml" "$work/pods.yaml" "$known"
  "$kubectl" -n "$space" apply --dry-run=server --validate=strict -f "$work/known.yaml" 2>&1 | tee "$work/said"
  if grep -i 'warning' "$work/said"; then exit 1; fi
  "$kubectl" -n "$space" create --dry-run=server --validate=strict -f "$work/pods.yaml"
done

step "a misspelt field is found"
sed 's/maxSurge/maxSurges/' "$work/known.yaml" >"$work/wrong.yaml"
if "$kubectl" -n "$space" apply --dry-run=server --validate=strict -f "$work/wrong.yaml" >/dev/null 2>"$work/refused"; then
  echo "a misspelt field was taken" >&2
  exit 1
fi
grep -o 'unknown field "[^"]*"' "$work/refused"

step "install"
"$helm" install sluice ../helm/sluice --namespace "$space" --values "$values" "${wait[@]}"
step "upgrade: other settings, other pods"
"$helm" upgrade sluice ../helm/sluice --namespace "$space" --values "$values" \
  --set settings.delivery.drain_timeout_s=300 "${wait[@]}" >/dev/null
shown() { "$kubectl" -n "$space" get deployment sluice -o jsonpath='{.spec.template.spec.terminationGracePeriodSeconds}'; }
[ "$(shown)" = 390 ] && echo "the grace period is 390 s now"
step "a wrong value is refused and changes nothing"
if "$helm" upgrade sluice ../helm/sluice --namespace "$space" --values "$values" \
  --set terminationGracePeriodSeconds=30 2>"$work/refused"; then exit 1; fi
grep -o 'terminationGracePeriodSeconds is 30.*' "$work/refused"
[ "$(shown)" = 390 ]
step "rollback"
"$helm" rollback sluice 1 --namespace "$space" "${wait[@]}"
[ "$(shown)" = 290 ] && echo "the grace period is 290 s again"
"$helm" history sluice --namespace "$space"
step "uninstall"
"$helm" uninstall sluice --namespace "$space" "${wait[@]}"
left="$("$kubectl" -n "$space" get deployment,configmap,networkpolicy,poddisruptionbudget,serviceaccount -l app.kubernetes.io/part-of=sluice -o name)"
[ -z "$left" ] && echo "nothing is left"
