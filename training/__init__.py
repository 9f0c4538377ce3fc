"""Trains EtENet checkpoints. Imports the core package `etenet`, which never imports this one."""

import os

from etenet.linux import waiting_settings

os.environ.update(waiting_settings(os.environ))  # before a command imports torch, which reads them then
