"""The manifests of deploy/kubernetes as kustomize builds them, and what in them names something that is not there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPOSITORY
from tests.front import program

KUBERNETES = REPOSITORY / "deploy" / "kubernetes"

Manifest = dict[str, Any]


def built(overlay: Path) -> list[Manifest]:
    """What `kubectl apply -k` of the folder applies."""
    done = subprocess.run([program("kubectl"), "kustomize", str(overlay)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


@dataclass(frozen=True)
class Pods:
    """The pods of a Deployment."""

    name: str
    labels: dict[str, str]
    spec: Manifest

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for one in self.spec["containers"] for port in one["ports"]}

    def number(self, port: str | int) -> str | int:
        """The number of a port that has a name, or that is one already."""
        return self.ports.get(str(port), port)

    def listen_on(self, port: str | int) -> bool:
        return self.number(port) in self.ports.values()


@dataclass(frozen=True)
class Cluster:
    """Manifests that are applied together."""

    manifests: list[Manifest]

    def of(self, kind: str) -> Iterator[tuple[str, Any]]:
        """Names and specs."""
        for manifest in self.manifests:
            if manifest["kind"] == kind:
                yield manifest["metadata"]["name"], manifest.get("spec")

    @property
    def pods(self) -> list[Pods]:
        templates = [(name, spec["template"]) for name, spec in self.of("Deployment")]
        return [Pods(name, template["metadata"]["labels"], template["spec"]) for name, template in templates]

    @property
    def config_maps(self) -> dict[str, dict[str, str]]:
        return {each["metadata"]["name"]: each["data"] for each in self.manifests if each["kind"] == "ConfigMap"}

    def selected(self, labels: dict[str, str]) -> list[Pods]:
        return [pods for pods in self.pods if labels.items() <= pods.labels.items()]

    def behind(self, service: str, port: str | int) -> Iterator[tuple[Pods, str | int]]:
        """The pods that a port of a Service leads to, and their port."""
        for name, spec in self.of("Service"):
            for each in spec["ports"]:
                if name == service and port in (each["name"], each["port"]):
                    for pods in self.selected(spec["selector"]):
                        yield pods, each["targetPort"]

    def admits(self, source: Pods, target: Pods, port: str | int) -> bool:
        """Whether the policies let a connection leave its source and enter its target."""
        return self._passes(source, "Egress", "to", target, port, target) and self._passes(
            target, "Ingress", "from", source, port, target
        )

    def _passes(self, subject: Pods, direction: str, peer: str, other: Pods, port: str | int, target: Pods) -> bool:
        policies = [
            spec
            for _, spec in self.of("NetworkPolicy")
            if direction in spec["policyTypes"] and subject in self.selected(spec["podSelector"]["matchLabels"])
        ]
        rules = [rule for spec in policies for rule in spec[direction.lower()]]
        return not policies or any(
            (peer not in rule or any(other in self._peers(one) for one in rule[peer]))
            and target.number(port) in [target.number(each["port"]) for each in rule["ports"]]
            for rule in rules
        )

    def _peers(self, peer: Manifest) -> list[Pods]:
        return self.selected(peer["podSelector"]["matchLabels"]) if "podSelector" in peer else []


def loose_ends(manifests: list[Manifest]) -> list[str]:
    """Every selector, port, config map, file, policy and host name that meets nothing, or not what it should."""
    cluster = Cluster(manifests)
    checks: tuple[Callable[[Cluster], Iterator[str]], ...] = (_pods, _services, _policies, _ingresses, _nginx)
    return [end for check in checks for end in check(cluster)]


def _pods(cluster: Cluster) -> Iterator[str]:
    for name, spec in cluster.of("Deployment"):
        if not spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items():
            yield f"Deployment {name} does not select its own pods"
        if len(cluster.selected(spec["selector"]["matchLabels"])) > 1:
            yield f"Deployment {name} selects the pods of another, too"
    for pods in cluster.pods:
        volumes = {volume["name"]: volume for volume in pods.spec["volumes"]}
        mounts = [mount["name"] for container in pods.spec["containers"] for mount in container["volumeMounts"]]
        if sorted(mounts) != sorted(volumes):
            yield f"{pods.name} mounts {mounts} and has {list(volumes)}"
        for volume in volumes.values():
            if "configMap" in volume and volume["configMap"]["name"] not in cluster.config_maps:
                yield f"{pods.name} mounts a config map that is missing"
        for container in pods.spec["containers"]:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe in container and not pods.listen_on(container[probe]["httpGet"]["port"]):
                    yield f"{probe} of {pods.name} asks a port that is not there"


def _services(cluster: Cluster) -> Iterator[str]:
    for name, spec in cluster.of("Service"):
        if len(cluster.selected(spec["selector"])) != 1:
            yield f"Service {name} selects the pods of {len(cluster.selected(spec['selector']))} Deployments"
        for pods in cluster.selected(spec["selector"]):
            for port in spec["ports"]:
                if not pods.listen_on(port["targetPort"]):
                    yield f"Service {name} leads to port {port['targetPort']}, which {pods.name} has not"


def _policies(cluster: Cluster) -> Iterator[str]:
    for name, spec in cluster.of("PodDisruptionBudget"):
        if not cluster.selected(spec["selector"]["matchLabels"]):
            yield f"PodDisruptionBudget {name} selects no pods"
    for name, spec in cluster.of("NetworkPolicy"):
        subjects = cluster.selected(spec["podSelector"]["matchLabels"])
        if not subjects:
            yield f"NetworkPolicy {name} selects no pods"
        for rule in spec["ingress"]:
            for peer in rule.get("from", ()):
                if "podSelector" in peer and not cluster.selected(peer["podSelector"]["matchLabels"]):
                    yield f"NetworkPolicy {name} admits pods that do not exist"
            for port in rule["ports"]:
                if not all(pods.listen_on(port["port"]) for pods in subjects):
                    yield f"NetworkPolicy {name} admits to port {port['port']}, on which nothing listens"
        for rule in spec["egress"]:
            for peer in rule.get("to", ()):
                targets = cluster.selected(peer["podSelector"]["matchLabels"])
                if not targets:
                    yield f"NetworkPolicy {name} lets connections out to pods that do not exist"
                for port in rule["ports"]:
                    if not all(pods.listen_on(port["port"]) for pods in targets):
                        yield f"NetworkPolicy {name} lets connections out to port {port['port']}, which is not there"


def _ingresses(cluster: Cluster) -> Iterator[str]:
    for name, spec in cluster.of("Ingress"):
        for rule in spec["rules"]:
            for path in rule["http"]["paths"]:
                service = path["backend"]["service"]
                if not list(cluster.behind(service["name"], service["port"]["name"])):
                    yield f"Ingress {name} leads to {service['name']}, behind which is nothing"


def _nginx(cluster: Cluster) -> Iterator[str]:
    """The files that nginx reads, the port on which it listens, and the servers to which it connects."""
    for pods in cluster.pods:
        mounted = {
            name: text
            for volume in pods.spec["volumes"]
            if "configMap" in volume
            for name, text in cluster.config_maps.get(volume["configMap"]["name"], {}).items()
        }
        if "nginx.conf" not in mounted:
            continue
        for name in re.findall(r"^\s*include (\S+);", mounted["nginx.conf"], re.MULTILINE):
            if name not in mounted:
                yield f"{pods.name} has no {name}, which nginx.conf includes"
        (page,) = re.findall(r"location ~ \^/\((index\S+)\)\?\\z", mounted["nginx.conf"])
        if missing := {name.replace("\\", "") for name in page.split("|")} - mounted.keys():
            yield f"{pods.name} has no {missing} of the page"
        listen = [int(port) for port in re.findall(r"^listen (\d+);", mounted.get("listen.conf", ""), re.MULTILINE)]
        if listen != list(pods.ports.values()):
            yield f"{pods.name} listens on {listen}, not on its port"
        servers = re.findall(r"^\s*server (\S+):(\d+)\b", mounted.get("upstream.conf", ""), re.MULTILINE)
        if not servers:
            yield f"{pods.name} has no server"
        for host, port in servers:
            targets = list(cluster.behind(host, int(port)))
            if not targets:
                yield f"nginx asks {host}:{port}, which is no port of a Service"
            for target, target_port in targets:
                if not cluster.admits(pods, target, target_port):
                    yield f"the policies do not let {pods.name} connect to {target.name}"
