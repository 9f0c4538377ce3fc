"""docs/openapi.yaml against a live server, to which schemathesis sends requests, and against the table of options."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

import etenet
from etenet.captioning.options import HEADER_PREFIX, OPTIONS, CaptionOptions, Option
from etenet.errors import BadOption, CaptionError
from tests.conftest import EXAMPLES, REPOSITORY, Server
from tests.front import behind_nginx, nginx, responding, with_keys

CONTRACT = schemathesis.openapi.from_path(REPOSITORY / "docs" / "openapi.yaml")
CAPTIONS = CONTRACT.include(path_regex="etenet$")
OPERATION = CONTRACT.exclude(path_regex="etenet$")
CLIPS = [REPOSITORY / "examples" / name for name in EXAMPLES]
patiently = settings(max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def front(server: Server) -> Iterator[Server]:
    with behind_nginx(server) as behind:
        yield behind


@CAPTIONS.parametrize()
@patiently
def test_every_response_is_one_that_the_contract_allows(case: schemathesis.Case, front: Server) -> None:
    """Bodies made from a schema are not videos, so all of them may be refused."""
    case.call_and_validate(base_url=front.inference, excluded_checks=[positive_data_acceptance])


@OPERATION.parametrize()
@patiently
def test_every_response_to_a_probe_is_one_that_the_contract_allows(case: schemathesis.Case, server: Server) -> None:
    case.call_and_validate(base_url=server.exporter)


@pytest.mark.parametrize("path", ["/predictions/etenet", "/explanations/etenet"])
@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.stem)
def test_a_caption_is_one_that_the_contract_allows(front: Server, path: str, clip: Path) -> None:
    segments = {"X-Etenet-Segment-S": "1"}
    captions = ({}, {"X-Etenet-Captions": "5"}, {"Accept": "text/plain"})
    for headers in (*captions, segments, {**segments, "Accept": "text/vtt"}):
        case = CONTRACT[path]["PUT"].Case(
            body=clip.read_bytes(), media_type="application/octet-stream", headers=headers
        )
        response = case.call(base_url=front.inference)
        assert response.status_code == 200
        case.validate_response(response)


def test_a_refusal_for_want_of_a_key_is_one_that_the_contract_allows() -> None:
    case = CONTRACT["/predictions/etenet"]["PUT"].Case(body=b"clip", media_type="application/octet-stream")
    with responding(lambda _: None) as upstream, nginx(upstream, with_keys("key")) as port:
        response = case.call(base_url=f"http://127.0.0.1:{port}")
    assert response.status_code == 401
    case.validate_response(response)


PARAMETERS = CONTRACT.raw_schema["components"]["parameters"]
FORM = CONTRACT.raw_schema["components"]["schemas"]["VideoForm"]


def schema_of(option: Option) -> dict[str, Any]:
    bounds = {"minimum": option.least, "maximum": option.most}
    return {
        "type": {int: "integer", float: "number", str: "string"}[option.kind],
        **{name: bound for name, bound in bounds.items() if math.isfinite(bound)},
        **({"enum": list(option.choices)} if option.choices else {}),
    }


def test_headers_are_those_of_the_table_of_options() -> None:
    defaults = {option.header: {} if option.default is None else {"default": option.default} for option in OPTIONS}
    schemas = {
        parameter["name"]: parameter["schema"]
        for parameter in PARAMETERS.values()
        if parameter["name"].startswith(HEADER_PREFIX)
    }
    assert schemas == {option.header: schema_of(option) | defaults[option.header] for option in OPTIONS}
    for path in ("/predictions/etenet", "/explanations/etenet"):
        used = [each["$ref"].rpartition("/")[2] for each in CONTRACT.raw_schema["paths"][path]["parameters"]]
        assert used == list(PARAMETERS)


def test_form_fields_are_those_of_the_table_of_options() -> None:
    fields = {name: schema for name, schema in FORM["properties"].items() if name != "data"}
    assert fields == {option.name: schema_of(option) for option in OPTIONS}


def test_the_reference_has_the_table_of_options() -> None:
    rows = [row.strip("| ").split(" | ") for row in (REPOSITORY / "docs" / "http.md").read_text().splitlines()]
    cells = {row[0]: row[2:] for row in rows if row[0].startswith("`X-Etenet-") and len(row) == 4}
    assert list(cells) == [f"`{option.header}` (`{option.name}`)" for option in OPTIONS]
    for option, (values, default) in zip(OPTIONS, cells.values(), strict=True):
        assert values.strip("`").startswith(option.range)
        assert default.startswith(option.otherwise if option.default is None else f"{option.default:g}")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_an_option_takes_the_values_of_the_table_and_no_others(option: Option) -> None:
    def parse(value: object) -> None:
        CaptionOptions.parse({"beam_size": "10", option.name: str(value)})

    step = 1 if option.kind is int else 0.001
    for good in (option.least, option.most, *option.choices):
        if isinstance(good, str) or math.isfinite(good):
            parse(good)
    for bad in (option.least - step, option.most + step, "nonsense", ""):
        if isinstance(bad, str) or math.isfinite(bad):
            with pytest.raises(BadOption, match=option.name):
                parse(bad)


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert CONTRACT.raw_schema["info"]["version"] == etenet.__version__ == project["version"]


def test_it_lists_every_code_of_an_error() -> None:
    codes = CONTRACT.raw_schema["components"]["schemas"]["Reason"]["properties"]["code"]["enum"]
    assert {kind.code for kind in CaptionError.__subclasses__()} <= set(codes)
    assert codes == sorted(codes)
