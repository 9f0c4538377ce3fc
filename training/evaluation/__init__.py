"""Captions of a split: from checkpoints and from baselines, and how they are shown."""
