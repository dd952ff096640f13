"""Emoji of a font: which pictures, which captions, and which font."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from emoji_font import PICTURED, bitmap, emoji_font
from fontTools.ttLib import TTFont

from memfree.cli.entry import run
from memfree.commands.prepare import prepare
from memfree.data import DatasetFolder, PartSizes, emoji
from memfree.data.emoji import FAMILIES, Emoji, family_of
from memfree.data.prompts import prompt_set
from memfree.data.skipped import Skipped

RUNNER = "emoji-1f3c3"


@pytest.fixture(scope="module")
def font(tmp_path_factory):
    return emoji_font(tmp_path_factory.mktemp("font") / "tiny.ttf")


def expected(name):
    """(3, 20, 20): by hand, two rows of white above and below; the transparent half is white."""
    pixels = np.asarray(bitmap(PICTURED.index(name)))
    square = np.full((20, 20, 3), 255, np.uint8)
    square[2:18, 10:] = pixels[:, 10:, :3]
    return square.transpose(2, 0, 1)


def test_pictures_and_names(font):
    source = Emoji(font)
    found = {image.name: image for image in source.images(None)}
    assert {name: image.caption for name, image in found.items()} == {
        "emoji-2640": "female sign",
        RUNNER: "runner",
        "emoji-1f600": "grinning face",
    }
    assert source.size == (3, font.stat().st_size)
    assert all(image.label is None and image.group is None for image in found.values())
    for name, glyph in ((RUNNER, "runner"), ("emoji-1f600", "grin")):
        assert (found[name].pixels == expected(glyph)).all()  # of the larger strike
    assert source.licence == "OFL-1.1 (SIL Open Font License); font Tiny, Version 1"


def test_variants_are_in_the_group_of_their_emoji(font):
    images = list(Emoji(font, variants=True).images(None))
    runners = {image.name: image for image in images if image.group == RUNNER}
    assert {name: image.caption for name, image in runners.items()} == {
        RUNNER: "runner",
        f"{RUNNER}-1f3ff": "runner, dark skin tone",
        f"{RUNNER}-2640": "runner, female",
        f"{RUNNER}-1f3ff-2640": "runner, dark skin tone, female",
    }
    pixels = runners[f"{RUNNER}-1f3ff-2640"].pixels
    assert (pixels == expected("runner_dark_female")).all()
    assert Counter(image.group for image in images) == {
        RUNNER: 4,
        "emoji-2640": 1,
        "emoji-1f600": 1,
    }


def test_variants_stay_in_one_part(font, tmp_path):
    parts = PartSizes(train=5, calibration=1, test=0, fit=0)
    options = {"source": "emoji", "path": str(font), "parts": parts, "near_distance": 0}
    prepare(tmp_path / "out", **options, image_size=8, emoji_variants=True)
    folder = DatasetFolder(tmp_path / "out")
    assert folder.image_shape == (3, 8, 8)
    assert folder.manifest["source"]["licence"].startswith("OFL-1.1")
    train = folder.part("train")
    assert train.groups.count(RUNNER) == 4
    assert "runner, female" in train.captions
    prepare(tmp_path / "out", **options, image_size=8, emoji_variants=True)  # already there
    with pytest.raises(ValueError, match="--overwrite"):
        prepare(tmp_path / "out", **options, image_size=8)


def test_without_an_image_size_they_are_as_large_as_in_the_font(font, tmp_path):
    prepare(tmp_path / "out", "emoji", str(font), parts=PartSizes(3, 0, 0, 0))
    assert DatasetFolder(tmp_path / "out").image_shape == (3, 20, 20)


def test_another_font_is_another_dataset(font, tmp_path):
    path = tmp_path / "font.ttf"
    path.write_bytes(font.read_bytes())
    options = {"source": "emoji", "path": str(path), "parts": PartSizes(3, 0, 0, 0)}
    prepare(tmp_path / "out", **options)
    prepare(tmp_path / "out", **options)
    emoji_font(path, sizes=(16,))
    with pytest.raises(ValueError, match=r"--path .*font.ttf changed after"):
        prepare(tmp_path / "out", **options)


def test_broken_bitmap_stops_or_is_counted(tmp_path):
    font = emoji_font(tmp_path / "broken.ttf", broken="grin")
    with pytest.raises(ValueError, match="emoji-1f600: not a PNG"):
        list(Emoji(font).images(None))
    skipped = Skipped()
    assert len(list(Emoji(font).images(skipped))) == 2
    assert skipped.records == 1


def test_fonts_that_cannot_be_used(font, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--path: no font at .*apt install fonts-noto"):
        Emoji(tmp_path / "missing.ttf")
    plain = emoji_font(tmp_path / "plain.ttf", colour=False)
    with pytest.raises(ValueError, match=r"plain.ttf: this font has no colour bitmaps .*--path"):
        Emoji(plain)
    (tmp_path / "text.ttf").write_text("this is text, and no font at all")
    with pytest.raises(ValueError, match=r"text.ttf: not a font that can be read"):
        Emoji(tmp_path / "text.ttf")
    content = font.read_bytes()
    for length in range(20, len(content), len(content) // 40):
        (tmp_path / "cut.ttf").write_bytes(content[:length])
        try:
            list(Emoji(tmp_path / "cut.ttf", variants=True).images(None))
        except ValueError as error:
            assert "\n" not in str(error)
    other = TTFont(font)
    for table in other["cmap"].tables:
        table.cmap.clear()
        table.cmap[0x33] = "three"
    other.save(tmp_path / "digit.ttf")
    with pytest.raises(ValueError, match="none of its colour bitmaps is an emoji with a name"):
        Emoji(tmp_path / "digit.ttf")


def test_installed_font_is_found(font, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "_FOLDERS", (str(tmp_path / "none"), str(tmp_path / "fonts")))
    message = r"--source emoji: no NotoColorEmoji.ttf in .*apt install fonts-noto-color-emoji"
    with pytest.raises(FileNotFoundError, match=message):
        Emoji()
    place = tmp_path / "fonts" / "truetype" / "noto" / "NotoColorEmoji.ttf"
    place.parent.mkdir(parents=True)
    place.write_bytes(font.read_bytes())
    assert Emoji().font == place


def test_missing_font_is_one_line_of_the_command(tmp_path, capsys):
    arguments = ["--source", "emoji", "--path", str(tmp_path / "x.ttf"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        run(prepare, arguments)
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and "apt install fonts-noto-color-emoji" in error


def test_option_of_other_sources(tmp_path):
    with pytest.raises(ValueError, match="--emoji_variants has no meaning with --source digits"):
        prepare(tmp_path / "out", emoji_variants=True)


@pytest.fixture(scope="module")
def noto():
    try:
        return Emoji()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_noto_color_emoji(noto):
    if noto.size[0] < 1300:
        pytest.skip(f"{noto.font} has only {noto.size[0]} emoji with names")
    images = {image.name: image for image in noto.images(None)}
    assert (
        len(images)
        == noto.size[0]
        == sum(noto.default_sizes)
        == len({image.caption for image in images.values()})
    )
    assert noto.default_sizes[:3] == (500, 500, 250)
    assert images["emoji-1f600"].caption == "grinning face"
    assert not {"emoji-31", "emoji-23", "emoji-1f1e6", "emoji-1f3fb"} & images.keys()
    shapes = {image.pixels.shape for image in images.values()}
    assert len(shapes) == 1 and all(side[1] == side[2] for side in shapes)
    corners = np.stack([image.pixels[:, 0, 0] for image in images.values()])
    assert (corners == 255).all(axis=1).mean() > 0.99


def test_pictures_of_one_design_stay_in_one_part(noto, tmp_path):
    prepare(tmp_path / "out", "emoji", str(noto.font), image_size=8)
    folder = DatasetFolder(tmp_path / "out")
    parts: dict[str, Counter] = {}
    for part in ("train", "calibration", "test", "fit"):
        for caption in set(folder.part(part).captions):
            parts.setdefault(family_of(caption) or "", Counter())[part] += 1
    assert len(parts.pop("")) == 4
    assert set(parts) == set(FAMILIES)
    assert all(len(counter) == 1 for counter in parts.values())
    assert parts["clock face"].total() == 25
    rows = folder.part("train").groups + folder.part("test").groups
    assert max(Counter(rows).values()) < 10  # a family is not a group of copies


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("clock face one-thirty", "clock face"),
        ("squared cjk unified ideograph-7121", "framed word"),
        ("black rightwards arrow", "arrow button"),
        ("heart with arrow", None),
        ("bow and arrow", None),
        ("alarm clock", None),
        ("grinning face", None),
    ],
)
def test_family_by_name(name, family):
    assert family_of(name) == family


def test_command_of_the_documentation(noto, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "howto.md").read_text()
    (line,) = re.findall(r"^    memfree prepare (--source emoji .*)$", text, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    run(prepare, line.split())
    folder = DatasetFolder(tmp_path / "data" / "emoji")
    assert folder.image_shape == (3, 32, 32) and folder.manifest["repeated_images"] == 10
    assert folder.manifest["parts"]["train"]["records"] == 490 + 10 * 100
    grouping = folder.manifest["grouping"]
    assert grouping["largest_group"] <= 4 and grouping["left_out"] == 0
    assert 10 <= len(prompt_set(folder, "duplicated")) < 50  # with near duplicates of the font
    assert len(prompt_set(folder, "duplicated", least_records=100)) == 10
    assert len(prompt_set(folder, "unseen")) == 250
