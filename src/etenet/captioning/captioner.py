"""A batch of videos -> a batch of captions or errors. Knows no server: bytes come in, values go out.

captioner = etenet.load(Path("best.pt"))
print(captioner.caption(Path("dog.mp4").read_bytes()).text)
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from etenet.captioning.captions import Caption, Outcome, Sentence, Timing, outcome_of
from etenet.captioning.options import CaptionOptions
from etenet.errors import CaptionError, DeviceFailed, InternalError, Overloaded
from etenet.model import checkpoint as checkpoints
from etenet.model.checkpoint import Checkpoint
from etenet.model.generate import search
from etenet.model.preprocess import preprocess
from etenet.model.search import Hypothesis, Words
from etenet.model.vocabulary import EOS_ID, SOS_ID, UNKNOWN_ID, sentence
from etenet.runtime.cuda import GpuSearch
from etenet.sandbox.pool import InProcess, Sandbox
from etenet.video.ffmpeg import require_supported_ffmpeg
from etenet.video.limits import DecodeLimits
from etenet.video.nvdec import GpuDecoding
from etenet.video.sampling import FRAMES_PER_CLIP, SampledVideo
from etenet.video.segments import WHOLE, Cut

if TYPE_CHECKING:
    from etenet.runtime.cuda import GpuEncoder
    from etenet.runtime.openvino import CompiledEncoder

_log = logging.getLogger(__name__)
SANDBOX_EXISTS = sys.platform == "linux"
ENCODED_AT_ONCE = 16 * FRAMES_PER_CLIP  # frames: more take more memory and are no faster
_K = TypeVar("_K")
_X = TypeVar("_X")
_Y = TypeVar("_Y")
_Step = Callable[[Sequence[_X]], Sequence[_Y | None]]
WORDS = Words(sos=SOS_ID, eos=EOS_ID, never=(UNKNOWN_ID,))


@dataclass(kw_only=True, slots=True)
class _Stopwatch:
    """Milliseconds spent in the two parts of the network."""

    encode: float = 0.0
    search: float = 0.0

    @contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        setattr(self, part, getattr(self, part) + (time.perf_counter() - started) * 1000)


class Captioner:
    """A loaded checkpoint, ready to caption. One instance serves one thread at a time.

    `sandboxed` clips are decoded in processes that a hostile clip cannot get out of; only those use `gpu_decoding`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        checkpoint_id: str = "",
        device: str = "cpu",
        limits: DecodeLimits | None = None,
        sandboxed: bool = SANDBOX_EXISTS,
        compiled_encoder: CompiledEncoder | GpuEncoder | None = None,
        gpu_search: GpuSearch | None = None,
        gpu_decoding: GpuDecoding | None = None,
    ) -> None:
        require_supported_ffmpeg()
        self.checkpoint = checkpoint
        self.checkpoint_id = checkpoint_id
        self.device = torch.device(device)
        self.limits = limits or DecodeLimits()
        self._model = checkpoint.model.to(self.device).to(memory_format=torch.channels_last).eval()
        self._sandboxed, self._gpu_decoding = sandboxed, gpu_decoding
        self._compiled_encoder, self._gpu_search = compiled_encoder, gpu_search

    @cached_property
    def _clips(self) -> Sandbox | InProcess:
        """What decodes clips; started with the first, as captions of features need none."""
        resize_px = self.checkpoint.preprocessing.resize_px
        if self._sandboxed:
            return Sandbox(resize_px=resize_px, limits=self.limits, gpu=self._gpu_decoding)
        return InProcess(resize_px=resize_px, limits=self.limits)

    @property
    def encoder(self) -> str:
        return self._model.encoder.name

    def caption(self, body: bytes, options: CaptionOptions | None = None) -> Caption:
        """Caption one video file, as one clip; raises `CaptionError` where it cannot."""
        options = options or CaptionOptions()
        as_one = replace(options, cut=replace(options.cut, segment_s=None, segment=None))
        (outcome,) = self.caption_batch([body], [as_one])
        if isinstance(outcome, CaptionError):
            raise outcome
        assert isinstance(outcome, Caption)
        return outcome

    def caption_batch(self, bodies: Sequence[bytes], options: Sequence[CaptionOptions]) -> list[Outcome]:
        """One outcome per body, in order; what is wrong with one changes nothing for the others.

        Of a batch's videos that ask for segments, only so many are taken as there may be segments in one of them; the
        others are told to come again. Raises `DeviceFailed` where the device computes nothing any more.
        """
        started, watch, room = time.perf_counter(), _Stopwatch(), self.limits.max_segments + len(bodies)
        decoded: dict[int, list[SampledVideo] | CaptionError] = {}
        clips: dict[tuple[int, int], SampledVideo] = {}  # by the numbers of their video, and in it
        features: dict[tuple[int, int], torch.Tensor] = {}
        pending = {
            self.decode(body, wish.cut): number for number, (body, wish) in enumerate(zip(bodies, options, strict=True))
        }
        while pending:  # some are encoded while others are decoded
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            ready: dict[tuple[int, int], SampledVideo] = {}
            for future in done:
                number, segments = pending.pop(future), decoded_by(future)
                if not isinstance(segments, CaptionError) and len(segments) > room - len(pending):
                    segments = Overloaded("there are too many segments at a time; send the video again in a moment")
                decoded[number] = segments
                if not isinstance(segments, CaptionError):
                    room -= len(segments)
                    ready |= {(number, place): segment for place, segment in enumerate(segments)}
            features |= self._encoded(ready, watch)
            clips |= ready
        wishes = {place: options[place[0]] for place in clips}
        captions = self._captions(clips, features, wishes, watch, started)
        return [
            outcome_of([captions[number, place] for place in range(len(video))], wish.cut)
            if not isinstance(video := decoded[number], CaptionError)
            else video
            for number, wish in enumerate(options)
        ]

    def decode(self, body: bytes, cut: Cut = WHOLE) -> Future[list[SampledVideo]]:
        """The segments of a video, or a `CaptionError` about it, some time."""
        return self._clips.submit(body, cut)

    def caption_decoded(
        self, clips: Sequence[SampledVideo | CaptionError], options: CaptionOptions
    ) -> list[Caption | CaptionError]:
        """One for each clip or segment that was decoded elsewhere, in order; errors stay what they are."""
        started, watch = time.perf_counter(), _Stopwatch()
        good = {number: clip for number, clip in enumerate(clips) if not isinstance(clip, CaptionError)}
        features = self._encoded(good, watch)
        captions = self._captions(good, features, dict.fromkeys(good, options), watch, started)
        return [clip if isinstance(clip, CaptionError) else captions[number] for number, clip in enumerate(clips)]

    def _captions(
        self,
        clips: Mapping[_K, SampledVideo],
        features: Mapping[_K, torch.Tensor],
        options: Mapping[_K, CaptionOptions],
        watch: _Stopwatch,
        started: float,
    ) -> dict[_K, Caption | CaptionError]:
        beams = self._described(features, options, watch)
        total_ms = (time.perf_counter() - started) * 1000
        captions: dict[_K, Caption | CaptionError] = {}
        for key, clip in clips.items():
            if key in beams:
                timing = Timing(decode=clip.decode_ms, encode=watch.encode, search=watch.search, total=total_ms)
                sentences, video = (
                    self._sentences(beams[key], options[key]),
                    replace(clip, frames=np.empty_like(clip.frames, shape=(0, *clip.frames.shape[1:]))),
                )
                captions[key] = Caption(sentences=sentences, video=video, timing_ms=timing)
            else:
                captions[key] = InternalError("the network gave no caption for this clip; the log says why")
        return captions

    def caption_features(self, features: torch.Tensor, options: CaptionOptions) -> list[tuple[Sentence, ...]]:
        """The sentences for clips whose features (B, L, D) are known; none where the network gives no finite number."""
        beams = self._search(features, [options] * len(features))
        return [self._sentences(hypotheses, options) for hypotheses in beams]

    def _encoded(self, clips: Mapping[_K, SampledVideo], watch: _Stopwatch) -> dict[_K, torch.Tensor]:
        """The features (L, D) of each clip; none for a clip where they are no finite numbers."""

        def encode(some: Sequence[SampledVideo], by: Callable[..., torch.Tensor]) -> list[torch.Tensor | None]:
            with watch.measuring("encode"):
                features = by(np.stack([clip.frames for clip in some]))
                finite = features.isfinite().flatten(1).all(dim=1).tolist()
                return [of_clip if good else None for of_clip, good in zip(features, finite, strict=True)]

        exactly = partial(encode, by=self._exact_features) if self._may_overflow else None
        return self._retried(partial(encode, by=self.features), clips, exactly)

    def _described(
        self, features: Mapping[_K, torch.Tensor], options: Mapping[_K, CaptionOptions], watch: _Stopwatch
    ) -> dict[_K, list[Hypothesis]]:
        """The hypotheses for each clip; none for a clip without finite probabilities."""

        def search(clips: Sequence[tuple[torch.Tensor, CaptionOptions]]) -> list[list[Hypothesis] | None]:
            with watch.measuring("search"):
                beams = self._search(torch.stack([of_clip for of_clip, _ in clips]), [wish for _, wish in clips])
            return [beam or None for beam in beams]

        return self._retried(search, {key: (of_clip, options[key]) for key, of_clip in features.items()})

    def _retried(
        self, step: _Step[_X, _Y], clips: Mapping[_K, _X], last_resort: _Step[_X, _Y] | None = None
    ) -> dict[_K, _Y]:
        """What a step of the network gives for each clip. One that has nothing beside others is tried again alone."""
        found = self._tried(step, clips)
        if len(clips) > 1 or last_resort:
            for number in clips.keys() - found.keys():
                found |= self._tried(last_resort or step, {number: clips[number]})
        return found

    def _tried(self, step: _Step[_X, _Y], clips: Mapping[_K, _X]) -> dict[_K, _Y]:
        if not clips:
            return {}
        try:
            results = step(list(clips.values()))
            return {number: result for number, result in zip(clips, results, strict=True) if result is not None}
        except Exception:
            _log.exception("the network failed on %d clips", len(clips))
        # Not in the block above: there, the exception still holds what the step took of the device's memory.
        self._check_device()
        return {}

    def _check_device(self) -> None:
        """After an error on a GPU: free what memory can be freed, and see whether it still computes."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.empty_cache()
            torch.ones(1, device=self.device).add_(1).item()
        except torch.OutOfMemoryError:
            return
        except Exception as error:
            raise DeviceFailed(f"{self.device} computes nothing any more: {error}") from error

    def features(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        """frames (B, L, resize_px, resize_px, 3) of B clips -> their features (B, L, D)."""
        clips, length = frames.shape[:2]
        one_by_one = frames.reshape(-1, *frames.shape[2:])
        fresh = [True, *(not _equal(before, one) for before, one in pairwise(one_by_one))]
        distinct = one_by_one if all(fresh) else one_by_one[fresh]
        parts = [distinct[at : at + ENCODED_AT_ONCE] for at in range(0, len(distinct), ENCODED_AT_ONCE)]
        features = torch.cat([self._encode(part) for part in parts])
        every = features if all(fresh) else features[np.cumsum(fresh) - 1]
        return every.view(clips, length, -1)

    def _encode(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        """frames (N, resize_px, resize_px, 3) -> features (N, D)."""
        return self._compiled_encoder(frames) if self._compiled_encoder else self._encode_exactly(frames)

    def _exact_features(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        """The same as `features` by the plain network."""
        return torch.stack([self._encode_exactly(of_clip) for of_clip in frames])

    @torch.inference_mode()
    def _encode_exactly(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        pixels = preprocess(torch.from_numpy(frames).to(self.device), self.checkpoint.preprocessing)
        features: torch.Tensor = self.checkpoint.encoder(pixels)
        return features

    @property
    def _may_overflow(self) -> bool:
        """Whether frames are encoded in half precision, in which large numbers become infinite."""
        return bool(self._compiled_encoder and self._compiled_encoder.half)

    @torch.inference_mode()
    def _search(self, features: torch.Tensor, options: Sequence[CaptionOptions]) -> list[list[Hypothesis]]:
        """Clips that ask for the same beam and length are searched together. features (B, L, D)."""
        decoder = self._model.decoder
        beams: list[list[Hypothesis]] = [[] for _ in options]
        limits = [(wish.beam_size, wish.max_words or self.checkpoint.max_words) for wish in options]
        for beam_size, max_words in sorted(set(limits)):
            chosen = [number for number, limit in enumerate(limits) if limit == (beam_size, max_words)]
            if self._gpu_search and self._gpu_search.finds(beam_size, max_words):
                found = self._gpu_search(features[chosen])
            else:
                found = search(decoder, features[chosen], beam_size=beam_size, max_words=max_words, words=WORDS)
            for number, hypotheses in zip(chosen, found, strict=True):
                beams[number] = hypotheses
        return beams

    def _sentences(self, hypotheses: Sequence[Hypothesis], options: CaptionOptions) -> tuple[Sentence, ...]:
        best_first = sorted(hypotheses, key=lambda said: said.score(options.length_penalty), reverse=True)
        return tuple(self._sentence(hypothesis) for hypothesis in best_first[: options.captions])

    def _sentence(self, hypothesis: Hypothesis) -> Sentence:
        words = tuple(self.checkpoint.vocabulary.tokens(hypothesis.words))
        return Sentence(
            text=sentence(words),
            log_prob=hypothesis.log_prob,
            words=words,
            word_probs=tuple(math.exp(log_prob) for log_prob in hypothesis.word_log_probs[: len(words)]),
            attention=hypothesis.attention,
        )


def _equal(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether two frames are; of two that are not, the middle rows nearly always tell."""
    middle = len(one) // 2
    return np.array_equal(one[middle], other[middle]) and np.array_equal(one, other)


def decoded_by(future: Future[list[SampledVideo]]) -> list[SampledVideo] | CaptionError:
    """What came out of `Captioner.decode`."""
    try:
        return future.result()
    except CaptionError as error:
        return error
    except Exception:
        _log.exception("decoding failed in a way that is our own bug")
        return InternalError("the video could not be decoded because of a bug in the server")


def load(
    path: Path | str,
    *,
    device: str = "cpu",
    limits: DecodeLimits | None = None,
    sandboxed: bool = SANDBOX_EXISTS,
    compiled_encoder: Path | None = None,
    record_gpu: bool = False,
    gpu_kernels: Path | None = None,
    gpu_decoding: GpuDecoding | None = None,
) -> Captioner:
    """Load a checkpoint for captioning. `device` is a torch device name; raises `CheckpointError`.

    `compiled_encoder` is what `compile_encoder` made of this checkpoint; only a CPU uses it. Only a GPU is recorded,
    after which it captions several times as fast; that takes it minutes without `gpu_kernels`, what `compiled_kernels`
    made of this checkpoint on such a GPU.
    """
    path = Path(path)
    on_gpu = torch.device(device).type == "cuda"
    compiled = _read_compiled(compiled_encoder) if compiled_encoder and not on_gpu else None
    checkpoint = checkpoints.load(path, with_encoder=compiled is None)
    encoder, gpu_search = (
        _recorded(checkpoint, torch.device(device), gpu_kernels) if on_gpu and record_gpu else (compiled, None)
    )
    return Captioner(
        checkpoint,
        checkpoint_id=f"sha256:{checkpoints.sha256(path)}",
        device=device,
        limits=limits,
        sandboxed=sandboxed,
        compiled_encoder=encoder,
        gpu_search=gpu_search,
        gpu_decoding=gpu_decoding,
    )


def _recorded(
    checkpoint: Checkpoint, device: torch.device, kernels: Path | None
) -> tuple[GpuEncoder, GpuSearch] | tuple[None, None]:
    """Both parts of the network as a GPU runs them; neither where that does not work."""
    from etenet.runtime.cuda import GpuEncoder

    try:
        encoder = GpuEncoder(
            checkpoint.encoder,
            checkpoint.preprocessing,
            device=device,
            kernels=kernels.read_bytes() if kernels else None,
        )
        decoder, longest = checkpoint.model.decoder.to(device).eval(), checkpoint.max_words
        return encoder, GpuSearch(
            decoder, max_words=longest, words=WORDS, frames_per_clip=FRAMES_PER_CLIP, device=device
        )
    except Exception:
        _log.warning("the plain network captions, more slowly, as the GPU's cannot be prepared", exc_info=True)
        return None, None


def _read_compiled(graph: Path) -> CompiledEncoder | None:
    try:
        from etenet.runtime.openvino import CompiledEncoder

        return CompiledEncoder(graph, threads=torch.get_num_threads())
    except (ImportError, RuntimeError) as error:
        _log.warning("the plain network encodes, more slowly, as its compiled form cannot be used: %s", error)
        return None
