"""How a model lies on devices, as plain options: known without JAX, so that help and mistakes come at once."""

import dataclasses
from typing import Literal

# From the slowest links to the fastest: neighbours on the last axis are neighbours in the machine.
AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
Across = Literal["stage", "data", "fsdp"]


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes; their product is the number of devices. -1 means: what is left."""

    data: int = -1
    """Copies of the model, each on its own rows of the batch."""
    fsdp: int = 1
    """Parameters and optimiser state split over this many devices, each on its own rows of the batch."""
    stage: int = 1
    """The layers split over this many devices, through which parts of the batch go one behind the other."""
    expert: int = 1
    """Experts split over this many devices, each on its own rows of the batch, which send each other tokens."""
    context: int = 1
    """The length of the rows split over this many devices."""
    tensor: int = 1
    """Heads, MLP and vocabulary split over this many devices that share the same rows."""
    across: Across = "data"
    """The axis that spans several slices of a pod, or several hosts' islands of fast links, whose links are slow."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of AXES."""
        return self.stage, self.data, self.fsdp, self.expert, self.context, self.tensor

    def __post_init__(self) -> None:
        sizes = self.sizes
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            given = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
            raise ValueError(f"mesh sizes are positive, at most one of them -1 (what is left); given: {given}")


@dataclasses.dataclass(frozen=True)
class MeshOptions(ParallelConfig):
    """`ParallelConfig` for a model that is applied, not trained: one device unless sizes are given, and as many of the machine's as
    they multiply to."""

    data: int = 1
    """Copies of the model, each with its own rows of a batch; -1: on all devices that the other sizes leave."""


Dtype = Literal["auto", "float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded to be applied."""

    dtype: Dtype | None = None
    """Precision of parameters and computation; auto: that of the checkpoint's files, for an adapter of its base model's (float16 is
    held as it is and computed with in float32). Empty: float32, the precision in which outputs are compared with other libraries';
    for a run that of its training."""
    parallel: MeshOptions = MeshOptions()
