"""Schemas for kubeconform: `schemas.py FOLDER KUBERNETES_VERSION RESOURCE_DEFINITION.yaml…`.

Kubernetes' own come out of the package kubernetes-validate, those of others out of their resource
definitions; objects are closed, so that a misspelt field is found. Needs both packages that
check.sh installs, and nothing of the service.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

# A bare = in a list of words, which YAML 1.1 takes for something else.
yaml.SafeLoader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: node.value)


def core(folder: Path, version: str) -> None:
    """Kubernetes' own, without the addresses that would be looked up."""
    import kubernetes_validate

    package = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    folder.mkdir(parents=True, exist_ok=True)
    for file in (package / f"v{version}-local-strict").glob("*.json"):
        text = file.read_text().replace('"/api/_definitions.json#', '"_definitions.json#')
        schema = json.loads(text)
        schema.pop("$id", None)
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        (folder / file.name).write_text(json.dumps(schema))


def definitions(folder: Path, file: Path) -> None:
    """One schema for each version of each kind in a file."""
    for document in yaml.safe_load_all(file.read_text()):
        if not document or document.get("kind") != "CustomResourceDefinition":
            continue
        spec = document["spec"]
        target = folder / spec["group"]
        target.mkdir(parents=True, exist_ok=True)
        for version in spec["versions"]:
            schema = closed(version["schema"]["openAPIV3Schema"])
            schema["properties"] |= {
                "apiVersion": {"type": "string"},
                "kind": {"type": "string"},
                "metadata": {"type": "object"},
            }
            name = f"{spec['names']['kind'].lower()}_{version['name']}.json"
            (target / name).write_text(json.dumps(schema))


def closed(schema: Any) -> Any:
    """The schema with no room for names that it does not know."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    open_on_purpose = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in schema and not open_on_purpose:
        schema.setdefault("additionalProperties", False)
        schema["properties"] = {name: closed(one) for name, one in schema["properties"].items()}
    for name in ("items", "additionalProperties"):
        if name in schema:
            schema[name] = closed(schema[name])
    return schema


if __name__ == "__main__":
    target = Path(sys.argv[1])
    core(target / "core", sys.argv[2])
    for each in sys.argv[3:]:
        definitions(target, Path(each))
