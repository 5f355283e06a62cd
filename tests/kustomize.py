"""What `kustomize build` does, as far as cluster/kuberay uses it; a test compares it with kustomize."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Resource = dict[str, Any]
CLUSTER_WIDE = {"Namespace", "PriorityClass"}
KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches", "replacements"}


def build(folder: Path) -> list[Resource]:
    """The resources of a kustomization."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert kustomization.keys() <= KNOWN, kustomization.keys() - KNOWN
    resources: list[Resource] = []
    for name in kustomization["resources"]:
        path = folder / name
        # Parsed and copied, so that YAML's anchors are no shared objects.
        found = build(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
        resources += copy.deepcopy([yaml.safe_load(_plain(resource)) for resource in found])
    for patch in kustomization.get("patches", []):
        targets = [resource for resource in resources if _matches(resource, patch["target"])]
        assert targets, f"{patch['target']} names nothing"
        for resource in targets:
            jsonpatch.apply_patch(resource, yaml.safe_load(patch["patch"]), in_place=True)
    for resource in resources:
        if "namespace" in kustomization and resource["kind"] not in CLUSTER_WIDE:
            resource["metadata"]["namespace"] = kustomization["namespace"]
    for image in kustomization.get("images", []):
        _set_image(resources, image)
    for replacement in kustomization.get("replacements", []):
        _replace(resources, replacement)
    return resources


def _plain(resource: Resource) -> str:
    class NoAliases(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(resource, Dumper=NoAliases)


def _matches(resource: Resource, target: dict[str, str]) -> bool:
    name = resource["metadata"]["name"]
    return resource["kind"] == target["kind"] and bool(re.fullmatch(target.get("name", ".*"), name))


def _set_image(value: Any, image: dict[str, str]) -> None:
    """In every list of containers, wherever it is."""
    if isinstance(value, list):
        for item in value:
            _set_image(item, image)
    elif isinstance(value, dict):
        for container in value.get("containers", []):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
        for item in value.values():
            _set_image(item, image)


def _replace(resources: list[Resource], replacement: dict[str, Any]) -> None:
    source = next(r for r in resources if _matches(r, replacement["source"]))
    for target in replacement["targets"]:
        for resource in (r for r in resources if _matches(r, target["select"])):
            for path in target["fieldPaths"]:
                *parents, last = path.split(".")
                place = resource
                for name in parents:
                    place = place[name]
                place[last] = copy.deepcopy(source[replacement["source"]["fieldPath"]])
