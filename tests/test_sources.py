"""Data sets are read completely and split as published, and mistakes in them are named."""

from __future__ import annotations

import csv
import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from unicodedata import normalize

import pytest

from etenet.errors import UsageError
from training.data import sources
from training.data.caption_files import Described, read_captions
from training.data.sources import ClipFolder
from training.data.splits import Shares, splits_of
from training.data.still_frames import Stills
from training.data.wording import Wording, clean_caption, vocabulary_of

SHARES = Shares(validation=0.1, test=0.1, seed=0)
SPLIT_ORDER = ("train", "validation", "test")


def written(path: Path, contents: str | bytes) -> Path:
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return path


def msvd_csv(path: Path, captions: Mapping[str, Sequence[str]], extra: Iterable[Sequence[str]] = ()) -> Path:
    """`MSR Video Description Corpus.csv` as Microsoft wrote it, out of captions by `<VideoID>_<Start>_<End>`."""
    columns = ("VideoID", "Start", "End", "WorkerID", "Source", "AnnotationTime", "Language", "Description")
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        for name, of_clip in captions.items():
            for caption in of_clip:
                rows.writerow([*name.rsplit("_", 2), "882", "clean", "55", "English", caption])
        for name, language, caption in extra:
            rows.writerow([*name.rsplit("_", 2), "7", "unverified", "55", language, caption])
    return path


def wordings(clips: Iterable[tuple[str, Sequence[str]]]) -> list[tuple[str, Wording]]:
    return [(split, Wording.of(captions)) for split, captions in clips]


def sizes(clips: Sequence[tuple[str, Wording]]) -> tuple[list[int], tuple[int, int]]:
    """Captions by split, and words of the training split and of all."""
    captions = Counter(split for split, wording in clips for _ in wording.captions)
    known = tuple(len(vocabulary_of(clips, splits=splits).known_words) for splits in ("train", "all"))
    return [captions[split] for split in SPLIT_ORDER], (known[0], known[1])


def words_between_spaces(clips: Sequence[tuple[str, Wording]], *splits: str) -> int:
    return len({word for split, w in clips if split in splits for caption in w.captions for word in caption.split()})


@pytest.mark.long
def test_msvd_sentences_are_as_many_as_published(reference_data: Path) -> None:
    described = sources.msvd_sentences(sorted((reference_data / "msvd").glob("*_lc_nopunc.txt")))
    clips = wordings((sources.msvd_split(number), captions) for number, captions in described.items())
    assert Counter(split for split, _ in clips) == {"train": 1200, "validation": 100, "test": 670}
    assert sizes(clips) == ([48_774, 4_290, 27_763], (9_462, 12_592))
    assert words_between_spaces(clips, "train") == 9_462
    assert words_between_spaces(clips, *SPLIT_ORDER) == 12_592


def test_the_msvd_corpus_comes_back_out_of_its_csv_in_the_published_splits(
    reference_data: Path, tmp_path: Path
) -> None:
    raw: dict[str, list[str]] = json.loads((reference_data / "msvd" / "captions_by_clip.json").read_text())
    others = [(name, "Tamil", "ஒரு மனிதன்") for name in list(raw)[:50]]
    others += [(name, "English", blank) for name, blank in zip(raw, ("", " ", "\r\n"), strict=False)]
    others += [("zzzzzzzzzzz_1_2", "German", "ein Hund"), ("zzzzzzzzzzz_3_4", "English", "")]
    corpus = msvd_csv(tmp_path / "corpus.csv", raw, others)
    published = dict(
        line.split() for line in (reference_data / "msvd" / "youtube_mapping.txt").read_text().splitlines()
    )
    clips = sources.msvd(reference_data / "msvd" / "clips", corpus=corpus)
    assert len(clips) == 1970
    for clip in clips:
        assert clip.split == sources.msvd_split(int(published[clip.video].removeprefix("vid")))
        assert [caption for caption in clip.captions if caption.strip()] == raw[clip.video]
    assert {clip.file.stem for clip in clips if clip.file} == {
        path.stem for path in (reference_data / "msvd" / "clips").iterdir()
    }
    assert all(clip.file.stem in (clip.video, published[clip.video]) for clip in clips if clip.file)
    cleaned = wordings((clip.split, clip.captions) for clip in clips)
    assert sum(wording.dropped for _, wording in cleaned) == 3
    assert sizes(cleaned) == ([48_780, 4_291, 27_768], (9_796, 13_103))


@pytest.mark.long
def test_msrvtt_is_as_large_as_published(reference_data: Path) -> None:
    described = sources.msrvtt_videos(sorted((reference_data / "msrvtt").glob("*.zip")))
    assert Counter(video.split for video in described.values()) == {"train": 6_513, "validation": 497, "test": 2_990}
    assert list(described) == [f"video{number}" for number in range(10_000)]
    clips = wordings((video.split or "", video.captions) for video in described.values())
    assert sizes(clips) == ([130_260, 9_940, 59_800], (23_518, 29_100))
    assert words_between_spaces(clips, "train") == 23_666
    assert words_between_spaces(clips, *SPLIT_ORDER) == 29_322


def test_a_corpus_of_more_clips_than_are_distributed_is_numbered_by_the_clips_that_are_there(tmp_path: Path) -> None:
    names = [f"clip{number:04}_1_2" for number in range(2089)]
    corpus = msvd_csv(tmp_path / "corpus.csv", {name: ["a dog runs"] for name in names})
    (tmp_path / "clips").mkdir()
    for name in names[119:]:
        (tmp_path / "clips" / f"{name}.avi").touch()
    clips = sources.msvd(tmp_path / "clips", corpus=corpus)
    assert [clip.video for clip in clips] == names[119:]
    assert Counter(clip.split for clip in clips) == {"train": 1200, "validation": 100, "test": 670}


def test_sentences_find_clips_called_by_their_names_when_all_are_there(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    names = sorted(f"{chr(65 + number % 26)}{number}_{number}_9" for number in range(1970))
    for name in names:
        (tmp_path / "clips" / f"{name}.avi").touch()
    sentences = written(tmp_path / "sentences.txt", "vid1\ta dog\r\nvid1970\ta cat\r\n")
    assert [clip.file and clip.file.stem for clip in sources.msvd(tmp_path / "clips", sentences=[sentences])] == [
        names[0],
        names[-1],
    ]


def test_msrvtt_zips_and_their_json_files_say_the_same(tmp_path: Path) -> None:
    annotation = {
        "videos": [{"video_id": f"video{n}", "split": s} for n, s in ((10, "test"), (9, "validate"), (2, "train"))],
        "sentences": [{"video_id": f"video{n}", "caption": c, "sen_id": 0} for n, c in ((9, "a"), (2, "b"), (9, "c"))],
    }
    plain = written(tmp_path / "train_val_videodatainfo.json", json.dumps(annotation))
    with zipfile.ZipFile(tmp_path / "annotation.zip", "w") as archive:
        archive.write(plain, plain.name)
        archive.writestr("category.txt", "music\t0")
        archive.writestr(f"__MACOSX/._{plain.name}", b"\x00\x05")
    described = sources.msrvtt_videos([plain])
    assert described == sources.msrvtt_videos([tmp_path / "annotation.zip"])
    assert described == {
        "video2": Described(["b"], "train"),
        "video9": Described(["a", "c"], "validation"),
        "video10": Described([], "test"),
    }
    with pytest.raises(UsageError, match="video10 is there twice; give"):
        sources.msrvtt_videos([plain, tmp_path / "annotation.zip"])


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("f.json", '{"a.mp4": ["a dog runs", "it runs"], "b": "ein süßer Hund"}'),
        (
            "f.jsonl",
            '{"video": "a.mp4", "captions": ["a dog runs"]}\r\n\r\n{"video": "b", "caption": "ein süßer Hund"}\r\n'
            '{"video": "a.mp4", "caption": "it runs"}',
        ),
        ("f.csv", 'caption,video,more\r\na dog runs,a.mp4,x\r\nit runs,a.mp4,\r\n"ein süßer Hund",b,\r\n'),
    ],
)
def test_the_three_caption_formats_give_the_same(tmp_path: Path, name: str, contents: str, bom: bytes) -> None:
    described = read_captions(written(tmp_path / name, bom + contents.encode()))
    assert described == {"a.mp4": Described(["a dog runs", "it runs"]), "b": Described(["ein süßer Hund"])}


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("f.json", '{"a": ["b"],\n "c" ["d"]}', r"f.json, line 2, column 6: this is not JSON"),
        ("f.json", '{"a": "b"}\n{"c": "d"}', r"line 1: no video among a; each row needs video"),
        ("f.json", '{"a": ["b"], "c": "d", "a": ["e"]}', "line 1: 'a' is twice in one object; keep one of them"),
        ("f.json", '["a"]', 'entry 1: expected an object, got "a"'),
        ("f.json", '{"a": 3}', "the captions of a must be a sentence or a list of sentences"),
        ("f.json", "{}", "has no clip"),
        ("f.jsonl", '{"video": "a", "caption": "b"}\n{"video": "a", "caption"', r"f.jsonl, line 2, column 2\d"),
        ("f.jsonl", '\n{"caption": "b"}', "line 2: no video among caption"),
        ("f.jsonl", '{"video": 3, "caption": "b"}', "line 1: no clip is named; give its file"),
        ("f.jsonl", '{"video": "a"}', "line 1: no caption among video"),
        ("f.jsonl", '{"video": "a", "caption": "b", "split": "dev"}', "line 1: the split of a is 'dev'"),
        ("f.jsonl", '{"video": "a", "caption": "b", "row": -1}', "line 1: the row of a is -1"),
        (
            "f.jsonl",
            '{"video": "a", "caption": "b", "split": "train"}\n{"video": "a", "caption": "c", "split": "test"}',
            "line 2: a had another split, group or row further up; make them the same",
        ),
        ("f.csv", "video,caption\na,b\nc,a man, a dog\n", "f.csv, line 3: a ',' cuts a cell .* put quotes around"),
        ("f.csv", "video,caption,more\na,b,c\nc,a man, a dog\n", "f.csv, line 3: a ',' cuts a cell .* put quotes"),
        ("f.csv", "clip,caption\na,b\n", "f.csv, line 2: no video among clip, caption"),
        ("f.csv", "video,caption\na,b\nc\n", "line 3: no caption"),
        (
            "f.csv",
            "video,captions\na,b\nc,\"['a dog', 'it runs']\"\n",
            "line 3: c has a list of captions in one cell; give",
        ),
        ("f.csv", 'video,caption\na,"[""a dog""]"\n', "line 2: a has a list of captions in one cell; give"),
        ("f.csv", "video,caption,row\na,b,first\n", "line 2: the row of a is 'first'"),
        ("f.csv", b"video,caption\na,b\nc,caf\xe9\n", "line 3: this is not UTF-8; save it as UTF-8"),
        ("f.txt", "a b", "line 1: neither JSON nor CSV with a column video or caption; give {"),
    ],
)
def test_a_mistake_in_a_captions_file_is_named_with_its_place(
    tmp_path: Path, name: str, contents: str | bytes, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read_captions(written(tmp_path / name, contents))


def test_mistakes_in_distributed_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "vid1.avi").touch()
    for name, contents, message in (
        ("a.txt", "vid1\ta dog\nvid1971\ta cat\n", "a.txt, line 2: it must be vidN, a tab and a caption"),
        ("b.txt", "vid1 a dog\n", "b.txt, line 1"),
        ("c.txt", "\n", "has no clip"),
    ):
        with pytest.raises(UsageError, match=message):
            sources.msvd(tmp_path / "clips", sentences=[written(tmp_path / name, contents)])
    with pytest.raises(UsageError, match="given twice"):
        sources.msvd(tmp_path / "clips", sentences=[tmp_path / "a.txt", tmp_path / "a.txt"])
    few = msvd_csv(tmp_path / "few.csv", {"abc_1_2": ["a dog"]})
    with pytest.raises(UsageError, match=r"have 1 clips .* the order of all 1970 decides the splits"):
        sources.msvd(tmp_path / "clips", corpus=few)
    other = written(tmp_path / "other.csv", "VideoID,Start,End,Description\na,1,2,a dog\n")
    with pytest.raises(UsageError, match="line 2: no Language among VideoID, Start, End, Description"):
        sources.msvd(tmp_path / "clips", corpus=other)
    other = written(tmp_path / "other.csv", "a dog\n")
    with pytest.raises(UsageError, match="line 1: neither JSON nor CSV with a column VideoID or Start"):
        sources.msvd(tmp_path / "clips", corpus=other)
    for name, contents, message in (
        ("a.json", '{"videos": []}', "no MSR-VTT annotation .'sentences'"),
        ("b.json", '{"videos": [], "sentences": [{"video_id": "video1", "caption": "a"}]}', "'video1'"),
        ("c.json", '{"videos": [{"video_id": "video1", "split": "dev"}], "sentences": []}', "'dev'"),
        ("d.zip", "no zip", "give the zip as it is distributed"),
    ):
        with pytest.raises(UsageError, match=message):
            sources.msrvtt(tmp_path / "clips", [written(tmp_path / name, contents)])


def test_clips_are_found_by_path_by_name_and_without_extension(tmp_path: Path) -> None:
    for name in ("a.mp4", "deep/b.webm", "deep/._b.webm", "one/c.mp4", "two/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = ClipFolder(tmp_path)
    assert folder.find("a") == folder.find("a.mp4") == tmp_path / "a.mp4"
    assert folder.find("b") == folder.find("b.webm") == folder.find("deep/b.webm") == tmp_path / "deep" / "b.webm"
    assert folder.find("two/c.mp4") == tmp_path / "two" / "c.mp4"
    assert folder.find("missing") is None
    assert folder.find("deep/b.webm ") == folder.find(" b") == tmp_path / "deep" / "b.webm"
    with pytest.raises(UsageError, match=r"c may be .*one/c.mp4 and .*two/c.mp4"):
        folder.find("c")
    with pytest.raises(UsageError, match="not a folder; name the one that holds the clips with --clips"):
        ClipFolder(tmp_path / "nowhere")


def test_names_that_look_the_same_are_the_same(tmp_path: Path) -> None:
    """macOS, and what copies from there, stores the dots of an umlaut as a character of their own."""
    composed, apart = (normalize(form, "Käse") for form in ("NFC", "NFD"))
    assert composed != apart
    for stored, typed in ((apart, composed), (composed, apart)):
        folder = tmp_path / f"has {stored}"
        for name in (f"{stored}.mp4", f"deep/{stored}-2.mp4", f"{stored}/1.png"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        clips = ClipFolder(folder)
        assert clips.find(typed) == clips.find(f"{typed}.mp4") == folder / f"{stored}.mp4"
        assert clips.find(f"deep/{typed}-2.mp4") == folder / "deep" / f"{stored}-2.mp4"
        assert [picture.place for picture in Stills([folder]).find(typed)] == [folder / stored / "1.png"]
    (folder / f"{typed}.mp4").touch()
    assert ClipFolder(folder).find(f"{typed}.mp4") == folder / f"{typed}.mp4"


def test_clips_and_pictures_are_found_in_linked_folders_of_which_some_are_loops(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "clips"
    folder.mkdir()
    for name in ("a.mp4", "dog/1.png"):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).touch()
    (folder / "film").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(folder)
    assert ClipFolder(folder).find("a") == folder / "film" / "a.mp4"
    assert [picture.name for picture in Stills([folder]).find("dog")] == ["film/dog/1.png"]


@pytest.mark.parametrize("folder", ["", "deep/"])
@pytest.mark.parametrize("beside", ["f.srt", "f.VTT", "other/f.srt", "f.mkv.srt", "f.jpg", "f.info.json", "f"])
def test_files_that_are_no_videos_may_lie_beside_one(tmp_path: Path, folder: str, beside: str) -> None:
    video = tmp_path / folder / "f.MKV"
    for path in (video, tmp_path / folder / beside.replace("mkv", "MKV")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert ClipFolder(tmp_path).find("f.MKV") == video
    assert beside == "f" or ClipFolder(tmp_path).find("f") == video
    video.with_suffix(".avi").touch()
    assert ClipFolder(tmp_path).find("f.MKV") == video
    if beside != "f":
        with pytest.raises(UsageError, match=r"f may be .*f\.MKV and .*f\.avi; keep one"):
            ClipFolder(tmp_path).find("f")


def test_one_clip_under_two_names_is_refused_for_it_could_be_in_two_splits(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    captions = written(tmp_path / "f.json", json.dumps({"a": "b", "a.mp4": "c", "d": "e", "f": "g"}))
    with pytest.raises(UsageError, match=r"a and a\.mp4 are the same clip"):
        sources.folder(tmp_path, captions, SHARES)
    captions = written(tmp_path / "g.json", json.dumps({"x": "b", "y": "c", "z": "d"}))
    with pytest.raises(UsageError, match=r"none of the 3 clips is below .* \(x, ...\); correct --clips, or"):
        sources.folder(tmp_path, captions, SHARES)


def test_shares_are_a_function_of_seed_and_names(tmp_path: Path) -> None:
    described = {f"clip{number}": Described(["a"]) for number in range(50)}
    first = splits_of(described, tmp_path, SHARES)
    assert Counter(first.values()) == {"train": 40, "validation": 5, "test": 5}
    assert splits_of(dict(reversed(described.items())), tmp_path, SHARES) == first
    assert splits_of(described, tmp_path, Shares(validation=0.1, test=0.1, seed=1)) != first
    few = dict(list(described.items())[:3])
    assert Counter(splits_of(few, tmp_path, SHARES).values()) == {"train": 1, "validation": 1, "test": 1}
    assert set(splits_of(few, tmp_path, Shares(validation=0, test=0, seed=0)).values()) == {"train"}
    with pytest.raises(UsageError, match="of 2 clips none is left to train on"):
        splits_of(dict(list(described.items())[:2]), tmp_path, SHARES)
    described["clip7"].split = "test"
    with pytest.raises(UsageError, match="clip0 has no split, but others have"):
        splits_of(described, tmp_path, SHARES)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A man\r\n is \t singing.\r\n", "A man is singing."),
        ("\ufeffa dog\ufeff", "a dog"),
        ("so cute while it's\ufeffeating", "so cute while it's eating"),
        ("a\u00a0man  sings ", "a man sings"),
        ("\ufeff\r\n", ""),
        ("a dog runs\ud83d", "a dog runs"),
        ("a dog \U0001f415", "a dog \U0001f415"),
    ],
)
def test_captions_are_cleaned(raw: str, clean: str) -> None:
    assert clean_caption(raw) == clean


def test_captions_without_a_word_are_dropped_and_counted() -> None:
    wording = Wording.of(["A dog, runs.", "", "...", "\ufeff", "a dog"])
    assert wording.captions == ("A dog, runs.", "a dog")
    assert wording.lengths == (3, 2)
    assert wording.dropped == 3
    assert wording.word_counts == {"a": 2, "dog": 2, "runs": 1}
