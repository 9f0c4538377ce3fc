"""The work that a Ray cluster gets, who does it with how many threads, and the end of a job on it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray as peer
import torch
from ray.cluster_utils import Cluster

from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import JOB_DECODE_TRIES
from etenet.jobs import inputs
from etenet.jobs.engines import local, ray
from etenet.jobs.engines.ray import without_copies
from etenet.jobs.inputs import JobClip, Source
from etenet.jobs.journal import Record
from etenet.linux import cores
from etenet.sandbox.pool import InProcess
from etenet.video.clip import Clip
from etenet.video.limits import DecodeLimits
from etenet.video.segments import WHOLE, Cut
from tests import clips
from tests.conftest import DEMO
from tests.test_jobs import title
from tests.test_tars import write_tar


def test_files_with_the_same_bytes_are_captioned_once(tmp_path: Path) -> None:
    files = {"a": b"one", "b": b"one", "c": b"two", "d": b"three", "empty": b"", "also empty": b""}
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)
    part, read = Cut(start_s=1.0), []

    def digests(sources: list[Source]) -> dict[Source, str]:
        read.extend(source.path for source in sources)
        return {source: Path(source.path).read_text() for source in sources}

    sources = {(Source(f"{tmp_path}/{name}"), cut): [name] for name in [*files, "not there"] for cut in (WHOLE, part)}
    expected = [["a", "b"], ["c"], ["d"], ["empty"], ["also empty"], ["not there"]]
    distinct = without_copies(sources, digests)
    for cut in (WHOLE, part):
        assert [names for (_, of), names in distinct.items() if of == cut] == expected
    assert [Path(path).name for path in read] == ["a", "b", "c"]


@pytest.mark.parametrize("held_up", [JOB_DECODE_TRIES - 1, JOB_DECODE_TRIES])
def test_a_clip_is_decoded_again_where_the_machine_was_too_busy(
    held_up: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip.mp4").write_bytes(clips.video(20))
    left, outside = [held_up], InProcess(resize_px=32)

    class Busy:
        def submit(self, body: bytes, cut: Cut) -> Future[list[Clip]]:
            left[0] -= 1
            if left[0] < 0:
                return outside.submit(body, cut)
            future: Future[list[Clip]] = Future()
            future.set_exception(DecodeLimits().held_up(0.5))
            return future

    monkeypatch.setattr(ray, "_decoders", lambda _: Busy())
    row = {"clip": 0, "source": pickle.dumps((Source(str(tmp_path / "clip.mp4")), WHOLE))}
    (part,) = ray._decoded(row, resize_px=32)
    decoded = pickle.loads(part["decoded"])
    if held_up < JOB_DECODE_TRIES:
        assert decoded[0].info.codec == "h264"
    else:
        assert decoded["error"]["code"] == "overloaded"


def test_a_clip_in_a_tar_is_decoded_and_compared_as_a_file_is(tmp_path: Path) -> None:
    body = clips.video(20)
    (tmp_path / "clip.mp4").write_bytes(body)
    write_tar(tmp_path / "shard.tar", [("1.mp4", body), ("1.txt", b"text"), ("2.mp4", body[:-1] + b"x")])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "shard.tar").read_bytes()[:600])
    (file, cut, first, second) = (clip.source for clip in inputs.clips([str(tmp_path)]))
    digests = [ray._digest(source) for source in (cut, file, first, second)]
    assert digests[1] == digests[2]
    assert len(set(digests)) == 3
    decoded = []
    for source in (cut, file, first):
        (part,) = ray._decoded({"clip": 0, "source": pickle.dumps((source, WHOLE))}, resize_px=32)
        decoded.append(pickle.loads(part["decoded"]))
    assert decoded[0]["error"]["code"] == "unreadable_file"
    assert np.array_equal(decoded[1][0].frames, decoded[2][0].frames)


def test_ctrl_c_leaves_no_time_for_ray_to_crash() -> None:
    """What Ray does at the end of one in three processes, an exit handler does here always."""
    code = """
import atexit, os, sys, types
from etenet import cli

def interrupted(options):
    raise KeyboardInterrupt

cli.caption, sys.modules["ray"] = interrupted, types.ModuleType("ray")
atexit.register(os.abort)
cli.main(["caption", "x.mp4"])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "etenet caption: stopped\n")


CORES_OF_NODES = (1, 2, 0)  # the last one only leads, as the head of a cluster often does


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Real nodes, all on this machine, with different cores."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CORES_OF_NODES[-1]})
    for count in CORES_OF_NODES[:-1]:
        cluster.add_node(num_cpus=count)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def different(tmp_path_factory: pytest.TempPathFactory) -> list[JobClip]:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(2 * local.WORTH_CAPTURING_CLIPS):
        (folder / f"{number:02}.mp4").write_bytes(clips.video(4 + number))
    return inputs.clips([str(folder)])


def captions_of(records: Iterator[Record]) -> dict[str, Any]:
    return {record["video"]: record["caption"] for record in records}


def test_each_node_with_cores_has_an_actor_that_computes_on_all_of_them_and_compiles_nothing(cluster: Cluster) -> None:
    def tell(actor: ray._Captions) -> tuple[str, int, str, str]:
        captioner = actor._captioner
        encode, weights = captioner.network._encode, captioner.checkpoint._model
        node = peer.get_runtime_context().get_node_id()
        return node, torch.get_num_threads(), type(encode).__name__, type(weights).__name__

    peer.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    peer.init(address=cluster.address, log_to_driver=False)
    try:
        workers, per_node, placed = ray._placement(None, most=100)
        weights = peer.put(np.frombuffer(DEMO.read_bytes(), np.uint8))
        model = [weights, peer.remote(num_cpus=ray.TASK_CORES)(ray._compiled).remote(weights)]
        of_node = peer.remote(**placed)(ray._Captions)
        actors = [of_node.remote(model, CaptionOptions(), False, per_node, 100) for _ in range(workers)]
        told = peer.get([actor.__ray_call__.remote(tell) for actor in actors])
        with_cores = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in peer.nodes()}
    finally:
        peer.shutdown()
        peer.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert sorted(with_cores.values()) == sorted(CORES_OF_NODES)
    assert sorted(told) == sorted(
        # It could compile nothing: of the checkpoint it has no encoder.
        (node, min(cores(), count), "CompiledEncoder", "DecoderArrays")
        for node, count in with_cores.items()
        if count
    )


@pytest.mark.filterwarnings("ignore")  # of Ray Data about its own code, in this process
def test_a_job_on_several_nodes_gives_the_captions_of_one_process(cluster: Cluster, different: list[JobClip]) -> None:
    actors: set[int] = set()

    def seen(records: Iterator[Record]) -> Iterator[Record]:
        for record in records:
            processes = psutil.Process().children(recursive=True)
            actors.update(process.ppid() for process in processes if "_Captions" in title(process))
            yield record

    engine = ray.engine(DEMO, CaptionOptions(), details=False, address=cluster.address)
    captions = captions_of(seen(engine(different, lambda *_: None)))
    here = local.engine(DEMO, CaptionOptions(), details=False, clips=len(different))
    assert captions == captions_of(here(different, lambda *_: None))
    assert len(actors) == sum(count > 0 for count in CORES_OF_NODES), "an actor below each raylet"


@pytest.mark.filterwarnings("ignore")  # of Ray Data about its own code, in this process
def test_a_cluster_of_several_nodes_compares_files_where_it_reads_them(cluster: Cluster, tmp_path: Path) -> None:
    for name, body in {"a": b"one", "b": b"one", "c": b"two"}.items():
        (tmp_path / name).write_bytes(body)
    sources = [Source(str(tmp_path / name)) for name in ("a", "b", "c", "not there")]
    peer.init(address=cluster.address, log_to_driver=False)
    try:
        assert not ray._all_is_here()
        by_cluster = ray._digests_by_cluster(sources)
    finally:
        peer.shutdown()
    assert by_cluster == ray._digests(sources)
    assert len(set(by_cluster.values())) == 3


@pytest.mark.parametrize(("clips", "tasks"), [(5, 5), (240, 240), (1000, 256), (100_000, 1563)])
def test_each_core_gets_some_tasks_and_each_task_no_more_than_64_clips(
    clips: int, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "_resources", lambda: {"one": {"CPU": 16.0}, "other": {"CPU": 16.0}, "head": {}})
    assert ray._decoding_tasks(clips) == tasks
