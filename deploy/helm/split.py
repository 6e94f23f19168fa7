"""For apply.sh: `split.py ALL KNOWN PODS KINDS` takes from rendered objects those whose kind a
cluster knows, and makes a bare pod of each template, so that Pod Security looks at it."""

import sys

import yaml

everything, known, pods, kinds = sys.argv[1:]
with open(everything) as file:
    objects = [each for each in yaml.safe_load_all(file) if each]
served = set(kinds.split())
with open(known, "w") as file:
    yaml.safe_dump_all([each for each in objects if each["kind"] in served], file)
for each in objects:
    if each["kind"] not in served:
        print(f"not known to this cluster: {each['kind']} {each['metadata']['name']}")


def template(each: dict) -> dict | None:
    match each["kind"]:
        case "Deployment" | "Job":
            return each["spec"]["template"]
        case "CronJob":
            return each["spec"]["jobTemplate"]["spec"]["template"]
    return None


made = []
for each in objects:
    if found := template(each):
        found["metadata"]["name"] = f"{each['metadata']['name']}-as-a-pod"
        # Made without the scheduler's and the controllers' part; a class that is not there is no
        # matter of Pod Security.
        found["spec"].pop("priorityClassName", None)
        made.append({"apiVersion": "v1", "kind": "Pod", **found})
with open(pods, "w") as file:
    yaml.safe_dump_all(made, file)
