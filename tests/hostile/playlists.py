"""Files that ask their reader to open another file, an address or a socket."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.hostile.boxes import box
from tests.hostile.damage import containers
from tests.hostile.file import HostileFile


@dataclass(frozen=True, slots=True)
class Trap:
    """A video that no decoder may read, and a local port that no decoder may connect to."""

    clip: Path
    port: int


def files(trap: Trap) -> Iterator[HostileFile]:
    clip, http = trap.clip, f"http://127.0.0.1:{trap.port}/clip"
    texts = {
        "ffconcat of a file": f"ffconcat version 1.0\nfile '{clip}'\n",
        "ffconcat with an option": f"ffconcat version 1.0\nfile '{clip}'\noption protocol_whitelist file\n",
        "ffconcat of an address": f"ffconcat version 1.0\nfile '{http}.mp4'\n",
        "ffconcat of a pipe": "ffconcat version 1.0\nfile 'pipe:0'\n",
        "ffconcat of itself": "ffconcat version 1.0\nfile 'subfile,,start,0,end,0,,:/proc/self/fd/3'\n",
        "hls of a file": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{clip}\n#EXT-X-ENDLIST\n",
        "hls of a bare file": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{clip}\n#EXT-X-ENDLIST\n",
        "hls of an address": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{http}.ts\n#EXT-X-ENDLIST\n",
        "hls with a key": f'#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="{http}"\n#EXTINF:10,\n{clip}\n#EXT-X-ENDLIST\n',
        "hls with a map": f'#EXTM3U\n#EXT-X-MAP:URI="{clip}"\n#EXTINF:10,\n{clip}\n#EXT-X-ENDLIST\n',
        "hls of concat": f"#EXTM3U\n#EXTINF:10,\nconcat:{clip}|{clip}\n#EXT-X-ENDLIST\n",
        "a master playlist": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{http}.m3u8\n",
        "sdp": (
            "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
            f"m=video {trap.port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
        ),
        "rtsp in a text": f"rtsp://127.0.0.1:{trap.port}/live\n",
        "an rtsp redirector": f"RTSPtext\nrtsp://127.0.0.1:{trap.port}/live\n",
        "asx": f'<asx version="3.0"><entry><ref href="{http}.asf"/></entry></asx>',
        "smil": f'<smil><body><video src="{http}.mp4"/></body></smil>',
        "ram": f"{http}.rm\n",
        "pls": f"[playlist]\nFile1={http}.mp4\nNumberOfEntries=1\n",
        "xspf": f"<playlist><trackList><track><location>file://{clip}</location></track></trackList></playlist>",
        "dash": (
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
            'mimeType="video/mp4"><Representation id="1" bandwidth="1">'
            f"<BaseURL>{http}.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>"
        ),
        "imf": f'<CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016"><Id>{clip}</Id></CompositionPlaylist>',
        "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{http}.png"/></svg>',
        "image sequence": f"{clip.parent}/%d.png",
    }
    for name, text in texts.items():
        yield HostileFile(name, "reject", text.encode())
        yield HostileFile(f"{name}, with a byte order mark", "reject", b"\xef\xbb\xbf" + text.encode())
    mp4 = containers()["mp4"]
    for name, target in (("a file", str(clip)), ("an address", http)):
        yield HostileFile(f"an mp4 with its data in {name}", "either", _with_external_data(mp4, target))
    for kind in ("mp4", "mkv"):
        yield HostileFile(
            f"a playlist after an {kind}", "either", containers()[kind] + texts["ffconcat of a file"].encode()
        )
    yield HostileFile("a playlist after a signature", "reject", mp4[:32] + texts["ffconcat of a file"].encode())


def _with_external_data(mp4: bytes, target: str) -> bytes:
    """The clip with a data reference (ISO/IEC 14496-12, 8.7.2) to `target` instead of to itself."""
    at = mp4.index(b"dref") - 4
    old = struct.unpack_from(">I", mp4, at)[0]
    new = box(b"dref", struct.pack(">II", 0, 1) + box(b"url ", bytes(4) + target.encode() + b"\0"))
    grown = bytearray(mp4[:at] + new + mp4[at + old :])
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        place = grown.index(kind) - 4
        struct.pack_into(">I", grown, place, struct.unpack_from(">I", grown, place)[0] + len(new) - old)
    return bytes(grown)
