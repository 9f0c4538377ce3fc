"""All that only a GPU runs, and the one door to it: the other files of this package are imported by each other alone.

`network.py` is the form of the network, `fusion.py` the encoder with fewer operations, `graph.py` the capturing as CUDA
graphs.
"""

from etenet.runtime.cuda.network import BEAM_SIZE, CudaNetwork, GpuEncoder, GpuSearch, compiled_kernels

__all__ = ["BEAM_SIZE", "CudaNetwork", "GpuEncoder", "GpuSearch", "compiled_kernels"]
