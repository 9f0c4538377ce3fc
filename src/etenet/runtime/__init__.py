"""The model package made fast, on a CPU and on a GPU. Here: how many clips to compute at once. Imports no torch.

OpenVINO's reporter stays out. It would tell Google Analytics of every checkpoint that is packaged, by a process that
asks the proxies of the environment and outlives the server where the network swallows what it sends.
"""

import sys

PACKAGED, BF16 = PRECISIONS = ("packaged", "bf16")  # what a CPU encodes in: as the archive has it, or bfloat16

CPU_BATCH_CLIPS = 8
GPU_BATCH_CLIPS = 16

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # as if it were not installed

GRAPH = "encoder.xml"  # the file of an encoder compiled for a CPU; its weights are beside it
