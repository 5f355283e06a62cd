"""Kubernetes' pod security standard, level *restricted*, and with it *baseline*, over the spec of a pod.

https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from collections.abc import Iterator
from typing import Any

VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"),
    "secret",
}


def violations(pod: dict[str, Any]) -> list[str]:
    """What the admission controller would refuse a pod for; nothing if it lets the pod in."""
    of_containers = (found for container in _containers(pod) for found in _of_container(container, pod))
    return [*_of_pod(pod), *of_containers]


def _containers(pod: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for kind in ("containers", "initContainers", "ephemeralContainers"):
        yield from pod.get(kind, [])


def _of_pod(pod: dict[str, Any]) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"{name} is set"
    for volume in pod.get("volumes", []):
        for kind in volume.keys() - {"name"} - VOLUMES:
            yield f"volume {volume['name']} is a {kind}"


def _of_container(container: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    name, own = container["name"], container.get("securityContext", {})
    both = pod.get("securityContext", {}) | own
    capabilities = own.get("capabilities", {})
    if own.get("privileged"):
        yield f"{name} is privileged"
    if own.get("procMount", "Default") != "Default":
        yield f"{name} has a procMount"
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"{name} allows privilege escalation"
    if "ALL" not in capabilities.get("drop", []):
        yield f"{name} keeps capabilities"
    for added in set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"{name} adds {added}"
    if both.get("runAsNonRoot") is not True:
        yield f"{name} may run as root"
    if both.get("runAsUser") == 0:
        yield f"{name} runs as root"
    if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield f"{name} has no seccomp profile"
    for port in container.get("ports", []):
        if port.get("hostPort"):
            yield f"{name} has a port of the host"
