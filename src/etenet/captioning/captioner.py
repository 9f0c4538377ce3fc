"""Clips and a network -> captions, one outcome for each clip. Knows no server: bytes come in, values go out.

captioner = etenet.load(Path("best.pt"))
print(captioner.caption(Path("dog.mp4").read_bytes()).text)
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from etenet.assets import CANARY_CLIP
from etenet.captioning.captions import Caption, Outcome, Sentence
from etenet.captioning.feature_cache import CachedSteps, FeatureCache
from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import (
    JOB_DECODE_TRIES,
    KeyT,
    OnCaption,
    OnStage,
    Schedule,
    Video,
    caption_videos,
    captions_of,
)
from etenet.errors import BadOption, CaptionError, Overloaded, UsageError, counted
from etenet.linux import cores
from etenet.model.checkpoint import Checkpoint
from etenet.model.hypothesis import Hypothesis
from etenet.model.vocabulary import sentence
from etenet.runtime import BF16, PACKAGED
from etenet.runtime.interface import Features, FeaturesOfClips, Network, require_similar_features
from etenet.runtime.kept import kept_encoder
from etenet.runtime.load import load_network
from etenet.sandbox.pool import Decoders, InProcess, Sandbox
from etenet.video.clip import FRAMES_PER_CLIP, Clip
from etenet.video.ffmpeg import require_supported_ffmpeg
from etenet.video.limits import DecodeLimits
from etenet.video.thumbnails import thumbnails

_log = logging.getLogger(__name__)

SANDBOX_EXISTS = sys.platform == "linux"
MAX_HELD_BYTES = 256 * 2**20  # of the bodies that a stream holds while they are decoded

_NO_CAPTION = "it gets no caption"

_X = TypeVar("_X")
_Y = TypeVar("_Y")
_Step = Callable[[Sequence[_X]], Sequence[_Y | None]]  # None: nothing for this clip


class Captioner:
    """A checkpoint, a form of its network and decoders, ready to caption. One instance serves one thread at a time.

    It serves only the process that loaded it: a fork has none of its decoders.
    With `feature_cache_bytes`, `caption` and `caption_batch` remember the features of the last videos, up to so many.
    """

    def __init__(
        self, checkpoint: Checkpoint, network: Network, decoders: Decoders, *, feature_cache_bytes: int = 0
    ) -> None:
        self.checkpoint, self.network, self._decoders = checkpoint, network, decoders
        self._cache = FeatureCache(feature_cache_bytes) if feature_cache_bytes > 0 else None
        self._pid = os.getpid()

    @property
    def checkpoint_id(self) -> str:
        return self.checkpoint.id

    @property
    def encoder(self) -> str:
        return self.checkpoint.encoder_name

    def caption(self, body: bytes, options: CaptionOptions | None = None, *, fresh: bool = False) -> Caption:
        """Caption one video file as one clip. `fresh`: even if its features are known. Raises `CaptionError`."""
        options = options or CaptionOptions()
        as_one = replace(options, cut=replace(options.cut, segment_s=None, segment=None))
        (outcome,) = self.caption_batch([body], [as_one], fresh=[0] if fresh else [])
        if isinstance(outcome, CaptionError):
            raise outcome
        assert isinstance(outcome, Caption)
        return outcome

    def caption_batch(
        self,
        bodies: Sequence[bytes],
        options: Sequence[CaptionOptions],
        on_caption: Sequence[Callable[[Caption], None] | None] = (),
        *,
        fresh: Collection[int] = (),
        on_stage: OnStage[int] = lambda _: None,
    ) -> list[Outcome]:
        """One outcome per body, in order. A bad video changes nothing for the others.

        `on_caption` may have a function for a body, to be called with the caption of each of its segments as soon as it
        is there. Then captions are made a few at a time. The bodies with the numbers `fresh` are decoded and encoded
        even if their features are known.

        All videos of a batch together may have only as many segments as one may have; videos beyond that get
        `Overloaded`. `on_stage` is called after each stage, with the numbers of its bodies. Raises `DeviceFailed` if
        the device no longer computes.
        """
        room = self._decoders.limits.max_segments + len(bodies)

        def accept(clips: list[Clip], still_decoding: int) -> list[Clip] | CaptionError:
            nonlocal room
            if len(clips) > room - still_decoding:
                return Overloaded(
                    f"the videos that came together have more than {self._decoders.limits.max_segments} segments; "
                    "send this one again in a moment, or ask for fewer"
                )
            room -= len(clips)
            return clips

        videos = [
            Video(number, *request, fresh=number in fresh)
            for number, request in enumerate(zip(bodies, options, strict=True))
        ]
        wanted_soon = {number: function for number, function in enumerate(on_caption) if function}
        schedule = Schedule()
        if wanted_soon:
            few = self.network.few_clips
            schedule = Schedule(search_clips=few, max_batch=few)

        def tell(number: int, caption: Caption) -> None:
            if number in wanted_soon:
                wanted_soon[number](caption)

        steps = CachedSteps(self, self._cache) if self._cache else self
        outcomes = dict(caption_videos(steps, videos, schedule, accept=accept, on_caption=tell, on_stage=on_stage))
        return [outcomes[number] for number in range(len(bodies))]

    def caption_stream(
        self,
        videos: Iterable[Video[KeyT]],
        *,
        batch_clips: int | None = None,
        on_caption: OnCaption[KeyT] = lambda *_: None,
    ) -> Iterator[tuple[KeyT, Outcome]]:
        """One outcome per video, by its key, in the order in which they are ready.

        Takes videos as it has room: one batch is in memory, and beside it another or one video per core, and fewer if
        they are large.
        """
        batch_clips = batch_clips or self.network.batch_clips
        schedule = Schedule(
            encode_clips=batch_clips,
            search_clips=batch_clips,
            max_batch=batch_clips,
            max_clips=batch_clips + max(batch_clips, cores()),
            max_bytes=MAX_HELD_BYTES,
            continue_cuts=True,
            decode_tries=JOB_DECODE_TRIES,
        )
        return caption_videos(self, videos, schedule, on_caption=on_caption)

    def caption_decoded(
        self, clips: Sequence[Clip | CaptionError], options: CaptionOptions
    ) -> list[Caption | CaptionError]:
        """One outcome for each clip that was decoded elsewhere, in order. Errors stay what they are."""
        if refusal := self.refusal(options):
            return [clip if isinstance(clip, CaptionError) else refusal for clip in clips]
        started = time.perf_counter()
        good = {number: clip for number, clip in enumerate(clips) if isinstance(clip, Clip)}
        features, encode_s = self.encode(good), time.perf_counter() - started
        captions = captions_of(self, good, features, dict.fromkeys(good, options), encode_s=encode_s, started=started)
        return [captions[number] if isinstance(clip, Clip) else clip for number, clip in enumerate(clips)]

    def caption_features(self, features: FeaturesOfClips, options: CaptionOptions) -> list[tuple[Sentence, ...]]:
        """Features (L, D) of B clips -> the sentences of each; none if its probabilities are not finite."""
        max_words = options.max_words or self.checkpoint.max_words
        beams = self.beams(features, beam_size=options.beam_size, max_words=max_words)
        return [self._sentences(beam, options) for beam in beams]

    def beams(self, features: FeaturesOfClips, *, beam_size: int, max_words: int) -> list[list[Hypothesis]]:
        """Features (L, D) of B clips -> the sentences of each, most probable first, with all that `order` needs."""
        beams = self.network.sentences(features, beam_size=beam_size, max_words=max_words)
        if not (minimum_risk := self.checkpoint.minimum_risk):
            return beams
        return minimum_risk.compared(self.network.log_probs, self.network.mean_features(features), beams)

    def order(self, beam: Sequence[Hypothesis], length_penalty: float) -> list[int]:
        """The numbers of the sentences of a beam, the one to say first. A length penalty overrules minimum risk."""
        if self.checkpoint.minimum_risk and not length_penalty:
            return self.checkpoint.minimum_risk.order(beam)
        return sorted(range(len(beam)), key=lambda number: -beam[number].score(length_penalty))

    def refusal(self, options: CaptionOptions) -> BadOption | None:
        """Why this checkpoint cannot do what the options ask for; None if it can."""
        return options.refusal(self.checkpoint.confidence)

    def decode(self, video: Video[Any]) -> Future[list[Clip]]:
        """The clips of a video, one for each segment, or a `CaptionError`."""
        if os.getpid() != self._pid:
            raise UsageError(
                "the captioner was loaded before this process was forked, so it has no decoders here; load one in each "
                "process, or start processes with the spawn method of multiprocessing"
            )
        return self._decoders.submit(video.body, video.options.cut)

    def thumbnails(self, clip: Clip, options: CaptionOptions) -> tuple[bytes, ...]:
        """The frames of a clip as JPEGs, if they are asked for."""
        return thumbnails(clip, longer_px=options.thumbnails) if options.thumbnails else ()

    def encode(self, clips: Mapping[int, Clip]) -> dict[int, Features]:
        """The features (L, D) of each clip. A clip whose features are not finite is missing."""

        def encode(some: Sequence[Clip], network: Network) -> list[Features | None]:
            features = network.features(np.stack([clip.frames for clip in some]))
            good = network.finite(features)
            return [of_clip if is_good else None for of_clip, is_good in zip(features, good, strict=True)]

        exact = self.network.exact
        last_resort = None if exact is self.network else partial(encode, network=exact)
        return self._isolated(partial(encode, network=self.network), clips, last_resort)

    def search(
        self, features: Mapping[int, Features], options: Mapping[int, CaptionOptions]
    ) -> dict[int, tuple[Sentence, ...]]:
        """The sentences of each clip. A clip whose probabilities are not finite is missing."""

        def search(clips: Sequence[tuple[Features, CaptionOptions]]) -> list[tuple[Sentence, ...] | None]:
            """Clips with the same beam and length are searched together."""
            sentences: list[tuple[Sentence, ...] | None] = [None] * len(clips)
            shapes = [(of_clip.beam_size, of_clip.max_words or self.checkpoint.max_words) for _, of_clip in clips]
            for beam_size, max_words in sorted(set(shapes)):
                chosen = [number for number, shape in enumerate(shapes) if shape == (beam_size, max_words)]
                together = [clips[number][0] for number in chosen]
                beams = self.beams(together, beam_size=beam_size, max_words=max_words)
                for number, beam in zip(chosen, beams, strict=True):
                    sentences[number] = self._sentences(beam, clips[number][1]) or None
            return sentences

        return self._isolated(search, {number: (of_clip, options[number]) for number, of_clip in features.items()})

    def _isolated(
        self, step: _Step[_X, _Y], clips: Mapping[int, _X], last_resort: _Step[_X, _Y] | None = None
    ) -> dict[int, _Y]:
        """The results of a step for all clips at once. A clip without a result is tried again alone."""
        if len(clips) == 1 and not last_resort:
            return self._try(step, clips, _NO_CAPTION)
        results = self._try(step, clips, "each is tried again, alone")
        for number in clips.keys() - results.keys():
            results |= self._try(last_resort or step, {number: clips[number]}, _NO_CAPTION)
        return results

    def _try(self, step: _Step[_X, _Y], clips: Mapping[int, _X], on_failure: str) -> dict[int, _Y]:
        if not clips:
            return {}
        try:
            results = step(list(clips.values()))
            return {number: result for number, result in zip(clips, results, strict=True) if result is not None}
        except Exception:
            _log.exception("the network failed on %s; %s", counted(len(clips), "clip"), on_failure)
        # Not in the block above: there, the exception still holds memory of the device.
        self.network.recover()
        return {}

    def _sentences(self, beam: Sequence[Hypothesis], options: CaptionOptions) -> tuple[Sentence, ...]:
        order, calibration = self.order(beam, options.length_penalty), self.checkpoint.confidence
        chosen = [beam[number] for number in order[: options.captions]]
        if calibration is None or options.beam_size < calibration.beam_size:
            return tuple(self._sentence(one) for one in chosen)
        return tuple(self._sentence(one, calibration.confidence(one, beam)) for one in chosen)

    def _sentence(self, hypothesis: Hypothesis, confidence: float | None = None) -> Sentence:
        words = tuple(self.checkpoint.vocabulary.tokens(hypothesis.words))
        return Sentence(
            text=sentence(words),
            log_prob=hypothesis.log_prob,
            confidence=confidence,
            words=words,
            word_probs=tuple(math.exp(log_prob) for log_prob in hypothesis.word_log_probs[: len(words)]),
            attention=hypothesis.attention,
        )


def decoders_for(
    checkpoint: Checkpoint, *, limits: DecodeLimits | None = None, sandboxed: bool = SANDBOX_EXISTS
) -> Decoders:
    """Decoders whose frames have the size that the checkpoint needs."""
    require_supported_ffmpeg()
    resize_px = checkpoint.preprocessing.resize_px
    if sandboxed:
        return Sandbox(resize_px=resize_px, limits=limits)
    return InProcess(resize_px=resize_px, limits=limits)


def load(
    path: Path | str,
    *,
    device: str = "cpu",
    limits: DecodeLimits | None = None,
    sandboxed: bool = SANDBOX_EXISTS,
    compiled_encoder: Path | bool = True,
    precision: str = PACKAGED,
    record_gpu: bool = False,
    gpu_kernels: Path | None = None,
    feature_cache_bytes: int = 0,
) -> Captioner:
    """Load a checkpoint for captioning. `device` is a torch device name. Raises `CheckpointError`.

    `sandboxed` videos are decoded in processes that a hostile clip cannot get out of.
    A CPU takes the compiled encoder that this machine keeps (`runtime/kept.py`). The first time that compiles it, which
    takes from seconds to a minute. `compiled_encoder` can be a file of the same instead, or False: then all is computed
    on torch, unchanged and more slowly.
    `precision`, `record_gpu` and `gpu_kernels` are `precision`, `capture` and `gpu_kernels` of
    `runtime.load.load_network`, `feature_cache_bytes` is that of `Captioner`. In bf16 the features of a test clip must
    be nearly those of float32; `UsageError` if they are not.
    """
    use_kept = compiled_encoder is True and device == "cpu"
    given = compiled_encoder if isinstance(compiled_encoder, Path) else None
    with kept_encoder(Path(path)) if use_kept else nullcontext(given) as graph:
        load_form = partial(
            load_network,
            Path(path),
            device=device,
            frames_per_clip=FRAMES_PER_CLIP,
            encoder_graph=graph,
            gpu_kernels=gpu_kernels,
            capture=record_gpu,
        )
        checkpoint, network = load_form(precision=precision)
        decoders = decoders_for(checkpoint, limits=limits, sandboxed=sandboxed)
        if network.precision == BF16:
            (clip,) = decoders.submit(CANARY_CLIP.read_bytes()).result()
            _, exact = load_form()
            require_similar_features(network, exact, clip.frames)
    return Captioner(checkpoint, network, decoders, feature_cache_bytes=feature_cache_bytes)
