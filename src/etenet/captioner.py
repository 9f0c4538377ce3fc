"""A batch of videos -> a batch of captions or errors. Knows no server: bytes come in, values go out.

captioner = etenet.load(Path("best.pt"))
print(captioner.caption(Path("dog.mp4").read_bytes()).text)
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

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

_log = logging.getLogger(__name__)
SANDBOX_EXISTS = sys.platform == "linux"
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
    """Milliseconds spent in the parts of the model step."""

    encode: float = 0.0
    search: float = 0.0


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
    ) -> None:
        require_supported_ffmpeg()
        self.checkpoint = checkpoint
        self.checkpoint_id = checkpoint_id
        self.device = torch.device(device)
        self.limits = limits or DecodeLimits()
        self._model = checkpoint.model.to(self.device).to(memory_format=torch.channels_last).eval()
        self._sandboxed = sandboxed

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
        started = time.perf_counter()
        decoded = self._decoded(bodies)
        good = [number for number, outcome in enumerate(decoded) if isinstance(outcome, SampledVideo)]
        videos = [outcome for outcome in decoded if isinstance(outcome, SampledVideo)]
        watch = _Stopwatch()
        beams = iter(self._described(videos, [options[number] for number in good], watch))
        finished = time.perf_counter()
        outcomes: list[Caption | CaptionError] = []
        for outcome, wish in zip(decoded, options, strict=True):
            if isinstance(outcome, CaptionError):
                outcomes.append(outcome)
            elif hypotheses := next(beams):
                timing = Timing(
                    decode=outcome.decode_ms,
                    encode=watch.encode,
                    search=watch.search,
                    total=(finished - started) * 1000,
                )
                outcomes.append(Caption(sentences=self._sentences(hypotheses, wish), video=outcome, timing_ms=timing))
            else:
                outcomes.append(InternalError("the network gave no caption for this clip; the log says why"))
        return outcomes

    def caption_features(self, features: torch.Tensor, options: CaptionOptions) -> list[tuple[Sentence, ...]]:
        """The sentences for clips whose features (B, L, D) are known; none where the network gives no finite number."""
        with torch.inference_mode():
            memory = self._model.decoder.remember(features)
        beams = self._search(memory, [options] * len(features))
        return [self._sentences(hypotheses, options) for hypotheses in beams]

    def _decoded(self, bodies: Sequence[bytes]) -> list[SampledVideo | CaptionError]:
        decoded: list[SampledVideo | CaptionError] = []
        for future in [self._clips.submit(body) for body in bodies]:
            try:
                decoded.append(future.result())
            except CaptionError as error:
                decoded.append(error)
            except Exception:
                _log.exception("decoding failed in a way that is our own bug")
                decoded.append(InternalError("the video could not be decoded because of a bug in the server"))
        return decoded

    def _described(
        self, videos: Sequence[SampledVideo], options: Sequence[CaptionOptions], watch: _Stopwatch
    ) -> list[list[Hypothesis]]:
        """The hypotheses for each clip. One that has none, be it that the whole batch failed, is tried again alone."""
        beams = self._model_step(videos, options, watch) if videos else []
        for number in [number for number, hypotheses in enumerate(beams) if not hypotheses]:
            (beams[number],) = self._model_step([videos[number]], [options[number]], watch)
        return beams

    def _model_step(
        self, videos: Sequence[SampledVideo], options: Sequence[CaptionOptions], watch: _Stopwatch
    ) -> list[list[Hypothesis]]:
        """The hypotheses for each clip; none for a clip without finite probabilities, for all where it fails."""
        try:
            return self._timed_step(videos, options, watch)
        except Exception:
            _log.exception("the network failed on %d clips", len(videos))
        # Not in the block above: there, the exception still holds what the batch took of the device's memory.
        self._check_device()
        return [[] for _ in videos]

    def _timed_step(
        self, videos: Sequence[SampledVideo], options: Sequence[CaptionOptions], watch: _Stopwatch
    ) -> list[list[Hypothesis]]:
        started = time.perf_counter()
        memory = self._encode(videos)
        encoded = time.perf_counter()
        beams = self._search(memory, options)
        watch.encode += (encoded - started) * 1000
        watch.search += (time.perf_counter() - encoded) * 1000
        return beams

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

    @torch.inference_mode()
    def _encode(self, videos: Sequence[SampledVideo]) -> Memory:
        frames = torch.from_numpy(np.stack([video.frames for video in videos])).to(self.device)
        return self._model.decoder.remember(self._model.encode(preprocess(frames, self.checkpoint.preprocessing)))

    @torch.inference_mode()
    def _search(self, memory: Memory, options: Sequence[CaptionOptions]) -> list[list[Hypothesis]]:
        """Clips that ask for the same beam and length are searched together."""
        beams: list[list[Hypothesis]] = [[] for _ in options]
        limits = [(wish.beam_size, wish.max_words or self.checkpoint.max_words) for wish in options]
        for beam_size, max_words in sorted(set(limits)):
            chosen = [number for number, limit in enumerate(limits) if limit == (beam_size, max_words)]
            part = Memory(memory.features[chosen], memory.keys[chosen])

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


def load(
    path: Path | str, *, device: str = "cpu", limits: DecodeLimits | None = None, sandboxed: bool = SANDBOX_EXISTS
) -> Captioner:
    """Load a checkpoint for captioning. `device` is a torch device name; raises `CheckpointError`."""
    path = Path(path)
    return Captioner(
        checkpoints.load(path),
        checkpoint_id=f"sha256:{checkpoints.sha256(path)}",
        device=device,
        limits=limits,
        sandboxed=sandboxed,
    )
