"""Clients that generators make of docs/openapi.yaml, in Python and TypeScript, call the server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import EXAMPLES, REPOSITORY, Server, ask
from tests.front import behind_nginx

CONTRACT = REPOSITORY / "docs" / "openapi.yaml"
CLIP = REPOSITORY / "examples" / next(iter(EXAMPLES))
TYPESCRIPT = REPOSITORY / "tests" / "typescript"
NPM = REPOSITORY / ".venv" / "npm" / "node_modules"

PYTHON_CLIENT = """
import json
import sys
from pathlib import Path

from etenet_client import Client
from etenet_client.api.captions import post_video, post_video_to_explain, put_video
from etenet_client.models import Captions, Error, Segments, VideoForm
from etenet_client.types import File

client, clip = Client(base_url=sys.argv[1]), Path(sys.argv[2])
with clip.open("rb") as video:
    whole = put_video.sync(client=client, body=File(video), x_etenet_captions=2)
with clip.open("rb") as video:
    explained = post_video_to_explain.sync(client=client, body=File(video))
with clip.open("rb") as video:
    cut = put_video.sync(client=client, body=File(video), x_etenet_segment_s=1.0)
with clip.open("rb") as video:
    of_form = post_video.sync(client=client, body=VideoForm(data=File(video, "clip.mp4"), captions=2))
with Path(__file__).open("rb") as text:
    refused = put_video.sync_detailed(client=client, body=File(text))
assert isinstance(whole, Captions) and isinstance(explained, Captions) and isinstance(cut, Segments)
assert isinstance(of_form, Captions) and of_form.captions == whole.captions
assert isinstance(refused.parsed, Error)
print(json.dumps({
    "caption": whole.caption,
    "sentences": len(whole.captions),
    "attention": len(explained.captions[0].attention[0]),
    "segments": [segment.caption for segment in cut.segments],
    "refused": [refused.status_code, refused.parsed.error.code],
}))
"""


@pytest.fixture(scope="module")
def front(server: Server) -> Iterator[Server]:
    with behind_nginx(server) as behind:
        yield behind


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[str, Any]:
    """What each client reads of the same responses."""
    whole = server.caption(CLIP.read_bytes(), X_Etenet_Captions="2").json()
    cut = ask(server.predictions, CLIP.read_bytes(), {"X-Etenet-Segment-S": "1"}).json()
    return {
        "caption": EXAMPLES[CLIP.name],
        "sentences": len(whole["captions"]),
        "attention": 16,
        "segments": [segment["caption"] for segment in cut["segments"]],
        "refused": [415, "not_a_video"],
    }


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_generated_python_client_gets_captions(front: Server, expected: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("post_hooks: []\n")
    options = ("--path", CONTRACT, "--output-path", "etenet_client", "--meta", "none", "--config", "settings.yaml")
    run(sys.executable, "-m", "openapi_python_client", "generate", "--fail-on-warning", *options, folder=tmp_path)
    (tmp_path / "client.py").write_text(PYTHON_CLIENT)
    assert json.loads(run(sys.executable, "client.py", front.inference, CLIP, folder=tmp_path)) == expected


@pytest.mark.skipif(not shutil.which("npm"), reason="npm is missing, from which the generator comes")
def test_a_generated_typescript_client_gets_captions(front: Server, expected: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(TYPESCRIPT, tmp_path, dirs_exist_ok=True)
    (tmp_path / "node_modules").symlink_to(NPM)
    run("node_modules/.bin/openapi-typescript", CONTRACT, "--output", "api.ts", folder=tmp_path)
    run("node_modules/.bin/tsc", "--project", ".", folder=tmp_path)
    assert json.loads(run("node", "client.js", front.inference, CLIP, folder=tmp_path)) == expected
