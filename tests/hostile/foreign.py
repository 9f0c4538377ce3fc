"""Files that are not videos."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import sys
import tarfile
import wave
import zipfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tests import clips
from tests.hostile.file import HostileFile


def files(seed: int) -> Iterator[HostileFile]:
    rng = np.random.default_rng(seed)
    bodies = {
        **dict(_images()),
        **dict(_sounds()),
        **dict(_archives()),
        "text": b"hello, world\n" * 100,
        "JSON": json.dumps({"caption": "a dog"}).encode(),
        "HTML": b"<!doctype html><video src=clip.mp4></video>",
        "XML": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><x>&a;</x>',
        "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
        "ELF": Path(sys.executable).resolve().read_bytes()[:65536],
        "shell": b"#!/bin/sh\ntouch /tmp/never\n",
        "SubRip": b"1\n00:00:00,000 --> 00:00:01,000\nhello\n\n" * 50,
        "WebVTT": b"WEBVTT\n\n00:00.000 --> 00:01.000\nhello\n\n" * 50,
        "ASS": b"[Script Info]\nScriptType: v4.00+\n[Events]\nDialogue: 0,0:00:00.00,0:00:01.00,,,,,,,hello\n",
        "SQLite": b"SQLite format 3\0" + bytes(4096),
        "a class file": b"\xca\xfe\xba\xbe" + bytes(100),
        "one byte": b"x",
        "one null": b"\0",
        "a newline": b"\n",
        "only spaces": b" " * 4096,
        "a URL": b"https://127.0.0.1/clip.mp4",
        "a lone ftyp": b"\0\0\0\x18ftypisom\0\0\2\0isommp41",
        "a lone EBML header": b"\x1aE\xdf\xa3\x93B\x82\x88matroska",
        "a lone RIFF": b"RIFF\xff\xff\xff\xffAVI LIST",
        "a lone FLV header": b"FLV\1\5\0\0\0\x09\0\0\0\0",
        "a lone GIF header": b"GIF89a\1\0\1\0\0\0\0;",
        "a lone ASF header": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + bytes(16),
    }
    for name, body in bodies.items():
        yield HostileFile(name, "reject", body)
    for size in (16, 1024, 1 << 20):
        yield HostileFile(f"{size} random bytes", "reject", rng.bytes(size))


def _images() -> Iterator[tuple[str, bytes]]:
    picture = Image.fromarray(clips.pattern(1, 64, 48))
    for kind in ("png", "jpeg", "bmp", "tiff", "webp", "ppm", "ico", "tga"):
        file = io.BytesIO()
        picture.save(file, kind)
        yield f"a {kind} picture", file.getvalue()


def _sounds() -> Iterator[tuple[str, bytes]]:
    yield "m4a", clips.audio_only()
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes(16000))
    yield "wav", file.getvalue()
    for container, codec in (("mp3", "libmp3lame"), ("flac", "flac"), ("ogg", "libopus"), ("adts", "aac")):
        file = io.BytesIO()
        with av.open(file, "w", format=container) as out:
            stream = out.add_stream(codec, rate=48000)
            for start in range(0, 48000, 960):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="flt", layout="mono")
                frame.sample_rate, frame.pts = 48000, start
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        yield container, file.getvalue()


def _archives() -> Iterator[tuple[str, bytes]]:
    clip = clips.video(3)
    yield "a gzipped clip", gzip.compress(clip)
    yield "a pickle", pickle.dumps({"clip": clip})
    for name, pack in (("a zipped clip", _zipped), ("a clip in a tar", _in_a_tar)):
        yield name, pack(clip)


def _zipped(body: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("clip.mp4", body)
    return file.getvalue()


def _in_a_tar(body: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("clip.mp4")
        entry.size = len(body)
        archive.addfile(entry, io.BytesIO(body))
    return file.getvalue()
