"""What happened in a run: one HTML page of its logs and pictures, curves of several runs."""

from sfgrpo.report.page import summary, write
from sfgrpo.report.several import write as write_several

__all__ = ["summary", "write", "write_several"]
