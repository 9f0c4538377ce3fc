"""A batch of videos -> a batch of captions or errors. Knows no server: bytes come in, values go out.

captioner = etenet.load(Path("best.pt"))
print(captioner.caption(Path("dog.mp4").read_bytes()).text)
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from etenet import checkpoint as checkpoints
from etenet.checkpoint import Checkpoint
from etenet.config import CaptionOptions, DecodeLimits
from etenet.decoder import Memory, State, Step
from etenet.errors import CaptionError, DeviceFailed, InternalError
from etenet.preprocess import preprocess
from etenet.sandbox import InProcess, Sandbox
from etenet.search import Hypothesis, Words, beam_search, greedy_search
from etenet.video import SampledVideo, require_supported_ffmpeg
from etenet.vocabulary import EOS_ID, SOS_ID, UNKNOWN_ID, sentence

if TYPE_CHECKING:
    from etenet.compiled_encoder import CompiledEncoder

_log = logging.getLogger(__name__)
SANDBOX_EXISTS = sys.platform == "linux"
_K = TypeVar("_K")
_X = TypeVar("_X")
_Y = TypeVar("_Y")
_WORDS = Words(sos=SOS_ID, eos=EOS_ID, never=(UNKNOWN_ID,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sentence:
    """One sentence of the beam. `attention` has, per word, the weight of each of the 16 frames."""

    text: str
    log_prob: float
    words: tuple[str, ...]
    word_probs: tuple[float, ...]
    attention: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Milliseconds. `encode` and `search` are those of the whole batch, `total` runs from batch in to batch out."""

    decode: float
    encode: float
    search: float
    total: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """What is said about one clip, best sentence first."""

    sentences: tuple[Sentence, ...]
    video: SampledVideo
    timing_ms: Timing

    @property
    def text(self) -> str:
        return self.sentences[0].text

    def as_dict(self, *, attention: bool = False) -> dict[str, Any]:
        """The answer of the HTTP contract, but for what only the server knows (`model`)."""
        video, timing = self.video, self.timing_ms
        answer: dict[str, Any] = {
            "caption": self.text,
            "captions": [
                {
                    "caption": said.text,
                    "log_prob": round(said.log_prob, 4),
                    "words": [
                        {"word": word, "prob": round(prob, 4)}
                        for word, prob in zip(said.words, said.word_probs, strict=True)
                    ],
                }
                for said in self.sentences
            ],
            "frames": {
                "times_s": [round(time_s, 3) for time_s in video.times_s],
                "decoded": video.distinct_frames,
            },
            "video": {
                "codec": video.codec,
                "width": video.width_px,
                "height": video.height_px,
                "duration_s": round(video.duration_s, 3),
            },
            "timing_ms": {
                "decode": round(timing.decode, 1),
                "encode": round(timing.encode, 1),
                "search": round(timing.search, 1),
                "total": round(timing.total, 1),
            },
        }
        if attention:
            for entry, said in zip(answer["captions"], self.sentences, strict=True):
                entry["attention"] = [[round(weight, 4) for weight in weights] for weights in said.attention]
        return answer


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

    `sandboxed` clips are decoded in processes that a hostile clip cannot get out of.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        checkpoint_id: str = "",
        device: str = "cpu",
        limits: DecodeLimits | None = None,
        sandboxed: bool = SANDBOX_EXISTS,
        compiled_encoder: CompiledEncoder | None = None,
    ) -> None:
        require_supported_ffmpeg()
        self.checkpoint = checkpoint
        self.checkpoint_id = checkpoint_id
        self.device = torch.device(device)
        self.limits = limits or DecodeLimits()
        self._model = checkpoint.model.to(self.device).to(memory_format=torch.channels_last).eval()
        self._sandboxed = sandboxed
        self._compiled_encoder = compiled_encoder

    @cached_property
    def _clips(self) -> Sandbox | InProcess:
        """What decodes clips; started with the first, as captions of features need none."""
        kind = Sandbox if self._sandboxed else InProcess
        return kind(resize_px=self.checkpoint.preprocessing.resize_px, limits=self.limits)

    @property
    def encoder(self) -> str:
        return self._model.encoder.name

    def caption(self, body: bytes, options: CaptionOptions | None = None) -> Caption:
        """Caption one video file; raises `CaptionError` where it cannot."""
        (outcome,) = self.caption_batch([body], [options or CaptionOptions()])
        if isinstance(outcome, CaptionError):
            raise outcome
        return outcome

    def caption_batch(self, bodies: Sequence[bytes], options: Sequence[CaptionOptions]) -> list[Caption | CaptionError]:
        """One outcome per body, in order; what is wrong with one changes nothing for the others.

        Raises `DeviceFailed` where the device computes nothing any more.
        """
        started, watch = time.perf_counter(), _Stopwatch()
        decoded, features = self._seen(bodies, watch)
        return self._outcomes(decoded, self._described(features, options, watch), options, watch, started)

    def _outcomes(
        self,
        decoded: Sequence[SampledVideo | CaptionError],
        beams: Mapping[int, list[Hypothesis]],
        options: Sequence[CaptionOptions],
        watch: _Stopwatch,
        started: float,
    ) -> list[Caption | CaptionError]:
        total_ms = (time.perf_counter() - started) * 1000
        outcomes: list[Caption | CaptionError] = []
        for number, (video, wish) in enumerate(zip(decoded, options, strict=True)):
            if isinstance(video, CaptionError):
                outcomes.append(video)
            elif number in beams:
                timing = Timing(decode=video.decode_ms, encode=watch.encode, search=watch.search, total=total_ms)
                outcomes.append(Caption(sentences=self._sentences(beams[number], wish), video=video, timing_ms=timing))
            else:
                outcomes.append(InternalError("the network gave no caption for this clip; the log says why"))
        return outcomes

    def caption_stream(
        self, bodies: Iterable[tuple[_K, bytes]], options: CaptionOptions, *, batch_clips: int = 8
    ) -> Iterator[tuple[_K, Caption | CaptionError]]:
        """One outcome per body, by its key, as they come; full batches are encoded while the next are decoded.

        Asks for bodies as it has room: those of two batches are in memory at most.
        """
        rest, more = iter(bodies), True
        decoding: dict[Future[SampledVideo], _K] = {}
        decoded: list[tuple[_K, SampledVideo]] = []
        while True:
            while more and len(decoding) + len(decoded) < 2 * batch_clips:
                if more := (given := next(rest, None)) is not None:
                    decoding[self._clips.submit(given[1])] = given[0]
            if len(decoded) >= batch_clips or (decoded and not decoding):
                batch, decoded = decoded[:batch_clips], decoded[batch_clips:]
                outcomes = self.caption_videos([video for _, video in batch], options)
                yield from zip((key for key, _ in batch), outcomes, strict=True)
            elif decoding:
                done, _ = wait(decoding, return_when=FIRST_COMPLETED)
                for future in done:
                    key, outcome = decoding.pop(future), _outcome(future)
                    if isinstance(outcome, CaptionError):
                        yield key, outcome
                    else:
                        decoded.append((key, outcome))
            else:
                return

    def caption_videos(self, videos: Sequence[SampledVideo], options: CaptionOptions) -> list[Caption | CaptionError]:
        """One outcome per clip that was decoded elsewhere, in order."""
        started, watch = time.perf_counter(), _Stopwatch()
        features = self._retried(lambda of_clips: self._encoded(of_clips, watch), dict(enumerate(videos)))
        beams = self._described(features, [options] * len(videos), watch)
        return self._outcomes(videos, beams, [options] * len(videos), watch, started)

    def caption_features(self, features: torch.Tensor, options: CaptionOptions) -> list[tuple[Sentence, ...]]:
        """The sentences for clips whose features (B, L, D) are known; none where the network gives no finite number."""
        beams = self._search(features, [options] * len(features))
        return [self._sentences(hypotheses, options) for hypotheses in beams]

    def _seen(
        self, bodies: Sequence[bytes], watch: _Stopwatch
    ) -> tuple[list[SampledVideo | CaptionError], dict[int, torch.Tensor]]:
        """What each body is, and the features of each that is a video: some are encoded while others are decoded."""
        decoded: dict[int, SampledVideo | CaptionError] = {}
        features: dict[int, torch.Tensor] = {}
        pending = {self._clips.submit(body): number for number, body in enumerate(bodies)}
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            ready = {pending.pop(future): _outcome(future) for future in done}
            decoded |= ready
            videos = {number: video for number, video in ready.items() if isinstance(video, SampledVideo)}
            features |= self._retried(lambda of_clips: self._encoded(of_clips, watch), videos)
        return [decoded[number] for number in range(len(bodies))], features

    def _encoded(self, videos: Sequence[SampledVideo], watch: _Stopwatch) -> list[torch.Tensor | None]:
        """The features (L, D) of each clip; None where they are no finite numbers."""
        with watch.measuring("encode"):
            features = self.features(np.stack([video.frames for video in videos]))
            return [of_clip if bool(of_clip.isfinite().all()) else None for of_clip in features]

    def _described(
        self, features: Mapping[int, torch.Tensor], options: Sequence[CaptionOptions], watch: _Stopwatch
    ) -> dict[int, list[Hypothesis]]:
        """The hypotheses for each clip; none for a clip without finite probabilities."""

        def search(clips: Sequence[tuple[torch.Tensor, CaptionOptions]]) -> list[list[Hypothesis] | None]:
            with watch.measuring("search"):
                beams = self._search(torch.stack([of_clip for of_clip, _ in clips]), [wish for _, wish in clips])
            return [beam or None for beam in beams]

        return self._retried(search, {number: (of_clip, options[number]) for number, of_clip in features.items()})

    def _retried(self, step: Callable[[Sequence[_X]], Sequence[_Y | None]], clips: Mapping[int, _X]) -> dict[int, _Y]:
        """What a step of the network gives for each clip. One that has nothing beside others is tried again alone."""
        found = self._tried(step, clips)
        if len(clips) > 1:
            for number in clips.keys() - found.keys():
                found |= self._tried(step, {number: clips[number]})
        return found

    def _tried(self, step: Callable[[Sequence[_X]], Sequence[_Y | None]], clips: Mapping[int, _X]) -> dict[int, _Y]:
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
        fresh = [True, *(not np.array_equal(one, before) for before, one in pairwise(one_by_one))]
        return self._encode(one_by_one[fresh])[np.cumsum(fresh) - 1].view(clips, length, -1)

    def _encode(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        """frames (N, resize_px, resize_px, 3) -> features (N, D)."""
        if self._compiled_encoder:
            return self._compiled_encoder(frames)
        with torch.inference_mode():
            pixels = preprocess(torch.from_numpy(frames).to(self.device), self.checkpoint.preprocessing)
            features: torch.Tensor = self._model.encoder(pixels)
            return features

    @torch.inference_mode()
    def _search(self, features: torch.Tensor, options: Sequence[CaptionOptions]) -> list[list[Hypothesis]]:
        """Clips that ask for the same beam and length are searched together. features (B, L, D)."""
        memory = self._model.decoder.remember(features)
        beams: list[list[Hypothesis]] = [[] for _ in options]
        limits = [(wish.beam_size, wish.max_words or self.checkpoint.max_words) for wish in options]
        for beam_size, max_words in sorted(set(limits)):
            chosen = [number for number, limit in enumerate(limits) if limit == (beam_size, max_words)]
            part = memory.pick(chosen)

            def step(words: torch.Tensor, state: State, part: Memory = part) -> Step:
                return self._model.decoder.step(words, state, part)

            state = self._model.decoder.first_state(part, beam_size)
            shape: dict[str, Any] = {
                "clips": len(chosen),
                "max_words": max_words,
                "words": _WORDS,
                "device": self.device,
            }
            if beam_size == 1:
                found = greedy_search(step, state, **shape)
            else:
                found = beam_search(step, state, beam_size=beam_size, **shape)
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


def _outcome(future: Future[SampledVideo]) -> SampledVideo | CaptionError:
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
) -> Captioner:
    """Load a checkpoint for captioning. `device` is a torch device name; raises `CheckpointError`.

    `compiled_encoder` is what `compile_encoder` made of this checkpoint; only a CPU uses it.
    """
    path = Path(path)
    compiled = _read_compiled(compiled_encoder) if compiled_encoder and device == "cpu" else None
    return Captioner(
        checkpoints.load(path, with_encoder=compiled is None),
        checkpoint_id=f"sha256:{checkpoints.sha256(path)}",
        device=device,
        limits=limits,
        sandboxed=sandboxed,
        compiled_encoder=compiled,
    )


def _read_compiled(graph: Path) -> CompiledEncoder | None:
    try:
        from etenet.compiled_encoder import CompiledEncoder

        return CompiledEncoder(graph, threads=torch.get_num_threads())
    except (ImportError, RuntimeError) as error:
        _log.warning("the plain network encodes, more slowly, as its compiled form cannot be used: %s", error)
        return None
