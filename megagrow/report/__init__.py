"""What the runs of one comparison say: report.json for programs, report.md and curves.png."""

from megagrow.report.build import build_report

__all__ = ["build_report"]
