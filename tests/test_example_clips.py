"""The clips of others in `examples/real`: their licence stands beside them, and a server can caption them."""

from __future__ import annotations

import av
import numpy as np
import pytest

from etenet.video.clip import FRAMES_PER_CLIP
from etenet.video.sampling import sample_frames
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "examples" / "real"
CLIPS = sorted(path.name for path in FOLDER.glob("*.mp4"))


def test_each_clip_has_its_author_licence_and_source_beside_it() -> None:
    rows = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| `")]
    cells = {row.split("`")[1]: [cell.strip() for cell in row.strip("| ").split("|")] for row in rows}
    assert sorted(cells) == CLIPS != []
    for shows, author, licence, source in (of_clip[1:] for of_clip in cells.values()):
        assert shows
        assert author
        assert (
            "creativecommons.org/licenses/" in licence
            or (FOLDER / licence.partition("](")[2].partition(")")[0]).is_file()
        )
        assert source


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_small_tells_no_place_and_moves(name: str) -> None:
    body = (FOLDER / name).read_bytes()
    assert len(body) <= 1_000_000
    with av.open(str(FOLDER / name)) as container:
        assert not [key for key in container.metadata if "location" in key or "time" in key]
    clip = sample_frames(body, resize_px=64)
    assert (clip.info.codec, clip.info.distinct_frames) == ("h264", FRAMES_PER_CLIP)
    assert np.abs(clip.frames[0].astype(int) - clip.frames[-1]).mean() > 1
