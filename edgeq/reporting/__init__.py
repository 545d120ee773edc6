"""A self-contained HTML page of profiles and sweeps.

    sources   profiles and results of sweeps, read from files
    figures   the plots, or the reason why there is none
    tables    every figure with its unit and its source
    axes      scales and their ticks
    plot      lines, dots and shades on two axes, as SVG
    page      all of it as HTML, by page.html and page.css
    timeline  speed and the meters' values over time

What was not measured is listed with the reason, and never drawn as 0.
"""

from __future__ import annotations

from edgeq.reporting.page import page, write
from edgeq.reporting.sources import Sources, read

__all__ = ["Sources", "page", "read", "write"]
