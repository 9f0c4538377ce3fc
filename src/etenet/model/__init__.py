"""Frames become words. Knows no video file."""
