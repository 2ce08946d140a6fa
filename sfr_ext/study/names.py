"""What a study and its report write into the study's folder, beside the settings' folders."""

from __future__ import annotations

OUTLINE = "study.json"
LINES = "results.jsonl"  # one run a line, without checkpoints: small enough to be kept
TEXT, PAGE = "report.md", "report.html"
FIGURES = "figures"  # folder of the drawings
TAKEN = (OUTLINE, LINES, TEXT, PAGE, FIGURES)
