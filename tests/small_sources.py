"""Tables of each data set as its publishers write them, small; a folder of each; reading one."""

import csv
import json
from pathlib import Path

from hypothesis import strategies as st

from data_prep.sources import SOURCES
from data_prep.track import KINDS, Rejection, Track

TRACKS = "TRACK_ID\tARTIST_ID\tALBUM_ID\tPATH\tDURATION\tTAGS"
VIDEO = "-0SdAVK79lg"


def write(path: Path, content: str | bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_csv(path: Path, *rows: tuple) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def read(name: str, root: Path, index: Path | None = None) -> tuple[dict[str, Track], dict[str, Rejection]]:
    """Tracks and rejections by id; ids are unique, kinds known and reasons part of a sentence."""
    found = list(SOURCES[name].tracks(root, index))
    tracks = {item.id: item for item in found if isinstance(item, Track)}
    rejections = {item.item: item for item in found if isinstance(item, Rejection)}
    assert len(tracks) + len(rejections) == len(found)
    for item in rejections.values():
        assert item.kind in KINDS and item.reason and not item.reason.endswith("."), item
    for item in tracks.values():
        assert (root / item.path).is_file()
        "".join((item.id, item.path, item.title, *item.captions)).encode()
    return tracks, rejections


LICENCES = """\
48/948.mp3
Stand by "me" by Ann by Bob from Jamendo: http://www.jamendo.com/track/948
Available under a Creative Commons Attribution-NonCommercial-ShareAlike license: http://creativecommons.org/licenses/by-nc-sa/3.0/

14/214.mp3
Intro chiante by David TMX from Jamendo: http://www.jamendo.com/track/214
Available under a Free Art license: http://artlibre.org/licence/lal/
--
15/215.mp3
Available under the moon by Eve from Jamendo: http://www.jamendo.com/track/215
Available under a Creative Commons Attribution license: http://creativecommons.org/licenses/by/2.0/fr/
16/216.mp3

17/217.mp3
A by B from Jamendo: http://www.jamendo.com/track/217
Available under a Creative Commons Attribution license: http://creativecommons.org/licenses/by/3.0/

17/217.mp3
A by B from Jamendo: http://www.jamendo.com/track/217
Available under a Creative Commons Attribution-NoDerivatives license: http://creativecommons.org/licenses/by-nd/3.0/
"""
TITLES = """\
TRACK_ID\tARTIST_ID\tALBUM_ID\tTRACK_NAME\tARTIST_NAME\tALBUM_NAME\tRELEASEDATE\tURL
track_0000948\tartist_000087\talbum_000149\tStand by "me"\tAnn by Bob\tAn "album\t2005-04-12\thttp://www.jamendo.com/track/948
track_0000214\tartist_000014\talbum_000031\tIntro chiante\t\tDavid TMX\tTrio\t2005-01-01\thttp://www.jamendo.com/track/214
"""
ROWS = [
    "track_0000948\tartist_000087\talbum_000149\t48/948.mp3\t212.7\tgenre---rock\tmood/theme---happy\tinstrument---guitar",
    "track_0000214\tartist_000014\talbum_000031\t14/214.mp3\t124.6\tgenre---punkrock",
    "track_0000215\tartist_000014\talbum_000031\t15/215.mp3\t124.6",
    "track_0000216\tartist_000014\talbum_000031\t16/216.mp3\t124.6\tgenre---metal",
    "track_0000217\tartist_000014\talbum_000031\t17/217.mp3\t124.6\tgenre---metal",
    "track_0000218\tartist_000014\talbum_000031\t18/218.mp3\t124.6\tgenre---metal",
    "track_0000219\tartist_000014\talbum_000031\t../../etc/passwd\t124.6\tgenre---metal",
    "a broken line",
]


def write_jamendo(root: Path) -> Path:
    write(root / "data" / "raw_30s_cleantags.tsv", "\r\n".join([TRACKS, *ROWS, ""]))
    write(root / "data" / "raw.meta.tsv", TITLES)
    write(root / "audio_licenses.txt", LICENCES)
    for name in ("48/948.mp3", "14/214.low.mp3", "15/215.mp3", "16/216.mp3", "17/217.mp3"):
        write(root / "audio" / name)
    return root


FMA_COLUMNS = (("", ""), ("album", "title"), ("artist", "id"), ("artist", "name"), ("set", "split"), ("set", "subset"),
               ("track", "genre_top"), ("track", "genres_all"), ("track", "license"), ("track", "tags"),
               ("track", "title"))  # fmt: skip
CAPS = ("ytid", "start_s", "end_s", "audioset_positive_labels", "aspect_list", "caption", "author_id",
        "is_balanced_subset", "is_audioset_eval")  # fmt: skip


def caps_row(video, start=30, aspects="['low quality', 'slow tempo']", caption='A "sad" song,\nslow.', part=False):
    return (video, start, start + 10, "/m/0140xf", aspects, caption, 4, False, part)


NAMES = [f"[{VIDEO}]-[30-40].wav", f"{VIDEO}.wav", f"{VIDEO}_30.mp3", f"{VIDEO}-30.wav", f"{VIDEO}_30_40.wav",
         f"{VIDEO}_30-40.flac", f"{VIDEO}_30000_40000.wav", f"Y{VIDEO}.wav", f"Y{VIDEO}_30.000_40.000.wav"]  # fmt: skip
BENCH = {"dataset": "MusicBench", "location": f"data_aug2/{VIDEO}_1.wav", "main_caption": "A song in G minor.",
         "alt_caption": "A song.", "prompt_key": "The key is G minor.", "beats": [[0.1], [1.0]], "bpm": 120.0,
         "key": ["G", "minor"], "keyprob": [0.9], "is_audioset_eval_mcaps": False}  # fmt: skip
SDD = ("caption_id", "track_id", "caption", "is_valid_subset", "familiarity", "artist_id", "album_id", "path",
       "duration")  # fmt: skip


def write_describer(root: Path) -> Path:
    write_csv(
        root / "song_describer.csv", SDD,
        (1, 948, "A rock song, loud.", True, 2, 87, 149, "48/948.mp3", 212.7),
        (2, 214, "Not checked.", "", 1, 14, 31, "14/214.mp3", 100.0),
        (3, 948, "Wrong.", False, 2, 87, 149, "48/948.mp3", 212.7),
        (4, 948, "Guitars.", True, 0, 87, 149, "48/948.mp3", 212.7),
        (5, 215, "Gone.", True, 0, 14.0, 149, "15/215.mp3", 212.7),
        (6, "x", "Whose?", True, 0, 14, 149, "15/215.mp3", 212.7),
    )  # fmt: skip
    write(root / "audio_licenses.txt", LICENCES.replace("\n\n", "\n--\n"))
    write(root / "audio" / "48" / "948.2min.mp3")
    write(root / "audio" / "14" / "214.2min.mp3")
    return root


COLUMNS = ("path", "caption", "licence", "title", "author", "source_url")
FMA_TABLE = (*zip(*FMA_COLUMNS, strict=True), ("2", "", "1", "A", "", "small", "", "[21]", "x", "", "t"))
HEADS = {
    "jamendo": ("data/raw_30s_cleantags.tsv", f"{TRACKS}\r\n{ROWS[0]}\r\n"),
    "jamendo licences": ("audio_licenses.txt", LICENCES),
    "jamendo titles": ("data/raw.meta.tsv", TITLES),
    "fma": ("fma_metadata/tracks.csv", "".join(",".join(row) + "\n" for row in FMA_TABLE)),
    "fma licences": ("fma_metadata/raw_tracks.csv", "track_id,license_title,license_url\n2,a,b\n"),
    "fma genres": ("fma_metadata/genres.csv", "genre_id,title\n21,Rock\n"),
    "musiccaps": ("musiccaps-public.csv", ",".join(CAPS) + f"\n{VIDEO},30,40,,['a'],x,,,\n"),
    "musicbench": ("MusicBench_train.json", json.dumps(BENCH) + "\n"),
    "song-describer": ("song_describer.csv", ",".join(SDD) + "\n1,948,A,True,2,87,149,48/948.mp3,2\n"),
    "jamendomaxcaps": ("2008-01-01.jsonl", '{"id": "948", "license_ccurl": "x"}\n'),
    "jamendomaxcaps captions": ("final_caption30sec.jsonl", '{"id": "948", "caption": "x"}\n'),
    "folder": ("captions.csv", "path,caption,tags\na.wav,x,['a']\n"),
    "folder lines": ("captions.jsonl", '{"path": "a.wav", "caption": ["x"]}\n'),
    "folder json": ("a.json", '{"caption": ["x"]}'),
    "folder text": ("a.txt", "x\n"),
}
NOISE = st.binary(max_size=200) | st.lists(
    st.sampled_from([b",", b"\t", b'"', b"\n", b"\r", b"\0", b"[", b"{", b"}", b"]", b":", b"\xff", b"'", b"948",
                     b"../", b"a.wav", b"track_", b"\xef\xbb\xbf", b"by", b"\\ud800", b"-" * 50, b"(" * 50]),
    max_size=40,
).map(b"".join)  # fmt: skip
