"""Clips and a network become captions, one outcome for each clip."""
