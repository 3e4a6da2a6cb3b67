"""Calibration and evaluation data: folders, files, and the built-in ones."""
