"""The file config.properties: its lines, the names of its settings, and the numbers that TorchServe reads of it.

Java ignores a setting that it does not know, and ends with a trace at a number that it cannot read. Here both are
refused in one line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path

from etenet.errors import UsageError

OF_ETENET = ("drain_deadline_s", "exporter_address", "request_log")
# Source: ConfigManager of TorchServe 0.12, whose methods for an `int` call Integer.parseInt.
_FROM_ZERO = "default_workers_per_model netty_client_threads number_of_gpu number_of_netty_threads"
_FROM_ONE = """
    default_response_timeout default_startup_timeout grpc_inference_port grpc_management_port initial_distribution_port
    initial_worker_port io_ratio job_queue_size max_request_size max_response_size metric_time_interval
    unregister_model_timeout
"""
_OTHERS = """
    allowed_urls async_logging blacklist_env_vars certificate_file cors_allowed_headers cors_allowed_methods
    cors_allowed_origin cpp_log_config cpu_launcher_args cpu_launcher_enable debug decode_input_request
    default_service_handler disable_system_metrics disable_token_authorization enable_envvars_config enable_grpc_ssl
    enable_metrics_api enable_model_api grpc_inference_address grpc_inference_max_connection_age_grace_ms
    grpc_inference_max_connection_age_ms grpc_management_address grpc_management_max_connection_age_grace_ms
    grpc_management_max_connection_age_ms inference_address install_py_dep_per_model ipex_enable ipex_gpu_enable
    keystore keystore_pass keystore_type limit_max_image_pixels load_models management_address metrics_address
    metrics_config metrics_mode model_metrics_auto_detect model_server_home model_snapshot model_store models
    prefer_direct_buffer private_key_file service_envelope system_metrics_cmd token_expiration_min
    ts_header_key_sequence_end ts_header_key_sequence_id ts_header_key_sequence_start ts_open_inference_protocol
    use_env_allowed_urls use_native_io version workflow_store
"""
LEAST = dict.fromkeys(_FROM_ZERO.split(), 0) | dict.fromkeys(_FROM_ONE.split(), 1)  # of the whole numbers
MOST = 2**31 - 1  # of Java's int
SETTINGS = frozenset(OF_ETENET) | LEAST.keys() | set(_OTHERS.split())

_ALIKE = 0.8  # a misspelt name is, different names of settings seldom are


def text_of(path: Path) -> str:
    """Without the mark with which some editors begin a file, and without the spaces with which a line may end.

    Java would take both for a part of a name or a number. Raises `UsageError`.
    """
    try:
        return "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8; save it as UTF-8") from error


def parsed(path: Path, text: str) -> dict[str, str]:
    """The settings by their names; those of another TorchServe may have any name that is like none of these.

    Raises `UsageError` for one that is there twice, is nearly the name of another, or has no equals sign.
    """
    properties: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        key, separator, value = (part.strip() for part in line.partition("="))
        word = re.split(r"[\s:]", key, maxsplit=1)[0]
        if not separator and word in SETTINGS:
            raise UsageError(f"{path}, line {number}: {word} has no value; write {word}=VALUE")
        if not separator or key.startswith(("#", "!")):
            continue
        if key in properties:
            raise UsageError(f"{path}, line {number}: {key} is there twice; keep one of the two")
        if other := meant(key, SETTINGS):
            raise UsageError(f"{path}, line {number}: no setting is called {key}; write {other}, or leave it out")
        properties[key] = value
    return properties


def meant(name: str, names: Iterable[str]) -> str:
    """The one of `names` that `name` nearly is; empty if it is one of them, or like none."""
    names = set(names)
    alike = get_close_matches(name.lower(), sorted(names), n=1, cutoff=_ALIKE) if name not in names else []
    return alike[0] if alike else ""


def number(path: Path, properties: Mapping[str, str], key: str, default: float) -> float:
    """Raises `UsageError`, as for infinity and below 0."""
    text = properties.get(key, str(default))
    try:
        if math.isfinite(value := float(text)) and value >= 0:
            return value
        raise ValueError("not finite, or negative")
    except ValueError as error:
        raise UsageError(f"{path}: {key} must be a number of at least 0, got {text!r}") from error


def whole_numbers(path: Path, properties: Mapping[str, str]) -> dict[str, int]:
    """All that TorchServe reads as such. Raises `UsageError` for what it could not read."""
    for key, text in properties.items():
        if key in LEAST and not (re.fullmatch("[0-9]{1,10}", text) and LEAST[key] <= int(text) <= MOST):
            raise UsageError(f"{path}: {key} must be a whole number from {LEAST[key]} to {MOST}, got {text!r}")
    return {key: int(text) for key, text in properties.items() if key in LEAST}
