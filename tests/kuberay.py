"""Fields of KubeRay's resources by the API reference of v1.7.0, for those that cluster/kuberay uses.

No package ships the custom-resource schemas. These are the names and types that the reference lists for each
of our kinds; what is Kubernetes' own inside of them is checked against Kubernetes' schemas.
"""

from collections.abc import Iterator
from typing import Any

import kubernetes_validate

KUBERNETES_VERSION = "1.34"

TYPES: dict[str, dict[str, Any]] = {
    "RayCluster": {"apiVersion": str, "kind": str, "metadata": dict, "spec": "RayClusterSpec"},
    "RayJob": {"apiVersion": str, "kind": str, "metadata": dict, "spec": "RayJobSpec"},
    "RayCronJob": {"apiVersion": str, "kind": str, "metadata": dict, "spec": "RayCronJobSpec"},
    "RayCronJobSpec": {
        "jobTemplate": "RayJobSpec",
        "schedule": str,
        "timeZone": str,
        "suspend": bool,
    },
    "RayJobSpec": {
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "preRunningDeadlineSeconds": int,
        "rayClusterSpec": "RayClusterSpec",
        "clusterSelector": dict,
        "entrypoint": str,
        "entrypointNumCpus": float,
        "entrypointNumGpus": float,
        "entrypointResources": str,
        "jobId": str,
        "managedBy": ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
        "metadata": dict,
        "runtimeEnvYAML": str,
        "shutdownAfterJobFinishes": bool,
        "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "submitterPodTemplate": "PodTemplateSpec",
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
    },
    "RayClusterSpec": {
        "authOptions": "AuthOptions",
        "autoscalerOptions": "AutoscalerOptions",
        "enableInTreeAutoscaling": bool,
        "headGroupSpec": "HeadGroupSpec",
        "headServiceAnnotations": dict,
        "managedBy": ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"),
        "rayVersion": str,
        "suspend": bool,
        "workerGroupSpecs": ["WorkerGroupSpec"],
    },
    "AuthOptions": {"enableK8sTokenAuth": bool, "mode": ("disabled", "token"), "secretName": str},
    "AutoscalerOptions": {
        "args": [str],
        "command": [str],
        "env": "container:env",
        "idleTimeoutSeconds": int,
        "image": str,
        "imagePullPolicy": str,
        "resources": "container:resources",
        "securityContext": "container:securityContext",
        "upscalingMode": ("Default", "Aggressive", "Conservative"),
        "version": ("v1", "v2"),
        "volumeMounts": "container:volumeMounts",
    },
    "HeadGroupSpec": {
        "enableIngress": bool,
        "labels": dict,
        "rayStartParams": dict,
        "resources": dict,
        "serviceType": ("ClusterIP", "NodePort", "LoadBalancer"),
        "template": "PodTemplateSpec",
    },
    "WorkerGroupSpec": {
        "groupName": str,
        "idleTimeoutSeconds": int,
        "labels": dict,
        "maxReplicas": int,
        "minReplicas": int,
        "numOfHosts": int,
        "priority": int,
        "rayStartParams": dict,
        "replicas": int,
        "resources": dict,
        "template": "PodTemplateSpec",
    },
}
REQUIRED = {
    "RayCronJobSpec": {"jobTemplate", "schedule"},
    "RayClusterSpec": {"headGroupSpec"},
    "HeadGroupSpec": {"template"},
    "WorkerGroupSpec": {"groupName", "minReplicas", "maxReplicas", "template"},
}


def errors(resource: dict[str, Any]) -> list[str]:
    """What is wrong with a resource of Kubernetes or KubeRay."""
    if resource["apiVersion"] == "ray.io/v1":
        return list(_errors(resource, resource["kind"], resource["kind"]))
    return list(_kubernetes_errors(resource, resource["kind"]))


def _errors(value: Any, expected: Any, path: str) -> Iterator[str]:
    if isinstance(expected, list):
        for i, item in enumerate(value):
            yield from _errors(item, expected[0], f"{path}[{i}]")
    elif isinstance(expected, tuple):
        if value not in expected:
            yield f"{path}: {value!r} is none of {expected}"
    elif isinstance(expected, type):
        # A boolean is an int in Python only.
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            yield f"{path}: {value!r} is no {expected.__name__}"
    elif expected == "PodTemplateSpec":
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": value}
        yield from _kubernetes_errors(pod, path)
    elif expected.startswith("container:"):
        container = {"name": "x", "image": "x", expected.partition(":")[2]: value}
        yield from _errors({"spec": {"containers": [container]}}, "PodTemplateSpec", path)
    else:
        fields = TYPES[expected]
        yield from (f"{path}: no field {name}" for name in value.keys() - fields.keys())
        yield from (f"{path}: {name} is missing" for name in REQUIRED.get(expected, set()) - value.keys())
        for name in value.keys() & fields.keys():
            yield from _errors(value[name], fields[name], f"{path}.{name}")


def _kubernetes_errors(resource: dict[str, Any], path: str) -> Iterator[str]:
    try:
        kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{path}.{'.'.join(map(str, error.path))}: {error.message}"
