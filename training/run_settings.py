"""All the numbers of a run: typed, complete, and checked. Knows no recipe.

Raises `UsageError` in one line that shows the field, what it may be, and the value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from etenet.errors import UsageError
from etenet.model.config import MAX_LAYER_SIZE, MAX_WORDS, Preprocessing
from etenet.model.encoder import default_preprocessing
from etenet.scoring.scores import TOKENIZERS, Tokenizer
from etenet.video.clip import FRAMES_PER_CLIP
from training.loop.loss import ATTENTION_PENALTY
from training.settings import check_at_least, check_at_most, check_one_of, check_share

EpochOf = Literal["captions", "clips"]
Baseline = Literal["greedy", "mean of the other samples"]
OutputBias = Literal["zero", "word frequency"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stills:
    """How the encoder learns to name what is in single frames, before captions."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    report_every: int = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of caption training. `encoder_learning_rate` 0 freezes the encoder and caches its features.

    An optimizer step sees `batch_clips * accumulation_steps` clips with `captions_per_clip` sentences each: the
    effective batch, in sentences, is the product of the three. With `epoch_of="captions"` an epoch has every sentence
    of the data set once (as in the paper), with `"clips"` every clip once.

    With `samples_per_clip` the stage is self-critical (Rennie et al., arXiv 1612.00563): it draws as many sentences per
    clip and rewards each by its CIDEr-D above the baseline. Otherwise it learns by teacher forcing.
    """

    epochs: int
    patience_epochs: int
    epoch_of: EpochOf = "captions"
    batch_clips: int
    accumulation_steps: int
    captions_per_clip: int = 1
    caption_agreement: float = 0.0  # captions are drawn by their CIDEr-D against the clip's others to this power
    unseen_weight: float = 0.0  # of clips without frames, whose features are imagined; for a frozen encoder
    frames_per_clip: int = 0  # different frames of a clip that a step looks at, drawn anew; 0: all 16
    mirrored_share: float = 0.0  # of the examples, whose frames are mirrored
    smallest_crop: float = 1.0  # random crops keep at least this share of a clip's width and height; 1: all of it
    views: int = 1  # of a clip, for a frozen encoder: as it is, and others, mirrored in turn and cropped
    encoder_learning_rate: float
    encoder_weight_decay: float = 4e-5
    decoder_learning_rate: float
    decoder_weight_decay: float = 1e-4
    projection_rate_share: float = 1.0  # of the decoder's learning rate, for the projection of the features
    warmup_steps: int = 0  # the learning rates rise linearly during these steps
    final_learning_rate_share: float = 1.0  # and then fall to this share along a half cosine
    gradient_clip_value: float = 10.0  # of each number; 0: off
    gradient_clip_norm: float = 0.0  # of all together, before the values; 0: off
    weight_average: float = 0.0  # decay per step of the moving average of the weights that is validated and saved
    label_smoothing: float = 0.0  # share of a word's probability that is spread over the vocabulary
    attention_penalty: float = ATTENTION_PENALTY
    samples_per_clip: int = 0  # drawn sentences; 0: teacher forcing
    teacher_forcing: float = 0.0  # weight of its loss beside the reward of the samples
    baseline: Baseline = "mean of the other samples"
    mixed_precision: bool = True  # the encoder in bf16 autocast
    tokenizer: Tokenizer = "ptb"  # of the validation scores; "none": captions are normalised, no Java
    meteor: bool = True  # a validation score; its Java program takes about 8 s of a core per epoch
    activation_checkpointing: bool = False  # recompute the encoder's activations instead of storing them
    compiled: bool = False  # the encoder by torch.compile, if that works; takes minutes before the first step

    def __post_init__(self) -> None:
        check_at_least(1, self, "epochs", "patience_epochs", "batch_clips", "accumulation_steps", "captions_per_clip")
        check_at_least(1, self, "views")
        check_at_least(0, self, "frames_per_clip", "warmup_steps", "samples_per_clip", "attention_penalty")
        check_at_least(0, self, "teacher_forcing")
        check_at_least(0, self, "encoder_learning_rate", "encoder_weight_decay", "decoder_weight_decay")
        check_at_least(0, self, "decoder_learning_rate", "gradient_clip_value", "gradient_clip_norm")
        check_at_least(0, self, "caption_agreement", "unseen_weight")
        check_share(self, "mirrored_share", "smallest_crop", "final_learning_rate_share", "projection_rate_share")
        check_share(self, "weight_average", "label_smoothing", below_1=True)
        check_one_of(get_args(EpochOf), self, "epoch_of")
        check_one_of(get_args(Baseline), self, "baseline")
        check_one_of(TOKENIZERS, self, "tokenizer")
        if self.frames_per_clip > FRAMES_PER_CLIP:
            raise UsageError(f"frames_per_clip is at most {FRAMES_PER_CLIP}, got {self.frames_per_clip}")
        if self.encoder_learning_rate:
            if self.views > 1:
                raise UsageError(
                    "views are for a frozen encoder; one that learns takes mirrored_share and smallest_crop"
                )
        elif self.mirrored_share or (self.smallest_crop < 1 and self.views == 1):
            raise UsageError(
                "mirrored_share and smallest_crop need encoder_learning_rate; a frozen encoder mirrors and crops only "
                "with views of 2 or more"
            )
        if self.unseen_weight and self.encoder_learning_rate:
            raise UsageError("unseen_weight is for a frozen encoder: set it to 0, or encoder_learning_rate")
        if self.caption_agreement and self.epoch_of == "captions":
            raise UsageError(
                "caption_agreement draws captions, and an epoch of captions has them all: set epoch_of to clips"
            )
        if self.samples_per_clip:
            self._check_self_critical()
        elif self.teacher_forcing:
            raise UsageError("teacher_forcing is for stages with samples_per_clip; others have nothing else")

    def _check_self_critical(self) -> None:
        if self.encoder_learning_rate:
            raise UsageError("samples_per_clip is for a frozen encoder: set encoder_learning_rate to 0")
        if self.captions_per_clip != 1 or self.label_smoothing:
            raise UsageError(
                "captions_per_clip and label_smoothing are not for samples: "
                "leave them at 1 and 0, or set samples_per_clip to 0"
            )
        if self.caption_agreement and not self.teacher_forcing:
            raise UsageError("caption_agreement needs teacher_forcing: samples are rewarded for all captions alike")
        if self.samples_per_clip == 1 and self.baseline != "greedy":
            raise UsageError("the mean of the other samples needs samples_per_clip of 2 or more")

    @property
    def window_clips(self) -> int:
        """Clips (with their sentences) per optimizer step."""
        return self.batch_clips * self.accumulation_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A run: the network's sizes, which all stages share, and the stages. Sizes are the paper's where it gives them."""

    encoder: str
    crop_px: int
    max_words: int
    dropout: float
    projection: int = 0  # size of a learned projection of the features, the decoder's first layer; 0: none
    hidden_size: int = 512
    embedding_size: int = 486
    attention_size: int = 512
    output_bias: OutputBias = "zero"  # where a new decoder's bias of the words starts
    stages: dict[int, Stage]
    stills: Stills | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(1, self, "crop_px", "max_words", "hidden_size", "embedding_size", "attention_size")
        check_at_least(0, self, "projection", "seed")
        check_at_most(MAX_WORDS, self, "max_words")
        check_at_most(MAX_LAYER_SIZE, self, "hidden_size", "embedding_size", "attention_size", "projection")
        check_share(self, "dropout", below_1=True)
        check_one_of(get_args(OutputBias), self, "output_bias")

    def preprocessing(self) -> Preprocessing:
        return default_preprocessing(self.encoder, crop_px=self.crop_px)
