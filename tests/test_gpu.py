"""The code for a GPU. It always runs on the CPU, without graphs and uploads, and on a GPU if there is one."""

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from etenet.captioning.captioner import Captioner, decoders_for
from etenet.captioning.options import CaptionOptions
from etenet.model import checkpoint as checkpoints
from etenet.model.config import Preprocessing
from etenet.model.generate import generate
from etenet.runtime import load as networks
from etenet.runtime.cuda import GpuEncoder, GpuSearch
from etenet.runtime.network import TorchNetwork
from tests.conftest import DEMO, EXAMPLES, REPOSITORY
from tests.test_codebase import python_files

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def checkpoint() -> checkpoints.Checkpoint:
    return checkpoints.load(DEMO)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("clips", [1, 3, 16, 19])
def test_the_search_without_synchronisation_finds_the_same_sentences(
    checkpoint: checkpoints.Checkpoint, clips: int, device: torch.device
) -> None:
    decoder = copy.deepcopy(checkpoint.model.decoder).to(device).eval()
    torch.manual_seed(clips)
    features = torch.randn(clips, 16, decoder.config.feature_size).abs().to(device)
    plain = generate(decoder, features, beam_size=5, max_words=checkpoint.max_words)
    search = GpuSearch(decoder, max_words=checkpoint.max_words, frames_per_clip=features.shape[1], device=device)
    captured = search(features)
    assert [[hypothesis.words for hypothesis in of_clip] for of_clip in captured] == [
        [hypothesis.words for hypothesis in of_clip] for of_clip in plain
    ]
    for actual, expected in zip(chain.from_iterable(captured), chain.from_iterable(plain), strict=True):
        assert actual.word_log_probs == pytest.approx(expected.word_log_probs, abs=1e-4)
        np.testing.assert_allclose(actual.attention, expected.attention, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("frames", [1, 16, 17, 256, 300])
def test_any_number_of_frames_gets_the_features_of_the_network(
    checkpoint: checkpoints.Checkpoint, captioner: Captioner, frames: int, device: torch.device
) -> None:
    preprocessing = checkpoint.preprocessing
    shape = (frames, preprocessing.resize_px, preprocessing.resize_px, 3)
    pictures = np.random.default_rng(frames).integers(0, 256, shape, dtype=np.uint8)
    encoder = GpuEncoder(checkpoint.encoder, preprocessing, frames_per_clip=16, device=device, compiled=False)
    features, expected = encoder(pictures).cpu(), captioner.network.features(pictures[None])[0]
    assert features.shape == expected.shape
    assert torch.nn.functional.cosine_similarity(features, expected).min() > 0.99999


SMALL = Preprocessing(resize_px=8, crop_px=6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
COMPILE = """
import json, torch
import numpy as np
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from etenet.runtime.cuda import GpuEncoder, compiled_kernels
from tests.test_gpu import CPU, SMALL, SmallEncoder

counts = []
for start in range(2):
    with fresh_cache():
        if start == 0:
            kernels = compiled_kernels(SmallEncoder(), SMALL, frames_per_clip=16, device=CPU)
        else:
            encoder = GpuEncoder(SmallEncoder(), SMALL, frames_per_clip=16, device=CPU, kernels=kernels)
            for frames in (1, 40, 300):
                encoder(np.zeros((frames, 8, 8, 3), np.uint8))
    counts.append({**counters["inductor"], **counters["stats"]})
    torch.compiler.reset()
    counters.clear()
print(json.dumps(counts))
"""


class SmallEncoder(nn.Module):
    """Replaces an `Encoder`. It has as few operations as possible: the compiler takes seconds for each."""

    name = "small"

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, frames: Tensor) -> Tensor:
        return torch.relu(self.convolution(frames)).mean(dim=(-2, -1), dtype=torch.float32)


@pytest.mark.long
def test_an_encoder_with_saved_kernels_compiles_nothing() -> None:
    ran = subprocess.run([sys.executable, "-c", COMPILE], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    first, again = json.loads(ran.stdout.splitlines()[-1])
    assert first["fxgraph_cache_miss"] == 1
    assert again["fxgraph_cache_hit"] == again["unique_graphs"] == 1  # one graph for all batch sizes
    assert "fxgraph_cache_miss" not in again


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_consecutive_batches_do_not_mix(checkpoint: checkpoints.Checkpoint, device: torch.device) -> None:
    """On a GPU a batch is uploaded while the one before is computed, and the buffers are used again."""
    preprocessing, rng = checkpoint.preprocessing, np.random.default_rng(0)
    encoder = GpuEncoder(checkpoint.encoder, preprocessing, frames_per_clip=16, device=device, compiled=False)
    batches = [
        rng.integers(0, 256, (n, preprocessing.resize_px, preprocessing.resize_px, 3), dtype=np.uint8)
        for n in (16, 32, 5, 16, 1)
    ]
    results = [encoder(batch) for batch in batches]
    for batch, features in zip(batches, results, strict=True):
        torch.testing.assert_close(encoder(batch), features)


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("no compiler")


@pytest.mark.parametrize("kernels", [None, b"damaged"])
@pytest.mark.parametrize("compiler", [broken, lambda _: broken], ids=["at once", "at the first call"])
def test_an_encoder_that_cannot_be_compiled_runs_uncompiled(
    compiler: Callable[[object], object],
    kernels: bytes | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch, "compile", compiler)
    encoder = GpuEncoder(SmallEncoder(), SMALL, frames_per_clip=16, device=CPU, kernels=kernels)
    assert encoder(np.zeros((1, 8, 8, 3), np.uint8)).isfinite().all()
    assert "runs uncompiled" in caplog.text
    assert ("the saved kernels cannot be read" in caplog.text) == (kernels is not None)


def test_the_torch_form_is_used_if_the_cuda_form_cannot_be_made(
    checkpoint: checkpoints.Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    exact = TorchNetwork(checkpoint)
    exact.device = torch.device("cuda", 99)
    assert networks._cuda_network(checkpoint, exact, 16, None) is exact
    assert "its CUDA form cannot be made" in caplog.text


def test_clips_that_overflow_half_precision_are_encoded_by_the_exact_form(checkpoint: checkpoints.Checkpoint) -> None:
    class Overflowing(TorchNetwork):
        exact = TorchNetwork(checkpoint)

        def features(self, frames: np.ndarray) -> Tensor:
            features = super().features(frames).clone()
            features[0] = torch.inf
            return features

    bodies = [(REPOSITORY / "examples" / name).read_bytes() for name in list(EXAMPLES)[:2]]
    captioner = Captioner(checkpoint, Overflowing(checkpoint), decoders_for(checkpoint, sandboxed=False))
    captions = captioner.caption_batch(bodies, [CaptionOptions()] * 2)
    assert [caption.text for caption in captions] == list(EXAMPLES.values())[:2]


GPU_ONLY = 8  # functions and single lines that no test runs without a GPU
NEEDS_NO_GPU = {
    "device_count",
    "is_available",
    "empty_cache",
    "OutOfMemoryError",
    "Event",
    "CUDAGraph",
    "Stream",
}  # the last three: types


def uses_of_cuda(tree: ast.AST) -> list[ast.Attribute]:
    """The places that use a part of `torch.cuda` that needs a GPU."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda" and node.attr not in NEEDS_NO_GPU
    ]


def test_code_that_needs_a_gpu_is_marked_and_counted() -> None:
    """A function or line that needs a GPU is marked, and such functions are short; tests run all other code."""
    marks = 0
    for path in python_files("src", "handler", "training"):
        text = path.read_text()
        tree, marked = ast.parse(text), {n for n, line in enumerate(text.splitlines(), 1) if "# GPU only" in line}
        marks += len(marked)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.body[0].lineno - 1 in marked:
                assert node.end_lineno - node.lineno < 25, f"{path.name}: {node.name} is too long without a test"
                marked |= set(range(node.lineno, node.end_lineno + 1))
        assert {use.lineno for use in uses_of_cuda(tree)} <= marked, path
    assert marks == GPU_ONLY
