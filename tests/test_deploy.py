"""The files of deploy/, tried with the real programs and against the published schemas."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from benchmarks.rig.servers import free_ports
from etenet.serving.config import ServerConfig
from tests.conftest import DEMO, EXAMPLES, REPOSITORY, Server, ask, is_open, running_server, wait_until
from tests.front import program

DEPLOY = REPOSITORY / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "etenet.json").read_text())
CLIP = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes()
WAITS = 'etenet_stage_duration_seconds_count{stage="wait"}'
QUERIES = {
    f"{panel['title']}, {target['legendFormat']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian's Prometheus with our rules, after it scraped a busy server every second."""
    folder, (port,) = tmp_path_factory.mktemp("prometheus"), free_ports(1)
    with running_server("--checkpoint", str(DEMO)) as server:
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(ALERTS)]
        where = {"etenet": server.exporter, "torchserve": server.torchserve}
        for job in config["scrape_configs"]:
            job["static_configs"] = [{"targets": [where[job["job_name"]].removeprefix("http://")]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        process = subprocess.Popen(
            [
                *(program("prometheus"), f"--config.file={folder / 'prometheus.yml'}"),
                *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"),
            ],
            stderr=subprocess.DEVNULL,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: is_open(port) and ask(f"{url}/-/ready").status == 200, 30)
            wait_until(lambda: values(url, "up") == [1.0] * len(where), 30)
            for count in (1.0, 2.0):  # a rate needs two scrapes that differ
                work(server)
                wait_until(lambda count=count: values(url, WAITS) == [count], 30)  # type: ignore[misc]
            captions = "etenet_captions_total"
            wait_until(lambda: values(url, captions) == values(url, f"{captions} offset 2s") != [], 30)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def values(url: str, query: str) -> list[float]:
    response = ask(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
    assert response.status == 200, response.body
    return [float(sample["value"][1]) for sample in response.json()["data"]["result"]]


def work(server: Server) -> None:
    """Captions, errors and refusals, and at last a caption that waited."""
    with ThreadPoolExecutor(64) as clients:
        statuses = {response.status for response in clients.map(server.caption, [CLIP] * 96 + [b"text"] * 4)}
    assert {200, 503} <= statuses
    wait_until(lambda: "Requests5XX" in ask(f"{server.torchserve}/metrics").body.decode(), 10)
    assert server.caption(CLIP, X_Request_Start=f"t={time.time() - 1}").status == 200


@pytest.mark.parametrize("expression", QUERIES.values(), ids=QUERIES.keys())
def test_every_panel_shows_something(prometheus: str, expression: str) -> None:
    filled = expression.replace("$__rate_interval", "1m").replace("$instance", ".*")
    assert "$" not in filled
    figures = values(prometheus, filled)
    assert figures
    assert all(figure == figure for figure in figures), f"not a number: {filled}"


def test_every_alert_is_valid_and_every_series_in_it_exists(prometheus: str) -> None:
    groups = ask(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    loaded = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert {rule["alert"] for rule in alerts()} == set(loaded)
    assert {rule["health"] for rule in loaded.values()} == {"ok"}
    for rule in alerts():
        for series in re.findall(r"\b(?:etenet_\w+|Requests5XX|up)\b", rule["expr"]):
            assert values(prometheus, series), series


def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool = program("promtool")
    for arguments in (
        ["check", "config", str(DEPLOY / "prometheus" / "prometheus.yml")],
        ["test", "rules", str(REPOSITORY / "tests" / "alerts.yml")],
    ):
        subprocess.run([promtool, *arguments], check=True)
    trials = yaml.safe_load((REPOSITORY / "tests" / "alerts.yml").read_text())["tests"]
    fired = {trial["alertname"] for test in trials for trial in test["alert_rule_test"] if trial["exp_alerts"]}
    assert fired == {rule["alert"] for rule in alerts()}


def test_the_alert_of_a_server_that_is_down_knows_the_jobs_of_the_operator() -> None:
    """Without a `jobLabel` a job is called after its service, which for a canary is etenet-canary."""
    monitor = yaml.safe_load((DEPLOY / "kubernetes" / "monitoring.yaml").read_text())
    server = yaml.safe_load_all((DEPLOY / "kubernetes" / "server" / "server.yaml").read_text())
    (labels,) = (each["metadata"]["labels"] for each in server if each["kind"] == "Service")
    (down,) = (alert["expr"] for alert in alerts() if alert["alert"] == "EtenetDown")
    assert down == f'up{{job="{labels[monitor["spec"]["jobLabel"]]}"}} == 0'


def test_the_manual_explains_each_alert() -> None:
    sections = re.findall(r"^### (\w+)$", (REPOSITORY / "docs" / "operating.md").read_text(), re.MULTILINE)
    assert sections == [rule["alert"] for rule in alerts()]


def test_grafana_knows_every_key_of_the_dashboard() -> None:
    read = json.loads(json.dumps(Dashboard.from_json(DASHBOARD), cls=JSONEncoder))
    assert within(DASHBOARD, read) == []


def within(part: Any, whole: Any, path: str = "") -> list[str]:
    """The paths of what is in `part` and not in `whole`."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return [
            missing
            for key, value in part.items()
            for missing in (within(value, whole[key], f"{path}.{key}") if key in whole else [f"{path}.{key}"])
        ]
    if isinstance(part, list) and isinstance(whole, list) and len(part) == len(whole):
        return [
            missing
            for number, (one, other) in enumerate(zip(part, whole, strict=True))
            for missing in within(one, other, f"{path}[{number}]")
        ]
    return [] if part == whole else [f"{path}: {part!r} became {whole!r}"]


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    subprocess.run([Path(sys.executable).with_name("hadolint"), str(REPOSITORY / "Dockerfile")], check=True)


def test_the_compose_file_is_valid_and_all_files_that_it_mounts_exist() -> None:
    composition = DEPLOY / "compose.yaml"
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    subprocess.run([*checker, str(composition)], check=True)
    services = yaml.safe_load(composition.read_text())["services"]
    mounts = [mount for service in services.values() for mount in service.get("volumes", [])]
    for mount in mounts:
        if mount.startswith("."):
            assert (DEPLOY / mount.partition(":")[0]).exists(), mount


def test_the_composition_waits_longer_than_a_shutdown_takes() -> None:
    drain_s = ServerConfig.read(DEPLOY / "container.properties").drain_deadline_s
    composition = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert int(composition["services"]["etenet"]["stop_grace_period"].rstrip("s")) >= drain_s + 30


def test_nginx_listens_on_the_port_that_the_composition_publishes() -> None:
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["nginx"]
    mounted = {target: DEPLOY / source for source, target, *_ in (mount.split(":") for mount in service["volumes"])}
    listening = re.findall(r"^listen (\d+);", mounted["/etc/nginx/listen.conf"].read_text(), re.MULTILINE)
    assert [mapping.partition(":")[2] for mapping in service["ports"]] == listening


def test_values_that_stand_in_several_files_are_equal() -> None:
    def settings(path: Path) -> dict[str, str]:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        values = dict(line.split("=", 1) for line in lines)
        return {key: value for key, value in values.items() if key not in ("metrics_address", "exporter_address")}

    assert settings(DEPLOY / "container.properties") == settings(REPOSITORY / "config.properties")
    outside, here = (
        ServerConfig.read(path) for path in (DEPLOY / "container.properties", REPOSITORY / "config.properties")
    )
    assert {outside.metrics.host, outside.exporter.host} == {"0.0.0.0"}
    assert {here.metrics.host, here.exporter.host} == {"127.0.0.1"}
    assert outside.management is here.management is None
    container, local = (
        path.read_text() for path in (DEPLOY / "container-upstream.conf", DEPLOY / "nginx/upstream.conf")
    )
    assert container.replace("etenet:8080", "127.0.0.1:8080") == local


def scaling_query() -> str:
    scaled = yaml.safe_load((DEPLOY / "kubernetes" / "scaling.yaml").read_text())
    return str(scaled["spec"]["triggers"][0]["metadata"]["query"])


def test_the_scaling_query_returns_a_value(prometheus: str) -> None:
    (seconds_per_second,) = values(prometheus, scaling_query())
    assert seconds_per_second > 0


def test_the_pages_name_files_that_there_are() -> None:
    pages = [REPOSITORY / "README.md", REPOSITORY / "SECURITY.md", *(REPOSITORY / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"\bdeploy/[\w./-]*\w", page.read_text())}
    assert named
    assert not [name for name in sorted(named) if not (REPOSITORY / name).exists()]
