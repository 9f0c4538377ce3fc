"""Settings: a file, changed by the environment, then by the command line. What TorchServe reads agrees with it."""

from __future__ import annotations

import re
import subprocess
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from etenet.errors import UsageError
from etenet.serving import launcher, properties
from etenet.serving.config import ServerConfig, from_environment, request_log
from etenet.serving.loopback import Address
from tests.conftest import REPOSITORY

SHIPPED = REPOSITORY / "config.properties"
# Kubernetes names these after a service; none is a setting.
OF_KUBERNETES = {
    **{"ETENET_PORT": "tcp://10.0.0.1:8080", "ETENET_SERVICE_PORT": "8080", "ETENET_SERVICE_HOST": "10.0.0.1"},
    **{"ETENET_METRICS_PORT": "tcp://10.0.0.2:8083", "ETENET_METRICS_PORT_8083_TCP_ADDR": "10.0.0.2"},
}


def written(text: str) -> dict[str, str]:
    """What TorchServe sees: the last value of each key. Source: java.util.Properties."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_every_setting_of_the_file_can_be_given_by_the_environment() -> None:
    shipped = written(SHIPPED.read_text())
    for key in shipped:
        otherwise = "http://127.0.0.1:17" if key.endswith("_address") else "17"
        value = {"request_log": "off", "cors_allowed_origin": "*"}.get(key, otherwise)
        config = ServerConfig.read(SHIPPED, {f"ETENET_{key.upper()}": value})
        assert written(config.text) == shipped | {key: value}


def test_the_environment_changes_what_the_server_uses() -> None:
    variables = {"ETENET_JOB_QUEUE_SIZE": "5", "ETENET_REQUEST_LOG": "json", "ETENET_DRAIN_DEADLINE_S": "1.5"}
    config = ServerConfig.read(SHIPPED, variables | {"ETENET_MAX_REQUEST_SIZE": ""})
    assert (config.queue, config.request_log, config.drain_deadline_s) == (5, "json", 1.5)
    assert config.max_body_bytes == ServerConfig.read(SHIPPED).max_body_bytes


def test_a_file_without_a_setting_takes_it_from_the_environment_too(tmp_path: Path) -> None:
    (tmp_path / "small.properties").write_text("inference_address=http://127.0.0.1:9000")
    config = ServerConfig.read(tmp_path / "small.properties", {"ETENET_JOB_QUEUE_SIZE": "32"})
    assert config.queue == 32
    assert written(config.text) == {"inference_address": "http://127.0.0.1:9000", "job_queue_size": "32"}


def test_addresses_of_different_hosts_may_have_the_same_port() -> None:
    config = ServerConfig.read(SHIPPED, {"ETENET_INFERENCE_ADDRESS": "http://10.1.2.3:8083"})
    assert config.inference.port == config.exporter.port


def test_variables_that_are_no_settings_change_nothing() -> None:
    assert ServerConfig.read(SHIPPED, OF_KUBERNETES) == ServerConfig.read(SHIPPED)


@pytest.mark.parametrize("port", [1, 9000, 65532])
def test_the_other_ports_move_along_with_the_port_of_captions(port: int) -> None:
    config = ServerConfig.read(SHIPPED, port=port)
    before = ServerConfig.read(SHIPPED)
    for address, old in zip(config.addresses, before.addresses, strict=True):
        assert (address.host, address.port - port) == (old.host, old.port - before.inference.port)
    seen = written(config.text)
    assert seen["inference_address"] == f"http://0.0.0.0:{port}"
    assert seen["metrics_address"] == f"http://127.0.0.1:{port + 2}"


@pytest.mark.parametrize("exporter", ["0.0.0.0", "127.0.0.1"])
def test_the_host_moves_captions_and_what_shared_their_host(exporter: str) -> None:
    variables = {"ETENET_EXPORTER_ADDRESS": f"http://{exporter}:8083"}
    config, before = ServerConfig.read(SHIPPED, variables, host="10.1.2.3"), ServerConfig.read(SHIPPED)
    assert config.inference.host == "10.1.2.3"
    assert config.exporter.host == ("10.1.2.3" if exporter == "0.0.0.0" else exporter)
    assert (config.management, config.metrics) == (before.management, before.metrics)
    assert [address.port for address in config.addresses] == [address.port for address in before.addresses]


def test_the_command_line_counts_more_than_the_environment() -> None:
    assert ServerConfig.read(SHIPPED, {"ETENET_INFERENCE_ADDRESS": "http://127.0.0.1:7000"}, port=9000).inference == (
        ServerConfig.read(SHIPPED, host="127.0.0.1", port=9000).inference
    )


@pytest.mark.parametrize(
    ("variables", "port", "named"),
    [
        ({}, 65533, "--port 65533"),
        (
            {"ETENET_JOB_QUEUE_SIZE": "many"},
            None,
            "job_queue_size must be a whole number from 1 to 2147483647, got 'many'",
        ),
        *(
            (
                {f"ETENET_{name.upper()}": address},
                None,
                f"{named} have the same port {address[-4:]}; give one .* another",
            )
            for name, address, named in (
                ("inference_address", "http://0.0.0.0:8083", "inference_address and exporter_address"),
                ("inference_address", "http://127.0.0.1:8083", "inference_address and exporter_address"),
                ("inference_address", "http://0.0.0.0:8082", "inference_address and metrics_address"),
                ("management_address", "http://127.0.0.1:8083", "management_address and exporter_address"),
            )
        ),
        ({"ETENET_REQUEST_LOG": "xml"}, None, "request_log must be plain, json, off, got 'xml'"),
        ({"ETENET_CORS_ALLOWED_ORIGIN": "https://app.example.org/"}, None, "without a slash at its end.*example.org/'"),
        ({"ETENET_CORS_ALLOWED_ORIGIN": "app.example.org"}, None, "cors_allowed_origin must be an origin"),
        ({"ETENET_CORS_ALLOWED_ORIGIN": "https://b\u00fccher.example"}, None, "cors_allowed_origin must be an origin"),
        *(
            ({"ETENET_EXPORTER_ADDRESS": text}, None, "exporter_address must look like http://127.0.0.1:8083")
            for text in ("http://x:y", "0.0.0.0:8083", "https://0.0.0.0:8083", "http://")
        ),
        *(
            ({"ETENET_JOB_QUEUE_SIZE": text}, None, f"job_queue_size must be a whole .*, got '{text}'")
            for text in ("inf", "nan", "0", "-1", "12.5", "6e1", "1_0", "64 ", "2147483648", "\u0663")
        ),
        *(
            ({"ETENET_DRAIN_DEADLINE_S": text}, None, f"drain_deadline_s must be a number of at least 0, got '{text}'")
            for text in ("inf", "nan", "soon", "-5")
        ),
    ],
)
def test_a_wrong_setting_is_named(variables: dict[str, str], port: int | None, named: str) -> None:
    with pytest.raises(UsageError, match=named.replace("[", r"\[")):
        ServerConfig.read(SHIPPED, variables, port=port)


def test_a_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (config := tmp_path / "config.properties").write_bytes("# café\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"config\.properties is not UTF-8; save it as UTF-8"):
        ServerConfig.read(config)


def test_a_setting_that_the_shipped_file_leaves_out_can_be_given_too() -> None:
    assert ServerConfig.read(SHIPPED, {"ETENET_MANAGEMENT_ADDRESS": "http://127.0.0.1:7001"}).management == Address(
        "127.0.0.1", 7001
    )


SETTINGS: dict[str, Any] = yaml.safe_load((REPOSITORY / "handler" / "model-config.yaml").read_text())


def flat(settings: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (key, *inside)
        for key, value in settings.items()
        for inside in (flat(value) if isinstance(value, dict) else [()])
    ]


@pytest.mark.parametrize("path", flat(SETTINGS), ids=".".join)
def test_every_setting_of_the_archive_can_be_given_by_the_environment(path: tuple[str, ...]) -> None:
    words = "_".join(path if path[0] != "etenet" else path[1:])
    name = "ETENET_" + "".join(f"_{letter}" if letter.isupper() else letter for letter in words).upper()
    changed = SETTINGS | from_environment(SETTINGS, {name: "17"})
    for key in flat(SETTINGS):
        before = value(SETTINGS, key)
        assert value(changed, key) == (type(before)(17) if key == path else before)


def value(settings: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        settings = settings[key]
    return settings


def test_a_wrong_setting_of_the_archive_is_named() -> None:
    with pytest.raises(UsageError, match="ETENET_GPU_WORKERS must be a number like 1, got 'two'"):
        from_environment(SETTINGS, {"ETENET_GPU_WORKERS": "two"})


def test_a_variable_with_which_no_worker_would_start_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model-config.yaml").write_text(yaml.safe_dump(SETTINGS))
    monkeypatch.setenv("ETENET_MIN_WORKERS", "2")
    with pytest.raises(UsageError, match="minWorkers must be at most maxWorkers, which is 1, got 2"):
        launcher._set_up(tmp_path, 0)


@pytest.mark.parametrize("origin", ["", "*", "https://app.example.org", "http://[::1]:3000", "capacitor://localhost"])
def test_one_setting_lets_the_pages_of_another_origin_in(origin: str) -> None:
    assert ServerConfig.read(SHIPPED).cors_allowed_origin == ""
    assert ServerConfig.read(SHIPPED, {"ETENET_CORS_ALLOWED_ORIGIN": origin}).cors_allowed_origin == origin


@pytest.mark.parametrize("key", ["job_queue_size", "max_request_size", "max_response_size", "number_of_netty_threads"])
@pytest.mark.parametrize("text", ["2147483648", "6e7", "67_108_864", "12.5", "-1", "", "64 kB"])
def test_a_number_that_java_cannot_read_is_refused_before_java_starts(key: str, text: str, tmp_path: Path) -> None:
    (config := tmp_path / "own").write_text(f"{key}={text}")
    with pytest.raises(
        UsageError, match=rf"^{config}: {key} must be a whole number from . to 2147483647, got '{text}'$"
    ):
        ServerConfig.read(config)


def test_the_largest_number_of_java_is_read_and_no_gpu_is_a_number(tmp_path: Path) -> None:
    (config := tmp_path / "own").write_text("max_request_size=2147483647\nnumber_of_gpu=0\njob_queue_size=007")
    read = ServerConfig.read(config)
    assert (read.max_body_bytes, read.queue) == (2147483647, 7)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("job_queue_sise", "job_queue_size"),
        ("job-queue-size", "job_queue_size"),
        ("jobQueueSize", "job_queue_size"),
        ("JOB_QUEUE_SIZE", "job_queue_size"),
        ("drain_deadline", "drain_deadline_s"),
        ("request_logs", "request_log"),
        ("exporter_adress", "exporter_address"),
        ("managment_address", "management_address"),
        ("cors_allowed_origins", "cors_allowed_origin"),
        ("defualt_response_timeout", "default_response_timeout"),
    ],
)
def test_a_misspelt_setting_is_named_with_the_one_that_is_meant(key: str, meant: str, tmp_path: Path) -> None:
    (config := tmp_path / "own").write_text(f"# mine\n{key}=10")
    with pytest.raises(UsageError, match=rf"^{config}, line 2: no setting is called {key}; write {meant}, or leave it"):
        ServerConfig.read(config)


def test_no_setting_of_torchserve_counts_as_misspelt() -> None:
    """Nor does any other word of the class that reads them. Constants: the JVM specification, chapter 4.4.7."""
    (jar,) = Path(sysconfig.get_path("purelib"), "ts", "frontend").glob("model-server.jar")
    code = zipfile.ZipFile(jar).read("org/pytorch/serve/util/ConfigManager.class")
    words = {
        word.decode() for length, word in re.findall(rb"\x01\0(.)([a-z]+(?:_[a-z]+)+)", code) if len(word) == length[0]
    }
    assert properties.SETTINGS - words <= {*properties.OF_ETENET, "debug", "keystore", "models", "version"}
    for word in words:
        assert properties.parsed(Path("own"), f"{word}=1") == {word: "1"}


def test_a_setting_of_another_program_is_left_to_it(tmp_path: Path) -> None:
    (config := tmp_path / "own").write_text("of_my_plugin=1\n!job_queue_sise=1\n#job_queue_sise=1\n")
    assert written(ServerConfig.read(config).text)["of_my_plugin"] == "1"


@pytest.mark.parametrize("line", ["drain_deadline_s: 10", "drain_deadline_s 10", "drain_deadline_s"])
def test_a_setting_without_an_equals_sign_is_named(line: str, tmp_path: Path) -> None:
    (config := tmp_path / "own").write_text(line)
    with pytest.raises(UsageError, match=r"line 1: drain_deadline_s has no value; write drain_deadline_s=VALUE$"):
        ServerConfig.read(config)


def test_a_file_as_an_editor_of_windows_writes_it_is_read_by_etenet_and_by_java(tmp_path: Path) -> None:
    (config := tmp_path / "own").write_bytes("\ufeffrequest_log=json\r\njob_queue_size=64 \r\n".encode())
    read = ServerConfig.read(config)
    assert (read.request_log, read.queue) == ("json", 64)
    assert written(read.text) == {"request_log": "json", "job_queue_size": "64"}
    assert request_log(config, {}) == "json"


@pytest.mark.parametrize("name", ["JOB_QUEUE_SISE", "DRAIN_DEADLINE", "REQUEST_LOGS", "JOBQUEUESIZE", "CORE"])
def test_a_misspelt_variable_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=f"^no setting is called ETENET_{name}; write ETENET_.*, or unset it$"):
        ServerConfig.read(SHIPPED, {f"ETENET_{name}": "1"})
    assert ServerConfig.read(SHIPPED, {f"ETENET_{name}": ""}) == ServerConfig.read(SHIPPED)


def test_a_misspelt_variable_of_the_archive_is_named() -> None:
    with pytest.raises(
        UsageError, match=r"^no setting is called ETENET_GPU_WORKER; write ETENET_GPU_WORKERS, or unset it$"
    ):
        from_environment(SETTINGS, {"ETENET_GPU_WORKER": "2"})


def test_no_variable_that_this_repository_names_counts_as_misspelt() -> None:
    command = ["git", "grep", "-hoIE", "ETENET_[A-Z_]*[A-Z]", "--", "src", "handler", "deploy", "docs", "Makefile"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in {"ETENET_CORES", "ETENET_SERVER_KEY", *listed.split()}:
        for settings in (written(SHIPPED.read_text()), SETTINGS):
            from_environment(settings, {name: "17"})
