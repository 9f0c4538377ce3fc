"""A real TorchServe over HTTP."""

from __future__ import annotations

import gzip
import math
import os
import re
import signal
import time
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import etenet
from benchmarks.rig.servers import config_on_free_ports
from etenet.cli import main
from etenet.files import sha256
from etenet.model import checkpoint as checkpoints
from etenet.model.vocabulary import Vocabulary
from etenet.video.limits import DecodeLimits
from tests import clips
from tests.conftest import DEMO, EXAMPLES, REPOSITORY, Server, ask, running_server, runs, wait_until

BODIES = {name: (REPOSITORY / "examples" / name).read_bytes() for name in EXAMPLES}
FIRST = next(iter(EXAMPLES))


def assert_valid(response: Any, *, captions: int = 1) -> None:
    """The 200 response of the HTTP contract: these keys, these types, these ranges."""
    assert list(response) == ["caption", "captions", "frames", "video", "model", "timing_ms"]
    assert response["caption"] == response["captions"][0]["caption"]
    assert len(response["captions"]) == captions
    for sentence in response["captions"]:
        assert set(sentence) == {"caption", "log_prob", "words"}
        assert sentence["log_prob"] <= 0
        assert sentence["words"]
        assert all(isinstance(word["word"], str) and 0 <= word["prob"] <= 1 for word in sentence["words"])
    times = response["frames"]["times_s"]
    assert len(times) == 16
    assert times == sorted(times)
    assert 1 <= response["frames"]["decoded"] <= 16
    assert set(response["video"]) == {"codec", "width", "height", "duration_s", "start_s"}
    assert times[-1] <= response["video"]["duration_s"] + 1e-3
    assert (response["model"]["name"], response["model"]["version"]) == ("etenet", "1.0")
    assert len(response["model"]["checkpoint"]) == len("sha256:") + 64
    timing = response["timing_ms"]
    assert timing.pop("cached", True) is True  # another test has sent the same
    assert set(timing) == {"decode", "encode", "search", "total"}
    assert all(math.isfinite(value) and value >= 0 for value in timing.values())
    assert timing["total"] >= timing["encode"] + timing["search"] - 0.2


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_gets_its_caption(server: Server, name: str) -> None:
    response = server.caption(BODIES[name])
    assert (response.status, response.content_type) == (200, "application/json")
    assert_valid(response.json())
    assert response.json()["caption"] == EXAMPLES[name]
    assert response.json()["model"]["checkpoint"] == f"sha256:{sha256(DEMO)}"
    assert response.json()["model"]["encoder"] == "squeezenet1_1"


def test_eight_clips_at_once_get_what_each_gets_alone(server: Server) -> None:
    """Good and bad clips in shared batches: none changes the response to another."""
    requests = [*BODIES.items(), ("text", b"not a video"), ("cut", clips.video(40)[:1500])]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            responses = list(pool.map(lambda request: server.caption(request[1]), requests))
            for (name, _), response in zip(requests[:6], responses[:6], strict=True):
                assert (response.status, response.json()["caption"]) == (200, EXAMPLES[name])
            assert [response.status for response in responses[6:]] == [415, 422]


def test_library_and_server_give_the_same_captions(
    server: Server, captioner: etenet.Captioner, reference_data: Path
) -> None:
    paths = sorted((reference_data / "msvd" / "clips").iterdir())[:8]
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda path: server.caption(path.read_bytes()), paths))
    for path, response in zip(paths, responses, strict=True):
        assert response.status == 200, path.name
        assert_valid(response.json())
        expected = captioner.caption(path.read_bytes())
        assert response.json()["caption"] == expected.text
        assert response.json()["captions"][0]["log_prob"] == pytest.approx(expected.sentences[0].log_prob, abs=2e-3)


@pytest.mark.parametrize("header", ["X-Etenet-Captions", "x-etenet-captions", "X-ETENET-CAPTIONS"])
def test_option_headers_are_matched_without_regard_to_case(server: Server, header: str) -> None:
    response = ask(server.predictions, BODIES[FIRST], {header: "3"}).json()
    assert_valid(response, captions=3)


def test_options_take_effect(server: Server) -> None:
    response = server.caption(BODIES[FIRST], X_Etenet_Max_Words="2", X_Etenet_Beam_Size="1").json()
    assert len(response["captions"][0]["words"]) <= 2
    longest = server.caption(BODIES[FIRST], X_Etenet_Captions="10", X_Etenet_Beam_Size="10").json()
    assert_valid(longest, captions=10)
    penalised = server.caption(BODIES[FIRST], X_Etenet_Captions="5", X_Etenet_Length_Penalty="1").json()["captions"]
    means = [sentence["log_prob"] / (len(sentence["words"]) + 1) for sentence in penalised]
    assert means == sorted(means, reverse=True)


def form(fields: dict[str, bytes]) -> tuple[bytes, str]:
    """A multipart form; the field `data` as a file."""
    boundary = uuid.uuid4().hex
    parts = []
    for name, value in fields.items():
        file = '; filename="clip.mp4"' if name == "data" else ""
        kind = "video/mp4" if name == "data" else "text/plain"
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\nContent-Type: {kind}\r\n\r\n'
        parts.append(head.encode() + value + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def test_a_multipart_form_gets_the_same_caption(server: Server) -> None:
    body, kind = form({"data": BODIES[FIRST], "captions": b"2"})
    response = server.caption(body, Content_Type=kind)
    assert response.status == 200
    assert_valid(response.json(), captions=2)
    assert response.json()["caption"] == EXAMPLES[FIRST]


def test_a_compressed_video_gets_the_same_caption_and_a_bomb_a_refusal(server: Server) -> None:
    for coding, compress in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        response = server.caption(compress(BODIES[FIRST]), Content_Encoding=coding)
        assert (response.status, response.json()["caption"]) == (200, EXAMPLES[FIRST])
    bomb, (fields, kind) = gzip.compress(bytes(2**20)) * 17, form({"data": BODIES[FIRST]})
    response = server.caption(gzip.compress(fields), Content_Type=kind, Content_Encoding="gzip")
    assert (response.status, response.json()["error"]["code"]) == (415, "not_a_video")
    for body, coding, status, code in (
        (bomb, "gzip", 415, "not_a_video"),
        (gzip.compress(bytes(DecodeLimits().max_body_bytes + 1)), "gzip", 413, "too_large"),
        (BODIES[FIRST], "gzip", 415, "not_a_video"),
        (BODIES[FIRST], "br", 415, "not_a_video"),
        (b"", "gzip", 400, "empty_body"),
    ):
        response = server.caption(body, Content_Encoding=coding)
        assert (response.status, response.json()["error"]["code"]) == (status, code)


def test_plain_text_is_the_bare_sentence(server: Server) -> None:
    response = server.caption(BODIES[FIRST], Accept="text/plain")
    assert response.content_type.startswith("text/plain")
    assert response.body.decode() == EXAMPLES[FIRST] + "\n"


def test_explanations_add_sixteen_weights_per_word(server: Server) -> None:
    response = ask(f"{server.inference}/explanations/etenet", BODIES[FIRST]).json()
    assert response["caption"] == EXAMPLES[FIRST]
    for sentence in response["captions"]:
        assert len(sentence["attention"]) == len(sentence["words"])
        for weights in sentence["attention"]:
            assert len(weights) == 16
            assert sum(weights) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"", {}, 400, "empty_body"),
        (b"", {"Content-Type": "video/mp4"}, 400, "empty_body"),
        (b"hello\n" * 100, {}, 415, "not_a_video"),
        (b"hello", {"Content-Type": "text/plain"}, 415, "not_a_video"),
        (b'{"video": 1}', {"Content-Type": "application/json"}, 415, "not_a_video"),
        (b"NaN", {"Content-Type": "application/json"}, 415, "not_a_video"),
        (b"[" * 900 + b"]" * 900, {"Content-Type": "application/json"}, 415, "not_a_video"),
        ("\ud83d".encode("utf-16", "surrogatepass"), {"Content-Type": "text/plain"}, 415, "not_a_video"),
        (clips.png(), {"Content-Type": "image/png"}, 415, "not_a_video"),
        (clips.audio_only(), {}, 415, "not_a_video"),
        (clips.video(40)[:1500], {}, 422, "undecodable_video"),
        (BODIES[FIRST], {"X-Etenet-Beam-Size": "99"}, 400, "bad_option"),
        (BODIES[FIRST], {"X-Etenet-Beam-Size": "many"}, 400, "bad_option"),
        (BODIES[FIRST], {"X-Etenet-Captions": "6"}, 400, "bad_option"),
        (BODIES[FIRST], {"X-Etenet-Length-Penalty": "-1"}, 400, "bad_option"),
    ],
)
def test_a_bad_request_gets_a_reason(
    server: Server, body: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    response = ask(server.predictions, body, headers)
    assert (response.status, response.content_type) == (status, "application/json")
    error = response.json()["error"]
    assert error["code"] == code
    assert len(error["message"]) > 20


def test_a_request_after_a_trace_of_java_has_a_line_of_its_own(server: Server) -> None:
    assert ask(server.predictions, b"x", {"Content-Type": "multipart/form-data; boundary="}).status == 500
    id = ask(server.predictions, b"x").request_id.encode()
    wait_until(lambda: id in server.log.read_bytes(), 10)
    assert re.search(rb"^time=\S+ request_id=" + id, server.log.read_bytes(), re.MULTILINE)


def test_ready_live_and_nothing_else(server: Server) -> None:
    assert ask(f"{server.exporter}/ready").json() == {"ready": True}
    assert ask(f"{server.exporter}/live").json() == {"live": True}
    assert ask(f"{server.exporter}/other").status == 404


def test_doctor_checks_a_running_server(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--server", server.inference]) == 0
    assert capsys.readouterr().out.startswith(f"ok    {server.predictions} captions: ")


@pytest.mark.long
def test_the_full_size_network_answers_within_ten_seconds(tmp_path: Path) -> None:
    words = Vocabulary(f"word{number}" for number in range(12_000))
    checkpoints.save(checkpoints.initialise("inceptionresnetv2", words), tmp_path / "full.pt")
    with running_server("--checkpoint", str(tmp_path / "full.pt")) as full:
        started = time.monotonic()
        response = full.caption(BODIES[FIRST])
        assert time.monotonic() - started < 10
        assert_valid(response.json())
        assert response.json()["model"]["encoder"] == "inceptionresnetv2"


def repository_files() -> dict[Path, float]:
    """Every file of the repository with its modification time, without git's own files and caches of Python tools."""
    files = {}
    for folder, folders, names in os.walk(REPOSITORY):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        files |= {Path(folder, name): Path(folder, name).stat().st_mtime for name in names}
    return files


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.long) for each in (signal.SIGINT, signal.SIGHUP))]
)
def test_a_server_ends_cleanly_and_leaves_no_files_or_processes(
    number: signal.Signals, small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = repository_files()
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    config = config_on_free_ports(tmp_path)
    with running_server("--checkpoint", str(small_checkpoint), config=config) as running:
        assert running.caption(clips.video(20)).status == 200
        family = psutil.Process(running.process.pid).children(recursive=True)
        assert len(family) >= 2  # TorchServe and its worker
        assert running.stop(number) == 0
        assert b"stopped" in running.log.read_bytes()
        assert not [process for process in family if runs(process.pid)]
    assert list(scratch.iterdir()) == []
    assert repository_files() == before


@pytest.mark.long
def test_torchserve_ends_with_a_killed_server_and_the_next_one_deletes_its_folder(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, scratch = config_on_free_ports(tmp_path), tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    with running_server("--checkpoint", str(small_checkpoint), config=config) as running:
        assert running.caption(clips.video(20)).status == 200
        family = psutil.Process(running.process.pid).children(recursive=True)
        running.process.kill()
        running.process.wait()
        wait_until(lambda: not [process for process in family if runs(process.pid)], 30)
    (left,) = scratch.glob("etenet-*")
    with running_server("--checkpoint", str(small_checkpoint), config=config) as running:
        assert running.caption(clips.video(20)).status == 200
        assert not left.exists()
        assert len(list(scratch.glob("etenet-*"))) == 1


@pytest.mark.long
def test_two_servers_share_a_machine(server: Server, small_checkpoint: Path) -> None:
    with running_server("--checkpoint", str(small_checkpoint)) as other:
        for _ in range(2):
            assert other.caption(clips.video(20)).json()["caption"] != ""
            assert server.caption(BODIES[FIRST]).json()["caption"] == EXAMPLES[FIRST]


def test_a_taken_port_is_named_before_anything_starts(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_on_free_ports(tmp_path)
    port = server.inference.rsplit(":", 1)[1]
    lines = [
        f"inference_address={server.inference}" if line.startswith("inference_address") else line
        for line in config.read_text().splitlines()
    ]
    config.write_text("\n".join(lines))
    assert main(["serve", "--checkpoint", str(DEMO), "--config", str(config)]) == 2
    assert f"port {port} is taken" in capsys.readouterr().err


def test_a_start_prints_nothing_but_our_own_lines(server: Server) -> None:
    start, ready, _ = server.log.read_text().partition("etenet serve: ready. Try it")
    assert ready
    assert not [line for line in start.splitlines() if not line.startswith("etenet serve: ")]
