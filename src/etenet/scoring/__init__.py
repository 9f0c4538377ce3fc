"""Captions and references become scores. Knows no model."""
