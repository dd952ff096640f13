"""A tiny font with colour bitmaps for the tests of the emoji source."""

import io
from pathlib import Path

import numpy as np
from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables._g_l_y_f import Glyph
from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
from fontTools.ttLib.tables.C_B_D_T_ import cbdt_bitmap_format_17
from fontTools.ttLib.tables.E_B_L_C_ import SbitLineMetrics, Strike, eblc_index_sub_table_1
from PIL import Image

CODES = {
    "three": 0x33,
    "keycap": 0x20E3,
    "female": 0x2640,
    "letter": 0x1F1E6,
    "runner": 0x1F3C3,
    "dark": 0x1F3FF,
    "grin": 0x1F600,
    "private": 0xFE82C,
    "joiner": 0x200D,
    "heart": 0x2764,
}
LIGATURES = ["runner_dark", "runner_female", "runner_dark_female", "runner_heart", "three_keycap"]
FEATURES = """feature ccmp {
    sub runner dark joiner female by runner_dark_female;
    sub female joiner runner dark by runner_dark_female;
    sub runner joiner female by runner_female;
    sub runner joiner heart by runner_heart;
    sub runner dark by runner_dark;
    sub three keycap by three_keycap;
} ccmp;"""
WITHOUT_PICTURE = (".notdef", "joiner", "heart")
PICTURED = [name for name in [*CODES, *LIGATURES] if name not in WITHOUT_PICTURE]
LINE_METRICS = [
    *("ascender", "descender", "widthMax", "caretOffset", "pad1", "pad2"),
    *("caretSlopeNumerator", "caretSlopeDenominator"),
    *("minOriginSB", "minAdvanceSB", "maxBeforeBL", "minAfterBL"),
]
LICENCE = "licensed under the SIL Open Font License, Version 1.1."


def bitmap(number: int, width: int = 20, height: int = 16) -> Image.Image:
    """A random picture with a transparent left half."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 4)).astype(np.uint8)
    pixels[..., 3] = np.where(np.arange(width) < width // 2, 0, 255)
    return Image.fromarray(pixels)


def emoji_font(path: Path, colour: bool = True, broken: str = "", sizes=(16, 8)) -> Path:
    """Write the font: ``PICTURED[i]`` is ``bitmap(i)``; the ``broken`` glyph is no PNG.

    The strike of 8 has one glyph only, so that the right one is the larger.
    """
    names = [".notdef", *CODES, *LIGATURES]
    builder = FontBuilder(1024, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({code: name for name, code in CODES.items()})
    builder.setupGlyf({name: Glyph() for name in names})
    builder.setupHorizontalMetrics({name: (1024, 0) for name in names})
    builder.setupHorizontalHeader()
    builder.setupNameTable(
        {"familyName": "Tiny", "version": "Version 1", "licenseDescription": LICENCE}
    )
    builder.setupOS2()
    builder.setupPost()
    addOpenTypeFeaturesFromString(builder.font, FEATURES)
    if colour:
        _add_bitmaps(builder.font, broken, sizes)
    builder.save(path)
    return path


def _add_bitmaps(font, broken, sizes):
    index, data = newTable("CBLC"), newTable("CBDT")
    index.version = data.version = 3.0
    index.strikes, data.strikeData = [], []
    for size in sizes:
        shown = PICTURED if size == max(sizes) else ["grin"]
        index.strikes.append(_strike(shown, size))
        glyphs = {}
        for name in shown:
            number = PICTURED.index(name)
            out = io.BytesIO()
            picture = bitmap(number) if size == max(sizes) else bitmap(number, 8, 8)
            picture.save(out, "PNG")
            glyph = cbdt_bitmap_format_17(b"", font)
            glyph.imageData = b"no png" if name == broken else out.getvalue()
            glyph.metrics = SmallGlyphMetrics()
            for metric in ("height", "width", "BearingX", "BearingY", "Advance"):
                setattr(glyph.metrics, metric, size)
            glyphs[name] = glyph
        data.strikeData.append(glyphs)
    font["CBLC"], font["CBDT"] = index, data


def _strike(names, size):
    strike = Strike()
    table = strike.bitmapSizeTable
    table.colorRef, table.bitDepth, table.flags = 0, 32, 1
    table.ppemX = table.ppemY = size
    table.hori, table.vert = SbitLineMetrics(), SbitLineMetrics()
    for line in (table.hori, table.vert):
        for metric in LINE_METRICS:
            setattr(line, metric, 0)
    for name in names:  # a glyph each, so that gaps in the glyph order do not matter
        part = eblc_index_sub_table_1(b"", None)
        part.indexFormat, part.imageFormat, part.names = 1, 17, [name]
        strike.indexSubTables.append(part)
    return strike
