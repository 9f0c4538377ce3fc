"""EtENet: video captioning, from bytes to a sentence (arXiv 1904.02628).

>>> import etenet
>>> captioner = etenet.load("model_store/demo.pt")  # doctest: +SKIP
>>> captioner.caption(open("clip.mp4", "rb").read()).text  # doctest: +SKIP
'a dog is running past on the beach'
"""

from etenet.captioner import Caption, Captioner, Sentence, load
from etenet.config import CaptionOptions, DecodeLimits
from etenet.errors import CaptionError, EtenetError

__all__ = [
    "Caption",
    "CaptionError",
    "CaptionOptions",
    "Captioner",
    "DecodeLimits",
    "EtenetError",
    "Sentence",
    "load",
]
