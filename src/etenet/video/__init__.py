"""Bytes become frames. Knows no network."""
