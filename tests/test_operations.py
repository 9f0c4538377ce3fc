"""What an operator relies on: correct metrics, correct readiness, and reasons where something is wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import socketserver
import stat
import subprocess
import threading
import time
import urllib.parse
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import psutil
import pytest
import torch

from etenet import metrics
from etenet.assets import CANARY_CLIP
from etenet.cli import main
from etenet.files import sha256
from etenet.serving import archive
from etenet.serving.config import ServerConfig
from etenet.serving.health import Health
from etenet.serving.loopback import Address, SocketFile
from tests.conftest import DEMO, EXAMPLES, REPOSITORY, Response, Server, ask, running_server, wait_until

CLIP = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes()
CLIENTS = 64


def test_metrics_agree_with_clients_despite_errors_refusals_and_a_killed_worker() -> None:
    with running_server("--checkpoint", str(DEMO)) as server, ThreadPoolExecutor(CLIENTS) as many_clients:
        assert server.figures()["etenet_captions_total"] == 0  # the test clip of /ready does not count
        responses = [server.caption(body) for body in (CLIP, b"text", CLIP, CLIP[:1500])]
        responses += [server.caption(CLIP, X_Etenet_Beam_Size="99")]
        responses += many_clients.map(server.caption, [CLIP] * 3 * CLIENTS)
        before = server.figures()
        assert_agree(before, responses)
        assert Counter(response.status for response in responses)[503] > 0
        worker = server.worker()
        assert worker is not None
        worker.kill()
        wait_until(lambda: server.caption(CLIP).status == 200, 60)
        after = server.figures()
        assert after["etenet_captions_total"] == before["etenet_captions_total"] + 1
        assert after["etenet_worker_start_time_seconds"] > before["etenet_worker_start_time_seconds"]
        assert after["etenet_decoder_processes"] == before["etenet_decoder_processes"] > 0
        assert after["etenet_requests_in_progress"] == 0
        (info,) = [name for name in after if name.startswith("etenet_build_info{")]
        assert f"torch={torch.__version__.partition('+')[0]}" in info


def assert_agree(counted: dict[str, float], responses: list[Response]) -> None:
    good = [response for response in responses if response.status == 200]
    codes = Counter(response.json()["error"]["code"] for response in responses if 400 <= response.status < 500)
    assert counted["etenet_captions_total"] == len(good)
    assert {
        name.partition("code=")[2].rstrip("}"): value
        for name, value in counted.items()
        if name.startswith("etenet_errors_total{") and value
    } == codes
    handled = len(good) + codes.total()
    assert counted["etenet_request_duration_seconds_count"] == handled
    assert counted["etenet_clip_size_bytes_count"] == handled
    assert counted["etenet_batch_size_clips_sum"] == handled
    assert counted["etenet_stage_duration_seconds_count{stage=decode}"] == len(good)
    assert counted["etenet_frames_decoded_total"] == sum(response.json()["frames"]["decoded"] for response in good)


@pytest.mark.long
def test_a_request_that_waits_for_a_batch_when_the_worker_ends_is_captioned(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next worker. TorchServe itself forgets the request, whose client waits for ever."""
    monkeypatch.setenv("ETENET_MAX_BATCH_DELAY", "5000")  # ms; TorchServe waits that long for further requests
    with running_server("--checkpoint", str(DEMO)) as server, ThreadPoolExecutor(1) as client:
        worker, before = server.worker(), server.accepted()
        assert worker is not None
        response = client.submit(server.caption, CLIP)
        wait_until(lambda: server.accepted() > before, 5)
        worker.kill()
        assert response.result(60).status == 200


def test_damaged_files_of_metrics_change_no_answer_and_are_named_once(server: Server) -> None:
    assert server.caption(CLIP).status == 200
    before, folder = server.figures(), Path(server.java().environ()[metrics.FOLDER_VARIABLE])
    damaged = {
        folder / "counter_1.db": b"\0",
        folder / "histogram_2.db": b"\x7f" * 100,
        folder / "gauge_livesum_x.db": b"x",
    }
    try:
        for path, contents in damaged.items():
            path.write_bytes(contents)
        for _ in range(2):
            assert [ask(f"{server.exporter}/{page}").status for page in ("live", "ready", "metrics")] == [200] * 3
            assert {name: value for name, value in server.figures().items() if "captions" in name} == {
                name: value for name, value in before.items() if "captions" in name
            }
    finally:
        for path in damaged:
            path.unlink()
    log = server.log.read_text()
    assert [log.count(f"{path} is damaged") for path in damaged] == [1, 1, 1]


def test_the_wait_since_the_front_is_counted(server: Server) -> None:
    def waits() -> tuple[float, float]:
        now = server.figures()
        stage = "{stage=wait}"
        return now.get(f"etenet_stage_duration_seconds_count{stage}", 0.0), now.get(
            f"etenet_stage_duration_seconds_sum{stage}", 0.0
        )

    count, total_s = waits()
    for start in (f"t={time.time() - 3:.3f}", "t=yesterday", f"t={time.time() + 999:.3f}", "nan", ""):
        assert server.caption(CLIP, X_Request_Start=start).status == 200
    more, total_more_s = waits()
    assert more == count + 1
    assert 3 <= total_more_s - total_s < 10


def test_the_server_says_which_model_it_serves_and_under_what_terms(server: Server) -> None:
    assert "the model is demo (squeezenet1_1); terms: Apache-2.0, made from rendered clips\n" in server.log.read_text()


def test_the_server_listens_for_nothing_but_http(server: Server) -> None:
    """TorchServe alone also listens for gRPC, on 7070 and 7071."""
    launcher = psutil.Process(server.process.pid)
    sockets = [one for process in (launcher, *launcher.children(recursive=True)) for one in process.net_connections()]
    listening = {one.laddr.port for one in sockets if one.status == psutil.CONN_LISTEN}
    urls = (server.inference, server.torchserve, server.exporter)
    assert listening == {int(url.rpartition(":")[2]) for url in urls}


def test_only_the_servers_own_user_reaches_the_management_api(server: Server) -> None:
    """It scales and removes models, and asks for no password."""
    socket_file = Path(urllib.parse.unquote(server.management.removeprefix("unix://")))
    assert stat.S_ISSOCK(socket_file.stat().st_mode)
    assert socket_file.stat().st_mode & 0o022 == 0  # connecting takes the right to write
    assert socket_file.parent.stat().st_mode & 0o077 == 0
    assert {socket_file.stat().st_uid, socket_file.parent.stat().st_uid} == {os.getuid()}
    assert ask(f"{server.management}/models/etenet").json()[0]["modelName"] == "etenet"
    for door in (server.inference, server.torchserve, server.exporter):
        assert ask(f"{door}/models/etenet?min_worker=2", b"").status in (404, 405)
    assert "ServerBootstrap" not in server.log.read_text()


@pytest.mark.parametrize(
    ("line", "management"),
    [
        ("", None),
        ("management_address=http://127.0.0.1:9081", Address("127.0.0.1", 9081)),
        ("management_address=unix:/run/etenet/management", SocketFile(Path("/run/etenet/management"))),
    ],
)
def test_the_management_api_has_a_port_only_if_the_configuration_gives_it_one(
    line: str, management: Address | SocketFile | None, tmp_path: Path
) -> None:
    config = tmp_path / "config.properties"
    config.write_text(f"{(REPOSITORY / 'config.properties').read_text()}\n{line}\n")
    read = ServerConfig.read(config)
    assert read.management == management
    assert (management in read.addresses) == isinstance(management, Address)


def test_whoever_sends_the_test_clip_of_the_server_is_counted_and_logged(server: Server) -> None:
    before = server.figures()
    responses = [server.caption(CANARY_CLIP.read_bytes(), **headers) for headers in ({}, {"Etenet_Probe": "0" * 32})]
    assert [response.status for response in responses] == [200, 200]
    after = server.figures()
    assert after["etenet_captions_total"] == before["etenet_captions_total"] + 2
    assert after["etenet_batch_size_clips_sum"] == before["etenet_batch_size_clips_sum"] + 2
    for response in responses:
        wait_until(lambda: f"request_id={response.request_id} status=200" in server.log.read_text(), 5)  # noqa: B023


def test_every_request_has_a_log_line_with_the_id_of_the_response(server: Server) -> None:
    response = server.caption(b"text")
    assert response.status == 415
    assert response.request_id
    wait_until(lambda: response.request_id in server.log.read_text(), 5)
    (line,) = [line for line in server.log.read_text().splitlines() if response.request_id in line]
    assert "status=415" in line
    assert "bytes=4" in line
    assert "error=not_a_video" in line


@pytest.mark.long
def test_requests_to_this_machine_use_no_proxy(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            for variable in (name, name.upper()):
                monkeypatch.setenv(variable, "" if name == "no_proxy" else f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with running_server("--checkpoint", str(small_checkpoint)) as server:
            assert [ask(f"{server.exporter}/{page}").status for page in ("ready", "live", "metrics")] == [200] * 3
            assert main(["doctor", "--server", server.inference]) == 0
            (advice,) = re.findall(r"^ +(curl .*)$", server.log.read_text(), re.MULTILINE)
            assert advice.startswith("curl --noproxy localhost -T ")
            if shutil.which("curl"):
                done = subprocess.run(shlex.split(advice), cwd=REPOSITORY, capture_output=True, check=True)
                assert "caption" in json.loads(done.stdout)
            (tmp_path / "clip.mp4").write_bytes(CLIP)
            job = ["caption", str(tmp_path / "clip.mp4"), "--out", str(tmp_path / "out.jsonl")]
            assert main([*job, "--server", server.inference.replace("127.0.0.1", "localhost")]) == 0
            assert server.stop() == 0
            assert "asked again" not in server.log.read_text()
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has connected
            proxy.accept()


def test_the_server_is_not_ready_within_two_seconds_of_a_dead_worker(server: Server) -> None:
    assert ask(f"{server.exporter}/ready").status == 200
    worker = server.worker()
    assert worker is not None
    worker.kill()
    wait_until(lambda: ask(f"{server.exporter}/ready").status == 503, 2)
    assert ask(f"{server.exporter}/live").status == 200
    wait_until(lambda: ask(f"{server.exporter}/ready").status == 200, 60)


def test_a_full_disk_is_named_where_no_worker_can_start(tmp_path: Path) -> None:
    class NoWorker(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'[{"modelVersion": "1.0", "workers": [{"status": "WORKER_STOPPED"}]}]')

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    def fault(folder: Path) -> str:
        nowhere = Address("127.0.0.1", 9)
        health = Health(alive=lambda: True, inference=nowhere, management=management, figures=folder, probe_secret="")
        with health.watching():
            wait_until(lambda: health.fault.startswith("no worker"), 10)
            return health.fault

    management, without_space = SocketFile(tmp_path / "management"), Path("/proc/self")
    with socketserver.ThreadingUnixStreamServer(str(management.path), NoWorker) as torchserve:
        threading.Thread(target=torchserve.serve_forever).start()
        try:
            assert re.match(r"no worker is ready: no space left in /proc, .*; free it$", fault(without_space))
            assert fault(tmp_path) == "no worker is ready"
        finally:
            torchserve.shutdown()


def test_an_archive_is_served_from_where_it_lies(small_checkpoint: Path, tmp_path: Path) -> None:
    mar = archive.package(small_checkpoint, tmp_path / "int8.mar")
    with running_server("--checkpoint", str(mar), folder=tmp_path) as server:
        answer = server.caption(CLIP).json()
        assert "packaging" not in server.log.read_text()
    assert answer["model"]["checkpoint"] == f"sha256:{sha256(small_checkpoint)}"


def without_end(mar: Path) -> None:
    mar.write_bytes(mar.read_bytes()[:-1000])


def with_a_foreign_checkpoint(mar: Path) -> None:
    with zipfile.ZipFile(mar) as whole:
        contents = {name: whole.read(name) for name in whole.namelist()}
    contents[archive.CHECKPOINT_FILE] = b"no checkpoint"
    with zipfile.ZipFile(mar, "w") as changed:
        for name, content in contents.items():
            changed.writestr(name, content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(without_end, "not an archive"), (with_a_foreign_checkpoint, "checkpoint.pt of the archive is damaged")],
)
def test_an_archive_that_does_not_load_ends_the_start_with_the_reason(
    damage: Callable[[Path], None], reason: str, small_checkpoint: Path, tmp_path: Path
) -> None:
    mar = archive.package(small_checkpoint, tmp_path / "model_store" / "etenet.mar")
    damage(mar)
    with pytest.raises(AssertionError, match=re.escape(reason)), running_server(folder=tmp_path):
        pass
