"""Figures of the study's report, one idea a file."""
