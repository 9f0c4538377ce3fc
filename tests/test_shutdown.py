"""A shutdown answers every request that the server has accepted, whatever else happens to it."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import dropwhile
from pathlib import Path
from threading import Event
from unittest.mock import Mock

import psutil
import pytest

from benchmarks.rig.servers import config_on_free_ports
from etenet.serving import launcher
from tests.conftest import DEMO, EXAMPLES, REPOSITORY, Response, Server, ask, running_server, runs, wait_until

CLIP = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes()
IN_FLIGHT = 64


@contextmanager
def roomy_server(folder: Path) -> Iterator[Server]:
    """A server whose queue holds all requests that the tests send at once."""
    config = config_on_free_ports(folder)
    config.write_text(config.read_text().replace("job_queue_size=32", f"job_queue_size={2 * IN_FLIGHT}"))
    with running_server("--checkpoint", str(DEMO), config=config) as running:
        yield running


@pytest.fixture
def many_clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(IN_FLIGHT) as clients:
        yield clients


def all_in_flight(server: Server, clients: ThreadPoolExecutor) -> list[Future[Response]]:
    """Requests that the server has accepted and not yet answered."""
    before = server.accepted()
    sent = [clients.submit(server.caption, CLIP) for _ in range(IN_FLIGHT)]
    wait_until(lambda: server.accepted() >= before + IN_FLIGHT, 10)
    return sent


@pytest.mark.parametrize("log_has_room", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_shutdown_answers_what_it_accepted_and_refuses_newcomers_at_once(
    many_clients: ThreadPoolExecutor, thorough: bool, tmp_path: Path, log_has_room: bool
) -> None:
    for _ in range(20 if thorough and log_has_room else 1):
        with roomy_server(tmp_path) as server:
            responses = all_in_flight(server, many_clients)
            if not log_has_room:  # or nobody reads it any more
                psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            server.process.terminate()
            wait_until(lambda: ask(f"{server.exporter}/ready").status == 503, 1)
            with ThreadPoolExecutor(8) as others:
                newcomers = others.map(refusals_until_the_end, [server] * 8)
                try:
                    assert [future.result().status for future in responses] == [200] * IN_FLIGHT
                    assert server.process.wait(30) == 0  # however many newcomers come
                finally:
                    server.process.kill()  # for the newcomers come until then
            refusals = [refusal for of_one in newcomers for refusal in of_one]
            assert {(response.status, response.retry_after) for response in refusals} == {(503, "1")}
            assert {response.json()["error"]["code"] for response in refusals} == {"overloaded"}


def refusals_until_the_end(server: Server) -> list[Response]:
    """What a client gets that sends one clip after the other, from the first refusal until the port is closed."""
    responses = []
    with suppress(OSError):
        while True:
            responses.append(server.caption(CLIP))
    return list(dropwhile(lambda response: response.status == 200, responses))


@pytest.mark.long
def test_a_torchserve_that_does_not_answer_during_a_shutdown_costs_no_request(
    many_clients: ThreadPoolExecutor, thorough: bool, tmp_path: Path
) -> None:
    for _ in range(20 if thorough else 1):
        with roomy_server(tmp_path) as server:
            java = server.java()
            responses = all_in_flight(server, many_clients)
            java.suspend()
            server.process.terminate()
            wait_until(lambda: b"it is asked again" in server.log.read_bytes(), 10)
            java.resume()
            assert [future.result().status for future in responses] == [200] * IN_FLIGHT
            assert server.process.wait(30) == 0


def test_a_second_signal_drops_the_remaining_requests(many_clients: ThreadPoolExecutor, tmp_path: Path) -> None:
    with roomy_server(tmp_path) as server:
        worker = server.worker()
        assert worker is not None
        worker.suspend()  # so that no request is ever answered
        responses = [many_clients.submit(outcome_of, server) for _ in range(8)]
        wait_until(lambda: waiting(server) > 0, 10)
        server.process.terminate()
        wait_until(lambda: b"stopping" in server.log.read_bytes(), 5)
        server.process.terminate()
        assert server.process.wait(60) == 0
        assert not runs(worker.pid)
        assert {future.result() for future in responses} == {"lost"}


@pytest.mark.parametrize(("pending", "named"), [(1, "1 request;"), (8, "8 requests;"), (None, "an unknown number of ")])
def test_it_says_how_many_are_dropped_at_the_deadline(
    pending: int | None, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    health = Mock(pending=Mock(return_value=pending, side_effect=None if pending else OSError("silent")))
    launcher._drain(Mock(alive=True), health, Event(), Mock(drain_deadline_s=0.1))
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"dropped unanswered after 0.1 s: {named}" in last
    assert last.endswith("; raise drain_deadline_s to wait longer")


def test_where_nothing_waits_nothing_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    launcher._drain(Mock(alive=True), Mock(pending=Mock(return_value=0)), Event(), Mock(drain_deadline_s=0))
    assert "dropped" not in capsys.readouterr().err


def outcome_of(server: Server) -> str:
    try:
        return str(server.caption(CLIP).status)
    except OSError:
        return "lost"


def waiting(server: Server) -> int:
    (model,) = ask(f"{server.management}/models/etenet").json()
    return int(model["jobQueueStatus"]["pendingRequests"])


def test_when_java_is_killed_the_server_ends_and_says_why(small_checkpoint: Path) -> None:
    with running_server("--checkpoint", str(small_checkpoint)) as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert len(family) >= 3
        server.java().kill()
        assert server.process.wait(30) == 1
        assert "TorchServe ended by itself; its last lines are above" in server.log.read_text()
        wait_until(lambda: not any(runs(process.pid) for process in family), 30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_during_packaging_ends_it_and_leaves_nothing_that_is_not_deleted(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scratch := tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    log, config = tmp_path / "serve.log", config_on_free_ports(tmp_path)
    command = [sys.executable, "-m", "etenet", "serve", "--config", str(config), "--checkpoint", str(DEMO)]
    with log.open("wb") as output, subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=output) as server:
        packaging: list[psutil.Process] = []
        try:
            wait_until(lambda: any(scratch.rglob("tmp*")), 60)  # where the encoder is compiled
            packaging = psutil.Process(server.pid).children()
            for process in packaging:
                process.suspend()  # so that it does not end by itself
            server.send_signal(number)
            assert server.wait(15) == (0 if number == signal.SIGTERM else -number)
            wait_until(lambda: not any(runs(process.pid) for process in packaging), 15)
        finally:
            for process in (*packaging, server):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
    assert packaging
    assert "starting TorchServe" not in log.read_text()
    left = list(scratch.iterdir())
    assert [(path / "lock").exists() for path in left] == ([] if number == signal.SIGTERM else [True])
