"""One self-contained HTML page of what was measured, and the plot of a sweep.

    sources   saved runs and a sweep's results, read from files
    figures   what is drawn of them, and why something is not
    tables    every figure with its unit and where it comes from
    axes      scales and their ticks
    plot      lines, dots and shades on two axes, as SVG
    page      all of it as HTML, by page.html and page.css
    picture   a sweep's plot as a file of its own, by matplotlib

What was not measured is told with its reason, and never drawn as 0.
"""

from __future__ import annotations

from edgeq.reporting.page import page, write
from edgeq.reporting.picture import pareto_plot
from edgeq.reporting.sources import Sources, read

__all__ = ["Sources", "page", "pareto_plot", "read", "write"]
