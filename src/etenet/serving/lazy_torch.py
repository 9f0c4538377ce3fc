"""What a worker of TorchServe imports as torch: torch, but only once something of it is used.

TorchServe imports torch in every worker, to recognise tensors in responses: 265 MiB and seconds of two cores. Ours
sends none, and on a CPU it captions without. This file is copied into the folder of the model as `torch.py`, where it
comes before the installed torch; it is never imported under its own name, and imports nothing of this package.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_spec = PathFinder.find_spec("torch", [folder for folder in sys.path if Path(folder).resolve() != _HERE])
if _spec is None or _spec.loader is None:
    raise ModuleNotFoundError("torch is not installed; run: etenet doctor")
_spec.loader = importlib.util.LazyLoader(_spec.loader)
_torch = importlib.util.module_from_spec(_spec)
sys.modules["torch"] = _torch
_spec.loader.exec_module(_torch)
