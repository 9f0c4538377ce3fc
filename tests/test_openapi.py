"""docs/openapi.yaml against the live server: what schemathesis makes of it is answered as it says."""

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
from etenet.captioning.options import OPTIONS, CaptionOptions, Option
from etenet.errors import BadOption, CaptionError
from tests.conftest import EXAMPLES, REPOSITORY, Server
from tests.front import behind_nginx

CONTRACT = schemathesis.openapi.from_path(REPOSITORY / "docs" / "openapi.yaml")
CAPTIONS = CONTRACT.include(path_regex="etenet$")
OPERATION = CONTRACT.exclude(path_regex="etenet$")
CLIPS = [REPOSITORY / "examples" / name for name in EXAMPLES]
schemathesis.serializer.alias("video/mp4", "application/octet-stream")
patiently = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def front(server: Server) -> Iterator[Server]:
    with behind_nginx(server) as behind:
        yield behind


@CAPTIONS.parametrize()
@patiently
def test_whatever_is_sent_is_answered_as_the_contract_says(case: schemathesis.Case, front: Server) -> None:
    """Bodies made from a schema are no videos, so they may all be refused."""
    case.call_and_validate(base_url=front.inference, excluded_checks=[positive_data_acceptance])


@OPERATION.parametrize()
@patiently
def test_probes_are_answered_as_the_contract_says(case: schemathesis.Case, server: Server) -> None:
    case.call_and_validate(base_url=server.exporter)


@pytest.mark.parametrize("path", ["/predictions/etenet", "/explanations/etenet"])
@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.stem)
def test_a_caption_is_what_the_contract_says(front: Server, path: str, clip: Path) -> None:
    segments = {"X-Etenet-Segment-S": "1"}
    wishes = ({}, {"X-Etenet-Captions": "5"}, {"Accept": "text/plain"}, segments, {**segments, "Accept": "text/vtt"})
    for headers in wishes:
        case = CONTRACT[path]["PUT"].Case(body=clip.read_bytes(), media_type="video/mp4", headers=headers)
        response = case.call(base_url=front.inference)
        assert response.status_code == 200
        case.validate_response(response)


PARAMETERS = CONTRACT.raw_schema["components"]["parameters"]
FORM = CONTRACT.raw_schema["components"]["requestBodies"]["Video"]["content"]["multipart/form-data"]["schema"]


def schema_of(option: Option) -> dict[str, Any]:
    bounds = {"minimum": option.least, "maximum": option.most}
    return {
        "type": {int: "integer", float: "number", str: "string"}[option.kind],
        **{name: bound for name, bound in bounds.items() if math.isfinite(bound)},
        **({"enum": list(option.choices)} if option.choices else {}),
    }


def test_headers_are_those_of_the_table_of_options() -> None:
    defaults = {option.header: {} if option.default is None else {"default": option.default} for option in OPTIONS}
    schemas = {parameter["name"]: parameter["schema"] for parameter in PARAMETERS.values()}
    assert schemas == {option.header: schema_of(option) | defaults[option.header] for option in OPTIONS}
    for path in ("/predictions/etenet", "/explanations/etenet"):
        taken = [each["$ref"].rpartition("/")[2] for each in CONTRACT.raw_schema["paths"][path]["parameters"]]
        assert taken == list(PARAMETERS)


def test_form_fields_are_those_of_the_table_of_options() -> None:
    fields = {name: schema for name, schema in FORM["properties"].items() if name != "data"}
    assert fields == {option.name: schema_of(option) for option in OPTIONS}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_an_option_may_have_what_the_table_says_and_nothing_beyond(option: Option) -> None:
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


def test_it_names_every_code_that_an_error_may_have() -> None:
    codes = CONTRACT.raw_schema["components"]["schemas"]["Error"]["properties"]["error"]["properties"]["code"]["enum"]
    assert {kind.code for kind in CaptionError.__subclasses__()} <= set(codes)
    assert codes == sorted(codes)
