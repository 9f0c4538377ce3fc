"""Trains EtENet checkpoints. Imports the core package `etenet`, which never imports this one."""
