"""
What all benchmark scripts share: the protocol of ``sb3_diffusion.evaluation.protocol.run`` with its results and checkpoints
below ``benchmarks/``, and results that are tables of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch as th

from sb3_diffusion.evaluation import protocol
from sb3_diffusion.evaluation.protocol import behavior, describe, environment, merge, write_json

__all__ = ["RESULTS", "ROOT", "WORK", "behavior", "describe", "environment", "merge", "run", "write_json", "write_table"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "benchmarks" / "work"

run = partial(protocol.run, workdir=WORK)


def write_table(
    result_file: Path,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | float | int | None]],
    *,
    text: str = "",
    pictures: Sequence[tuple[str, str]] = (),
    device: th.device | str = "cpu",
) -> None:
    """
    Write a result that is a table of its own, pictures, or both (speed, toys) rather than learning curves.

    :param result_file: JSON file to write
    :param title: headline
    :param columns: heads of the columns; none for a result without a table
    :param rows: one value per column; floats are shown with four significant digits
    :param text: what was done, in Markdown
    :param pictures: pairs of a path relative to ``docs/`` and a caption
    :param device: that was measured on
    """
    wrong = [len(row) for row in rows if len(row) != len(columns)]
    if wrong:
        raise ValueError(f"Each row must have {len(columns)} values, one per column: got rows of {wrong}.")
    write_json(
        result_file,
        {
            "kind": "table",
            "title": title,
            "text": text,
            "columns": list(columns),
            "rows": [list(row) for row in rows],
            "pictures": [{"path": path, "caption": caption} for path, caption in pictures],
            "environment": environment(device),
        },
    )
