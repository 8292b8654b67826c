"""What people read of a run: report.html, report.md, their tables and plots."""
