"""What the compilers made of a build."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """What one build came to.

    Attributes:
        registers: of a thread.
        spills: bytes on NVIDIA's GPUs, registers on AMD's.
        shared: bytes of shared memory.
        vector_loads: 128-bit loads from global memory.
        num_dots, num_wgmma: matrix products in the kernel, and Hopper's instructions for them.
        narrow_offsets: lines that compute row offsets in less than 64 bits.
    """

    id: str
    registers: int
    spills: int
    shared: int
    vector_loads: int
    num_dots: int
    num_wgmma: int
    narrow_offsets: list[str] = field(default_factory=list)
