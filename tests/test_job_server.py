"""A job by a server that is not there, is none or changes, and output that nobody takes: one line at once."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from benchmarks.rig.servers import free_ports
from etenet.cli import main
from etenet.files import sha256
from etenet.jobs.access import KEY_VARIABLE
from etenet.jobs.engines import server as engines
from tests.conftest import DEMO, EXAMPLES, REPOSITORY, Server
from tests.front import nginx, with_keys

Capture = pytest.CaptureFixture[str]
CLIPS = [f"examples/{name}" for name in EXAMPLES]
FULL = "cannot write to standard output: No space left on device; fix that, or redirect it elsewhere"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@contextmanager
def responding(
    status_and_checkpoint: Callable[[], tuple[int, str]],
    precision: str = "float32",
    bytes_per_s: float = float("inf"),
) -> Iterator[str]:
    """A server whose captions are all "a cat", by a checkpoint that may change."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            left = int(self.headers["Content-Length"])
            while piece := self.rfile.read(min(left, 2**17)):
                left -= len(piece)
                time.sleep(len(piece) / bytes_per_s)
            status, checkpoint = status_and_checkpoint()
            contents = {"caption": "a cat", "captions": [{"caption": "a cat"}], "video": {"duration_s": 1.0}}
            body = json.dumps({**contents, "model": {"checkpoint": checkpoint, "precision": precision}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_address[1]}"
        finally:
            httpd.shutdown()
            thread.join()


@contextmanager
def listening(greeting: bytes) -> Iterator[str]:
    """A port where something else than HTTP is spoken, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                held.append(connection)
                if greeting:
                    connection.sendall(greeting)

        held: list[socket.socket] = []
        thread = threading.Thread(target=greet)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in held:
                connection.close()


@contextmanager
def nothing() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_ports(1)[0]}"


@pytest.mark.parametrize("there", [nothing, lambda: listening(b""), lambda: listening(b"SSH-2.0-OpenSSH_9.7\r\n")])
def test_where_no_server_is_the_job_ends_soon_and_says_so(
    there: Callable[[], Iterator[str]], capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "MEETING_DEADLINE_S", 0.5)
    began_s = time.monotonic()
    with there() as url:  # type: ignore[attr-defined]
        assert main(["caption", *CLIPS, "--out", str(tmp_path / "out.jsonl"), "--server", url]) == 1
    assert time.monotonic() - began_s < 10
    printed = capsys.readouterr().err
    assert printed.startswith(f"etenet caption: no server at {url}/predictions/etenet (")
    assert printed.endswith("start it with: etenet serve, or correct --server\n")
    assert "object at" not in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_doctor_says_that_no_server_is_where_something_else_is_spoken(capsys: Capture) -> None:
    with listening(b"SSH-2.0-OpenSSH_9.7\r\n") as url:
        assert main(["doctor", "--server", url]) == 1
    assert capsys.readouterr().out.startswith(f"FAIL  {url}/predictions/etenet does not answer (SSH-2.0-OpenSSH_9.7")


def test_a_server_that_has_no_room_is_waited_for_and_this_is_said(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "REPORT_AFTER_S", 0.0)
    statuses = iter([503, 503, 503, 200, 503, 503, *[200] * 9])
    with responding(lambda: (next(statuses), "sha256:1")) as url:
        assert main(["caption", CLIPS[0], "--server", url, "--workers", "1"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["caption"] == "a cat"
    waiting = f"etenet caption: no caption from {url}/predictions/etenet (status 503); waiting for up to 10 min\n"
    assert printed.err.count(waiting) == 2
    assert printed.err.count("\n") == 4


def test_a_server_with_another_checkpoint_is_refused_at_the_start_and_later(tmp_path: Path, capsys: Capture) -> None:
    out = ["--out", str(tmp_path / "captions.jsonl"), "--workers", "1"]
    with responding(lambda: (200, "sha256:1")) as url:
        assert main(["caption", CLIPS[0], *out, "--server", url]) == 0
    with responding(lambda: (200, "sha256:2")) as url:
        capsys.readouterr()
        assert main(["caption", *CLIPS, *out, "--server", url]) == 2
        assert "was made with checkpoint sha256:1 (now sha256:2); name another file" in capsys.readouterr().err
    checkpoints = iter(["sha256:1", "sha256:1", *["sha256:2"] * 9])
    with responding(lambda: (200, next(checkpoints))) as url:
        assert main(["caption", *CLIPS, *out, "--server", url]) == 1
    assert "has changed its checkpoint, from sha256:1 to sha256:2; start" in capsys.readouterr().err
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 2


def test_a_clip_may_take_as_long_as_a_slow_network_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "PIECE_DEADLINE_S", 1.0)
    monkeypatch.setattr(engines, "GIVE_UP_AFTER_S", 1.0)
    (tmp_path / "large.mp4").write_bytes(bytes(48 * 2**20))  # more than what fits into the buffers of a connection
    with responding(lambda: (200, "sha256:1"), bytes_per_s=16 * 2**20) as url:
        assert main(["caption", str(tmp_path / "large.mp4"), "--server", url]) == 0


def test_the_server_decides_what_is_too_large_and_gets_nothing_larger(tmp_path: Path, capsys: Capture) -> None:
    for number, size in enumerate((65, 66, 67)):
        (tmp_path / f"{number}.mp4").write_bytes(bytes(size * 2**20))
    statuses = iter([200, 200, 413])
    with responding(lambda: (next(statuses), "sha256:1")) as url:
        assert main(["caption", str(tmp_path), "--server", url, "--workers", "1"]) == 1
    captioned, refused, not_sent = map(json.loads, capsys.readouterr().out.splitlines())
    assert captioned["caption"] == "a cat"
    assert refused["error"]["code"] == not_sent["error"]["code"] == "too_large"
    assert f"refused {66 * 2**20} bytes, and this clip has {67 * 2**20}; raise" in not_sent["error"]["message"]


def test_a_job_in_int8_does_not_continue_one_in_float32(tmp_path: Path, capsys: Capture) -> None:
    out = ["--out", str(tmp_path / "captions.jsonl"), "--workers", "1"]
    for precision, status in {"float32": 0, "float16": 0, "int8": 2}.items():
        with responding(lambda: (200, "sha256:1"), precision) as url:
            assert main(["caption", CLIPS[0], *out, "--server", url]) == status
    assert "was made with precision default (now int8); name another file" in capsys.readouterr().err


@pytest.mark.parametrize("by_shell", [True, False])
@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv"])
def test_what_an_earlier_run_wrote_is_no_clip_of_the_next(
    name: str, by_shell: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the shell makes names of videos/*, and where etenet does. Killed jobs leave a journal, and no table."""
    (videos := tmp_path / "videos").mkdir()
    shutil.copy(CLIPS[0], videos / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    out = ["--out", f"videos/{name}", "--report", "videos/report.html"]
    with responding(lambda: (200, "sha256:1")) as url:
        for _ in range(3):
            if by_shell:
                (videos / "captions.csv").unlink(missing_ok=True)
            everything = [f"videos/{path.name}" for path in sorted(videos.iterdir())] if by_shell else ["videos/*"]
            assert main(["caption", *everything, *out, "--server", url]) == 0
    (journal,) = videos.glob("*.jsonl")
    (record,) = journal.read_text().splitlines()
    assert json.loads(record)["video"] == "videos/clip.mp4"


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv"])
def test_what_was_published_is_no_clip_of_the_next_run_either(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = f"memory://{uuid4()}"
    fsspec.filesystem("memory").pipe_file(f"{folder}/clip.mp4", Path(CLIPS[0]).read_bytes())
    with responding(lambda: (200, "sha256:1")) as url:
        for _ in range(2):
            capsys.readouterr()
            assert main(["caption", f"{folder}/*", "--out", f"{folder}/{name}", "--server", url]) == 0
    assert "1 clip, 1 of them done before; nothing to do" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_refused_before_the_first_clip(tmp_path: Path, capsys: Capture) -> None:
    (folder := tmp_path / "reports").mkdir()
    for report, name, message in (
        (folder, "out.jsonl", f"cannot write {folder}: it is no regular file; fix that, or name another"),
        (tmp_path / "out.jsonl", "out.jsonl", f"--report would replace {tmp_path}/out.jsonl, which has the captions"),
        (tmp_path / "out.csv.jsonl", "out.csv", f"--report would replace {tmp_path}/out.csv.jsonl, which has"),
    ):
        out = ["--out", str(tmp_path / name), "--report", str(report)]
        assert main(["caption", *CLIPS, *out, "--server", "http://127.0.0.1:1"]) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["clips.csv", "clips.jsonl", "clips.txt"])
def test_a_list_is_not_replaced_by_its_captions(name: str, tmp_path: Path, capsys: Capture) -> None:
    clips, text = tmp_path / name, f"video,path\na,{CLIPS[0]}\n"
    clips.write_text(text)
    assert main(["caption", str(clips), "--out", str(tmp_path / "." / name), "--server", "http://127.0.0.1:1"]) == 2
    assert f"--out would replace {clips}, which is to be captioned; name another" in capsys.readouterr().err
    assert clips.read_text() == text


def test_a_list_at_a_url_is_not_replaced_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clips = f"memory://{uuid4()}/clips.csv"
    assert main(["caption", clips, "--out", clips, "--server", "http://127.0.0.1:1"]) == 2
    assert f"--out would replace {clips}, which is to be captioned; name another" in capsys.readouterr().err


def test_a_dash_is_standard_output(capsys: Capture) -> None:
    with responding(lambda: (200, "sha256:1")) as url:
        assert main(["caption", CLIPS[0], "--out", "-", "--server", url]) == 0
    assert json.loads(capsys.readouterr().out)["caption"] == "a cat"
    assert not Path("-").exists()


@pytest.mark.parametrize(("flags", "number", "status"), [([], signal.SIGINT, 130), (["--watch"], signal.SIGTERM, 0)])
def test_a_job_ends_at_a_signal_although_the_server_has_gone_silent(
    flags: list[str], number: signal.Signals, status: int, tmp_path: Path
) -> None:
    requests, arrived, ended = count(), threading.Event(), threading.Event()

    def silent_after_the_first() -> tuple[int, str]:
        if next(requests):
            arrived.set()
            ended.wait()
        return 200, "sha256:1"

    (folder := tmp_path / "clips").mkdir()
    shutil.copy(CLIPS[0], folder)
    with responding(silent_after_the_first) as url:
        options = ["--server", url, "--out", str(tmp_path / "captions.csv"), *flags]
        command = [sys.executable, "-m", "etenet", "caption", str(folder), *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as job:
            try:
                assert arrived.wait(30)
                job.send_signal(number)
                assert job.wait(15) == status
                assert job.stderr is not None
                printed = job.stderr.read()
            finally:
                job.kill()
                ended.set()
    assert "Traceback" not in printed
    assert ("stopped" in printed) == (status == 130)
    assert (tmp_path / "captions.csv").exists() == (status == 0)


def test_a_server_and_this_process_continue_each_others_jobs(server: Server, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "captions.jsonl"
    assert main(["caption", CLIPS[0], "--out", str(out), "--server", server.inference]) == 0
    assert json.loads(out.read_text().splitlines()[0])["job"]["checkpoint"] == f"sha256:{sha256(DEMO)}"
    assert main(["caption", *CLIPS, "--out", str(out), "--checkpoint", str(DEMO)]) == 0
    printed = capsys.readouterr().err
    assert f"etenet caption: {len(CLIPS)} clips, 1 of them done before; loading {DEMO}\n" in printed


@pytest.mark.parametrize(
    ("shell", "status", "message"),
    [
        ("| true", 128 + 13, ""),
        ("> /dev/full", 1, f"etenet caption: {FULL}"),
        (">&-", 2, "etenet caption: standard output is closed; name a file with --out"),
        ("--format csv >&-", 2, "etenet caption: standard output is closed; name a file with --out"),
        ("--format parquet > /dev/full", 1, f"etenet caption: {FULL}"),
        ("--out OUT >&- 2>&- <&-", 0, ""),
        ("--out OUT 2>&1 | true", 0, ""),
    ],
)
def test_output_that_nobody_takes_ends_without_a_traceback(
    shell: str, status: int, message: str, tmp_path: Path
) -> None:
    out = tmp_path / "captions.csv"
    with responding(lambda: (200, "sha256:1")) as url:
        command = f"{sys.executable} -m etenet caption examples --server {url} {shell.replace('OUT', str(out))}"
        run = subprocess.run(
            ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
        )
    assert run.returncode == status
    assert run.stderr.splitlines()[1:] == [message] * bool(message) or run.stderr.splitlines() == [message]
    assert "Traceback" not in run.stderr
    if "OUT" in shell:
        assert out.read_text().count("a cat") == len(list((REPOSITORY / "examples").rglob("*.mp4")))


@pytest.mark.parametrize("command", ["doctor --server http://127.0.0.1:9", "--help"])
def test_no_command_ends_in_a_traceback_if_its_output_is_not_taken(command: str) -> None:
    for shell in ("> /dev/full", ">&-"):
        run = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m etenet {command} {shell}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in run.stderr
        assert "Exception" not in run.stderr
        if command != "--help":
            assert (run.returncode, run.stderr.count("standard output")) == (1, 1)


def test_a_server_that_wants_a_key_gets_the_one_of_the_environment(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    with nginx(int(server.inference.rpartition(":")[2]), with_keys("mine")) as port:
        url = f"http://127.0.0.1:{port}"
        command = ["caption", *CLIPS, "--server", url, "--out", str(tmp_path / "out.jsonl")]
        assert main(command) == 1
        wanted = "wants a key that it knows; set ETENET_SERVER_KEY to one"
        assert capsys.readouterr().err.rstrip().endswith(f"/predictions/etenet {wanted}")
        assert main(["doctor", "--server", url]) == 1
        assert "fix: set ETENET_SERVER_KEY to a key of the server" in capsys.readouterr().out
        monkeypatch.setenv(KEY_VARIABLE, "mine")
        assert main(command) == 0
        assert main(["doctor", "--server", url]) == 0
