"""The figures of all commands: one resolution, panels below or beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from adlocal import plotting

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(("beside", "size", "rows"), [(False, (4.0, 9.0), 3), (True, (12.0, 3.0), 1)])
def test_panels_lie_below_or_beside_each_other(beside: bool, size: tuple[float, float], rows: int) -> None:
    fig, panels = plotting.figure(3, 4.0, 3.0, beside=beside)
    assert tuple(fig.get_size_inches()) == size
    assert len({panel.get_position().y0 for panel in panels}) == rows
    assert len({panel.get_position().x0 for panel in panels}) == 3 // rows


def test_a_picture_has_150_pixels_an_inch(tmp_path: Path) -> None:
    fig, _ = plotting.figure(1, 4.0, 3.0)
    plotting.save(fig, tmp_path / "a.png")
    header = (tmp_path / "a.png").read_bytes()[16:24]
    assert (int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")) == (600, 450)
