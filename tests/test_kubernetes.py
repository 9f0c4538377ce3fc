"""deploy/kubernetes: valid for Kubernetes, complete, and nginx runs as its pods run it."""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import etenet
from etenet.serving.config import ServerConfig
from etenet.serving.page import FOLDER, page
from tests.conftest import EXAMPLES, REPOSITORY, Server, ask, wait_until
from tests.front import edit, running_nginx
from tests.manifests import KUBERNETES, Cluster, Manifest, Pods, built, loose_ends

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is missing; Debian's is too old")

OVERLAYS = ("cpu", "gpu", "canary")
RELEASES = ("1.30", "1.37")  # the oldest that knows preStop's sleep, and the newest whose schemas there are
CLIP, CAPTION = next(iter(EXAMPLES.items()))


@cache
def _built(overlay: str) -> list[Manifest]:
    return built(KUBERNETES / overlay)


def manifests_of(overlay: str) -> list[Manifest]:
    return copy.deepcopy(_built(overlay))


def pods_of(overlay: str) -> dict[str, Pods]:
    return {pods.name: pods for pods in Cluster(manifests_of(overlay)).pods}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_kustomize_builds_is_valid_for_kubernetes_and_complete(overlay: str) -> None:
    manifests = manifests_of(overlay)
    for release in RELEASES:
        for manifest in manifests:
            kubernetes_validate.validate(manifest, release, strict=True)
    assert loose_ends(manifests) == []


def test_an_unknown_key_is_not_valid() -> None:
    (ingress,) = [manifest for manifest in manifests_of("cpu") if manifest["kind"] == "Ingress"]
    ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["serviceName"] = "etenet-proxy"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(ingress, RELEASES[0], strict=True)


BREAK: dict[str, tuple[str, str, Callable[[Any], object]]] = {
    "a selector of pods": ("Deployment", "etenet", lambda it: it["spec"]["selector"]["matchLabels"].update(app="x")),
    "a volume": ("Deployment", "etenet", lambda it: it["spec"]["template"]["spec"]["volumes"].clear()),
    "a probe": (
        *("Deployment", "etenet"),
        lambda it: it["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["httpGet"].update(port="live"),
    ),
    "a service's selector": ("Service", "etenet", lambda it: it["spec"]["selector"].update(app="x")),
    "a service of both versions": ("Service", "etenet", lambda it: it["spec"]["selector"].pop("track")),
    "a service's target": ("Service", "etenet", lambda it: it["spec"]["ports"][0].update(targetPort="https")),
    "a service's port": ("Service", "etenet-canary", lambda it: it["spec"]["ports"][0].update(port=80)),
    "a service's name": ("Service", "etenet-canary", lambda it: it["metadata"].update(name="canary")),
    "an ingress": ("Service", "etenet-proxy", lambda it: it["spec"]["ports"][0].update(name="web")),
    "a budget": ("PodDisruptionBudget", "etenet", lambda it: it["spec"]["selector"]["matchLabels"].update(app="x")),
    "a policy's pods": ("NetworkPolicy", "etenet", lambda it: it["spec"]["podSelector"]["matchLabels"].update(app="x")),
    "whom a policy admits": (
        *("NetworkPolicy", "etenet"),
        lambda it: it["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"].update(app="proxy"),
    ),
    "where a policy admits": ("NetworkPolicy", "etenet", lambda it: it["spec"]["ingress"][0]["ports"].pop()),
    "a policy's port": (
        *("NetworkPolicy", "etenet"),
        lambda it: it["spec"]["ingress"][1]["ports"][0].update(port="metrics"),
    ),
    "what a policy lets out": ("NetworkPolicy", "etenet-proxy", lambda it: it["spec"]["egress"].pop(0)),
    "where a policy lets out": (
        *("NetworkPolicy", "etenet-proxy"),
        lambda it: it["spec"]["egress"][0]["ports"][0].update(port=80),
    ),
    "a file that nginx includes": ("ConfigMap", "etenet-nginx", lambda it: it["data"].pop("listen.conf")),
    "where nginx listens": ("ConfigMap", "etenet-nginx", lambda it: it["data"].update({"listen.conf": "listen 80;"})),
    "whom nginx asks": ("ConfigMap", "etenet-nginx", lambda it: it["data"].update({"upstream.conf": ""})),
    "the page": ("ConfigMap", "etenet-page", lambda it: it["data"].pop("page.js")),
    "a config map": ("ConfigMap", "etenet-page", lambda it: it["metadata"].update(name="page")),
}


@pytest.mark.parametrize("broken", BREAK)
def test_a_broken_link_is_found(broken: str) -> None:
    kind, name, damage = BREAK[broken]
    manifests = manifests_of("canary")
    (manifest,) = [each for each in manifests if each["kind"] == kind and _plain(each) == name]
    damage(manifest)
    assert loose_ends(manifests)


def _plain(manifest: Manifest) -> str:
    """The name without the hash that kustomize appends to those of config maps."""
    name = str(manifest["metadata"]["name"])
    return name.rpartition("-")[0] if manifest["kind"] == "ConfigMap" else name


def test_the_config_maps_are_the_very_files_of_nginx_and_the_page() -> None:
    maps = {name.rpartition("-")[0]: data for name, data in Cluster(manifests_of("cpu")).config_maps.items()}
    assert maps["etenet-nginx"].pop("nginx.conf") == (REPOSITORY / "deploy/nginx/nginx.conf").read_text()
    assert maps["etenet-nginx"] == {
        name: (KUBERNETES / "base" / name).read_text() for name in ("listen.conf", "upstream.conf")
    }
    names = [Path(url).name for url in page() if url != "/"]
    assert maps["etenet-page"] == {name: (FOLDER / name).read_text() for name in names}


def test_a_gpu_overlay_gives_each_pod_of_the_server_a_gpu_and_changes_nothing_else() -> None:
    on_cpu, on_gpu = pods_of("cpu"), pods_of("gpu")
    assert on_gpu["etenet-proxy"] == on_cpu["etenet-proxy"]
    (container,), (before,) = on_gpu["etenet"].spec["containers"], on_cpu["etenet"].spec["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["resources"]["requests"] == before["resources"]["requests"]
    assert container["startupProbe"] == before["startupProbe"] | {"failureThreshold": 310}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp", "/var/cache/etenet"}
    assert on_gpu["etenet"].spec["tolerations"]


def test_the_canary_is_the_server_with_another_image() -> None:
    pods = pods_of("canary")
    assert pods.keys() == {"etenet", "etenet-canary", "etenet-proxy"}
    (container,), (canary,) = pods["etenet"].spec["containers"], pods["etenet-canary"].spec["containers"]
    assert canary["image"] != container["image"]
    assert canary | {"image": container["image"]} == container
    assert pods["etenet"] == pods_of("cpu")["etenet"]


def test_pods_have_the_time_and_the_ports_of_the_server() -> None:
    config, pods = ServerConfig.read(REPOSITORY / "deploy/container.properties"), pods_of("cpu")
    (server,), (proxy,) = pods["etenet"].spec["containers"], pods["etenet-proxy"].spec["containers"]
    where = {"http": config.inference.port, "torchserve": config.metrics.port, "exporter": config.exporter.port}
    assert pods["etenet"].ports == where
    assert server["image"] == f"etenet:{etenet.__version__}"
    for container, name, work_s in ((server, "etenet", config.drain_deadline_s + 25), (proxy, "etenet-proxy", 120)):
        needed_s = container["lifecycle"]["preStop"]["sleep"]["seconds"] + work_s
        assert pods[name].spec["terminationGracePeriodSeconds"] >= needed_s + 5
    composition = yaml.safe_load((REPOSITORY / "deploy/compose.yaml").read_text())
    assert proxy["image"] == composition["services"]["nginx"]["image"]


def test_prometheus_and_keda_find_what_they_name() -> None:
    services = {each["metadata"]["name"]: each for each in manifests_of("canary") if each["kind"] == "Service"}
    monitor, scaled = (yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text()) for name in ("monitoring", "scaling"))
    chosen = {
        name: {port["name"] for port in service["spec"]["ports"]}
        for name, service in services.items()
        if monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    }
    assert chosen.keys() == {"etenet", "etenet-canary"}
    assert all({endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports for ports in chosen.values())
    assert scaled["spec"]["scaleTargetRef"]["name"] in pods_of("cpu")


def test_the_probes_of_the_server_ask_for_what_answers(server: Server) -> None:
    (container,) = pods_of("cpu")["etenet"].spec["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == "exporter"
        assert ask(f"{server.exporter}{container[probe]['httpGet']['path']}").status == 200


@contextmanager
def running_proxy(upstream: int) -> Iterator[tuple[str, Path]]:
    """nginx with the command and the volumes of its pod, except for ports; its URL, and the folder that is its root."""
    pods, config_maps = pods_of("cpu")["etenet-proxy"], Cluster(manifests_of("cpu")).config_maps
    (container,) = pods.spec["containers"]
    volumes = {volume["name"]: volume for volume in pods.spec["volumes"]}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)  # nginx's workers are not root, even if root started it
        mounts = {mount["mountPath"]: root / mount["mountPath"].lstrip("/") for mount in container["volumeMounts"]}
        for mount in container["volumeMounts"]:
            (folder := mounts[mount["mountPath"]]).mkdir(parents=True, exist_ok=True)
            source = volumes[mount["name"]]
            for file, text in config_maps[source["configMap"]["name"]].items() if "configMap" in source else ():
                (folder / file).write_text(text)
        program, *words = container["command"]
        assert program == "nginx"
        arguments = [str(root / word.lstrip("/")) if word.startswith("/") else word for word in words]
        configuration = mounts["/etc/etenet"]
        upstreams = configuration / "upstream.conf"
        upstreams.write_text(upstreams.read_text().replace("etenet:8080", f"127.0.0.1:{upstream}"))
        edit(configuration / "listen.conf", "10.0.0.0/8", "127.0.0.0/8")
        with running_nginx(arguments, configuration / "listen.conf", root / "log") as port:
            yield f"http://127.0.0.1:{port}", root


def test_the_proxy_captions_and_shows_the_page(server: Server) -> None:
    with running_proxy(int(server.inference.rpartition(":")[2])) as (url, root):
        (container,) = pods_of("cpu")["etenet-proxy"].spec["containers"]
        for probe in ("readinessProbe", "livenessProbe"):
            assert ask(url + container[probe]["httpGet"]["path"]).status == 200
        for path, file in page().items():
            assert ask(url + path).body == file.content
        body = (REPOSITORY / "examples" / CLIP).read_bytes()
        passed = {"X-Forwarded-For": "192.0.2.1, 203.0.113.9, 192.168.0.7"}
        assert ask(f"{url}/predictions/etenet", body, passed).json()["caption"] == CAPTION
        # The client, as the nearest Ingress saw it.
        wait_until(lambda: "203.0.113.9 " in (root / "log").read_text(), 5)


def test_the_kustomization_that_the_manual_shows_takes_effect(tmp_path: Path) -> None:
    manual = (REPOSITORY / "docs" / "operating.md").read_text()
    (shown,) = re.findall(r"^    resources: .*?(?=\n\n)", manual, re.MULTILINE | re.DOTALL)
    own = textwrap.dedent(shown).replace("...", os.path.relpath(REPOSITORY, tmp_path))
    (tmp_path / "kustomization.yaml").write_text(own)
    cluster, asked = Cluster(built(tmp_path)), yaml.safe_load(own)
    (image,), (patch,) = asked["images"], yaml.safe_load(asked["patches"][0]["patch"])
    ((_, ingress),) = cluster.of("Ingress")
    assert ingress["rules"][0]["host"] == patch["value"]
    (server,) = [pods for pods in cluster.pods if pods.name == "etenet"]
    assert server.spec["containers"][0]["image"] == f"{image['newName']}:{image['newTag']}"
    assert loose_ends(cluster.manifests) == []
