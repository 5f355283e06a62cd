"""What `kustomize build` does, as far as cluster/kuberay uses it; a test compares it with kustomize."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Resource = dict[str, Any]
CLUSTER_WIDE = {"Namespace", "PriorityClass"}
KNOWN = {
    *("apiVersion", "kind", "namespace", "resources", "components", "images", "patches", "replacements"),
    *("configMapGenerator", "generatorOptions"),
}


def build(folder: Path, over: list[Resource] | None = None) -> list[Resource]:
    """The resources of a kustomization.

    Args:
        over: what a component adds to and changes; none for others.
    """
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert kustomization.keys() <= KNOWN, kustomization.keys() - KNOWN
    resources = list(over or [])
    for name in kustomization.get("resources", []):
        path = folder / name
        # Parsed and copied, so that YAML's anchors are no shared objects.
        found = build(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
        resources += copy.deepcopy([yaml.safe_load(_plain(resource)) for resource in found])
    for name in kustomization.get("components", []):
        resources = build(folder / name, resources)
    for generated in kustomization.get("configMapGenerator", []):
        resources.append(_config_map(generated, kustomization["generatorOptions"], folder))
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


def _config_map(generated: dict[str, Any], options: dict[str, Any], folder: Path) -> Resource:
    assert options["disableNameSuffixHash"] is True
    data = {Path(file).name: (folder / file).read_text() for file in generated["files"]}
    metadata = {"name": generated["name"]}
    metadata |= {"namespace": generated["namespace"]} if "namespace" in generated else {}
    metadata |= {"labels": options["labels"]} if "labels" in options else {}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


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
    value, last = _place(source, replacement["source"]["fieldPath"])
    for target in replacement["targets"]:
        for resource in (r for r in resources if _matches(r, target["select"])):
            for path in target["fieldPaths"]:
                place, name = _place(resource, path)
                place[name] = copy.deepcopy(value[last])


def _place(resource: Any, path: str) -> tuple[Any, Any]:
    """What holds a field, and the field's name or number in it."""
    *parents, last = (int(name) if name.isdigit() else name for name in path.split("."))
    for name in parents:
        resource = resource[name]
    return resource, last
