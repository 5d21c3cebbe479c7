"""Where arrays lie: the processes, the mesh of devices, and the rules that split logical axes over it."""

from jaxlm.devices import MeshOptions, ParallelConfig
from jaxlm.parallel.hosts import HostsConfig, failed, join, leave, speaks
from jaxlm.parallel.mesh import abstract_mesh, make_mesh, mesh_of, peak_flops, settle
from jaxlm.parallel.rules import (
    STORED,
    batch_sharding,
    batch_ways,
    constrain,
    fitting,
    length_ways,
    place_batch,
    share,
    spec,
    spread,
    stored_shardings,
)

__all__ = [
    "STORED",
    "HostsConfig",
    "MeshOptions",
    "ParallelConfig",
    "abstract_mesh",
    "batch_sharding",
    "batch_ways",
    "constrain",
    "failed",
    "fitting",
    "join",
    "leave",
    "length_ways",
    "make_mesh",
    "mesh_of",
    "peak_flops",
    "place_batch",
    "settle",
    "share",
    "speaks",
    "spec",
    "spread",
    "stored_shardings",
]
