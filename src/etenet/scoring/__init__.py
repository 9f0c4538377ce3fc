"""Captions and references -> scores. Knows no model."""
