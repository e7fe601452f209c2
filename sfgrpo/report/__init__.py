"""What happened in a run: one HTML page of its logs and pictures, curves of several runs."""

from sfgrpo.report.page import summary, write

__all__ = ["summary", "write"]
