"""The one style of all pictures of this package. Draws without a display and without matplotlib's global state."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#3b6ea5", "#d9822b", "#8a8a8a"
COLORS = (
    BLUE,
    ORANGE,
    "#4b9560",
    "#a8486b",
    "#6f5fa3",
    "#2f9ba6",
    "#8b6a43",
    "#5a5a5a",
    "#c9a227",
    "#d98cb3",
    "#9bb53c",
    "#1c2f4f",
)
"""Of methods that are compared, in the order in which they come; from the thirteenth on they repeat."""
DPI = 120


def new_figure(width: float, height: float) -> Figure:
    """
    :param width: inches
    :param height: inches
    :return: empty figure that lays out its parts by itself
    :raises ImportError: without matplotlib
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need the package matplotlib: pip install "sb3-diffusion[plots]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def color_of(index: int) -> str:
    """
    :param index: of a method among those compared
    :return: its colour
    """
    return COLORS[index % len(COLORS)]


def hide_edges(figure: Figure) -> None:
    """
    :param figure: whose panels lose their upper and right edge
    """
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: str | PathLike[str]) -> Path:
    """
    Write a figure without the upper and the right edge of its panels; folders are made.

    :param figure: to write
    :param path: file; its suffix decides the format (png, pdf, svg), without one it gets ``.png``
    :return: the path written
    """
    path = Path(path)
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    hide_edges(figure)
    figure.savefig(path, dpi=DPI)
    return path
