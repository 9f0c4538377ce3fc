"""The model package made fast, on a CPU and on a GPU. Here: how many clips to compute at once. Imports no torch."""

CPU_BATCH_CLIPS = 8
GPU_BATCH_CLIPS = 16
