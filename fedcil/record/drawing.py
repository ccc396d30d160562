"""How pictures look and how they are written: matplotlib's object API, no pyplot, nothing global."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from fedcil.errors import InputError
from fedcil.files import write_atomic

DPI = 150
INK, GREY, FAINT = "#222222", "#777777", "#dddddd"
# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def refuse_other_pictures(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise InputError("pictures are PNG files", where=str(path), allowed="a name that ends in .png")


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure; folders above it are made. Raises InputError if that is not possible."""
    refuse_other_pictures(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, png_bytes(figure))
    except OSError as error:
        raise InputError(
            f"cannot write a picture: {error.strerror}",
            where=str(path),
            next="make room, or give a path you may write to",
        ) from None


def png_bytes(figure: Figure) -> bytes:
    """A figure as a PNG at 150 dots per inch.

    256 colours are enough for it and make a third of the bytes; no date, so equal figures are equal files.
    """
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()))
    buffer = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True, dpi=(DPI, DPI))
    return buffer.getvalue()


def clean_axes(axes: Any) -> None:
    """No frame at the top and on the right; faint lines behind the data, from left to right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def integer_ticks(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def plain_text(text: str) -> str:
    """Text that matplotlib shall not read as a formula."""
    return text.replace("$", r"\$")
