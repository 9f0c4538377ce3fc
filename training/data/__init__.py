"""Annotations and clips become a dataset folder, and a dataset folder becomes batches."""
