"""Where arrays lie: the mesh of devices and the rules that split logical axes over it."""

from jaxlm.parallel.mesh import ParallelConfig, make_mesh, peak_flops, settle
from jaxlm.parallel.rules import batch_sharding, batch_ways, constrain, fitting, length_ways, place_batch, stored_shardings

__all__ = [
    "ParallelConfig",
    "batch_sharding",
    "batch_ways",
    "constrain",
    "fitting",
    "length_ways",
    "make_mesh",
    "peak_flops",
    "place_batch",
    "settle",
    "stored_shardings",
]
