"""What Kubernetes and KubeRay make of a resource: its errors by the schemas, and the pods that come of it.

KubeRay's schemas are data beside the project (`../shared/kuberay`), by version. `pods` adds what the operator
adds, by `ray-operator/controllers/ray/common/pod.go` and `job.go` of these versions.
"""

import copy
import gzip
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from conftest import ROOT

Resource = dict[str, Any]
SCHEMAS = ROOT.parent / "shared" / "kuberay"
VERSIONS = ("v1.6.2", "v1.7.0")
KUBERNETES_VERSION = "1.34"
OF_OPERATORS = ("ray.io/v1", "monitoring.coreos.com/v1")

SUBMITTER = {
    "containers": [{"name": "ray-job-submitter", "image": "of the head"}],
    "restartPolicy": "Never",
}
"""`GetDefaultSubmitterTemplate`: the pod of a RayJob without a template of its own. No security context."""
AUTOSCALER = {"name": "autoscaler", "image": "of the head"}
"""`BuildAutoscalerContainer`: beside the head, with the security context of `autoscalerOptions`."""
WAITS_FOR_HEAD = {
    "name": "wait-gcs-ready",
    "image": "of the worker",
    "resources": {kind: {"cpu": "200m", "memory": "256Mi"} for kind in ("requests", "limits")},
}
"""`DefaultWorkerPodTemplate`: an init container of workers, with the security context of their container."""


def kubernetes_errors(resource: Resource) -> list[str]:
    """What Kubernetes' own schemas say, of kinds that are Kubernetes' and of pod templates in others."""
    if resource["apiVersion"] not in OF_OPERATORS:
        return list(_kubernetes_errors(resource))
    return [
        error
        for template in _templates(resource)
        for error in _kubernetes_errors(
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        )
    ]


def kuberay_errors(resource: Resource, version: str) -> list[str]:
    """What a version of KubeRay's schemas says of one of its kinds, unknown fields included."""
    validator = jsonschema.Draft202012Validator(_schema(resource["kind"], version))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(resource)]


def pods(resource: Resource) -> dict[str, Resource]:
    """The specs of all pods that are made of a resource, by a name."""
    spec = resource.get("spec", {})
    match resource["kind"]:
        case "CronJob":
            return pods({"kind": "Job", "spec": spec["jobTemplate"]["spec"]})
        case "Job" | "Deployment":
            return {"pod": spec["template"]["spec"]}
        case "RayCluster":
            return _pods_of_cluster(spec)
        case "RayCronJob":
            return pods({"kind": "RayJob", "spec": spec["jobTemplate"]})
        case "RayJob":
            submitter = spec.get("submitterPodTemplate", {"spec": SUBMITTER})["spec"]
            return _pods_of_cluster(spec.get("rayClusterSpec", {})) | {"submitter": submitter}
        case _:
            return {}


def _pods_of_cluster(cluster: Resource) -> dict[str, Resource]:
    if not cluster:
        return {}
    head = copy.deepcopy(cluster["headGroupSpec"]["template"]["spec"])
    if cluster.get("enableInTreeAutoscaling"):
        head["containers"].append(AUTOSCALER | cluster.get("autoscalerOptions", {}))
    found = {"head": head}
    for group in cluster.get("workerGroupSpecs", []):
        worker = copy.deepcopy(group["template"]["spec"])
        own = {
            key: value for key, value in worker["containers"][0].items() if key in ("securityContext", "env")
        }
        worker["initContainers"] = [*worker.get("initContainers", []), WAITS_FOR_HEAD | own]
        found[f"worker {group['groupName']}"] = worker
    return found


def _templates(value: Any) -> Iterator[Resource]:
    """All pod templates in a value, at any depth."""
    if isinstance(value, list):
        for item in value:
            yield from _templates(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("template", "submitterPodTemplate"):
                yield item
            else:
                yield from _templates(item)


def _kubernetes_errors(resource: Resource) -> Iterator[str]:
    try:
        kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{resource['kind']}.{'.'.join(map(str, error.path))}: {error.message}"


@cache
def _schema(kind: str, version: str) -> Resource:
    name = f"ray.io_{kind.lower()}s.yaml.gz"
    with gzip.open(SCHEMAS / version / name) as file:
        definition = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (served,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    schema = _strict(served["schema"]["openAPIV3Schema"])
    # The API server knows what metadata holds; the definitions leave it open.
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as a JSON schema that knows no other fields."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: value if key == "enum" else _strict(value) for key, value in schema.items()}
    if "x-kubernetes-int-or-string" in strict:
        strict.pop("type", None)
    if isinstance(strict.get("properties"), dict) and not strict.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


def has_schemas() -> bool:
    return Path(SCHEMAS).is_dir()
