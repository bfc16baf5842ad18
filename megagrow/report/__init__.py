"""What the runs of one comparison say: report.json for programs, report.md and curves.png."""

from megagrow.report.build import build_report
from megagrow.report.markdown import to_markdown

__all__ = ["build_report", "to_markdown"]
