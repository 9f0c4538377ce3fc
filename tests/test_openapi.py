"""docs/openapi.yaml against the live server: what schemathesis makes of it is answered as it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from etenet.errors import CaptionError
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


def test_it_names_every_code_that_an_error_may_have() -> None:
    codes = CONTRACT.raw_schema["components"]["schemas"]["Error"]["properties"]["error"]["properties"]["code"]["enum"]
    assert {kind.code for kind in CaptionError.__subclasses__()} <= set(codes)
    assert codes == sorted(codes)
