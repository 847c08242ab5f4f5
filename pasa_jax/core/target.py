"""The one table of chips: what each can compute, how much memory it has, and its names.

Two questions decide how attention is computed on a chip, and the table answers both: whether the
float32 sums of Q·Kᵀ can be read before they are rounded to 16 bits (then the shift ``reference``
costs nothing; else we speak of rounded products), and how large a tile may be.
"""

from __future__ import annotations

from dataclasses import dataclass

from pasa_jax.core.errors import check_choice

KIB = 1024
MIB = 1024 * KIB
GB = 10**9


@dataclass(frozen=True)
class Gpu:
    """What XLA must be told to compile for a GPU that is not there (NVIDIA's data sheets).

    Arguments:
      product: the name on the data sheet.
      major, minor: of the compute capability.
      cores, shared_per_core, l2, memory, bandwidth: in bytes, and bytes per second.
      accelerated: whether the architecture's own instructions may be used ("sm_90a").
    """

    product: str
    major: int
    minor: int
    cores: int
    shared_per_core: int
    l2: int
    memory: int
    bandwidth: int
    clock_ghz: float
    accelerated: bool = False

    @property
    def architecture(self) -> str:
        """Its name in ptxas."""
        return f"sm_{self.major}{self.minor}" + ("a" if self.accelerated else "")


@dataclass(frozen=True)
class Ascend:
    """The names of an NPU in CANN.

    Arguments:
      architecture: for the compiler, "dav-2201".
      units: the chips that share it, as a project lists them.
      product: one of them in full.
    """

    architecture: str
    units: tuple[str, ...]
    product: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is known of one chip: for the schedule, the shift ``auto`` and the compilers.

    Arguments:
      name: the key in `TARGETS`.
      kind: ``"cpu"``, ``"tpu"``, ``"gpu"`` or ``"npu"``.
      matrix_types: input type of the matrix unit -> the accumulator types it offers.
      accumulator_reachable: whether vector code reads the float32 score tile before rounding.
      vector_bytes: bytes that one vector instruction works on.
      vector_types: the types of its vector arithmetic, exponentials included.
      matrix_columns: columns of a product that the matrix unit computes at once.
      memories: on-chip memories in bytes, each as one core (or one thread block) may use it.
      device_kinds: substrings of ``jax.Device.device_kind`` that name this chip, lower case.
      source: where the figures stand.
      topology: the name of a small slice of TPUs in libtpu; None: not a TPU.
      gpu: what XLA is told of a GPU, or None.
      ascend: the names of an NPU in CANN, or None where no kernel is emitted for it.
    """

    name: str
    kind: str
    matrix_types: dict[str, tuple[str, ...]]
    accumulator_reachable: bool
    vector_bytes: int
    memories: dict[str, int]
    source: str
    device_kinds: tuple[str, ...] = ()
    vector_types: tuple[str, ...] = ("float32",)
    matrix_columns: int = 128
    topology: str | None = None
    gpu: Gpu | None = None
    ascend: Ascend | None = None


_F32 = ("float32",)
_BOTH = ("float32", "float16")
_TPU_SOURCE = (
    "jax/_src/pallas/mosaic/tpu_info.py (VMEM, SMEM, lanes x sublanes; bfloat16 vectors and a "
    "256 x 256 matrix unit since v6e); Mosaic offers float32 "
    "results of bfloat16 and float32 products and refuses float16 (measured by compiling)"
)
_GPU_SOURCE = (
    "CUDA C++ Programming Guide, technical specifications per compute capability (shared memory "
    "per block, registers per SM); PTX ISA, mma/wgmma/tcgen05 .f16 and .f32 accumulators"
)
_ASCEND_SOURCE = (
    "AscendC API documentation, CANN 9.1 (memory sizes, Mmad types, Fixpipe and L0C paths)"
)


def _tpu(name: str, vmem: int, topology: str, *device_kinds: str, second: bool = False) -> Target:
    return Target(
        name=name,
        kind="tpu",
        matrix_types={"bfloat16": _F32, "float32": _F32},
        accumulator_reachable=True,
        vector_bytes=8 * 128 * 4,
        memories={"VMEM": vmem, "SMEM": MIB},
        source=_TPU_SOURCE,
        device_kinds=device_kinds,
        vector_types=("float32", "bfloat16") if second else ("float32",),
        matrix_columns=256 if second else 128,
        topology=topology,
    )


def _gpu(name: str, shared: int, *device_kinds: str, gpu: Gpu | None = None) -> Target:
    return Target(
        name=name,
        kind="gpu",
        matrix_types={"float16": _BOTH, "bfloat16": _F32, "float32": _F32},
        accumulator_reachable=True,
        vector_bytes=32 * 4,  # one warp
        memories={"shared": shared, "registers": 256 * KIB},
        source=_GPU_SOURCE,
        device_kinds=device_kinds,
        gpu=gpu,
    )


def _ascend(name: str, reachable: bool, ascend: Ascend | None = None, **memories: int) -> Target:
    return Target(
        name=name,
        kind="npu",
        matrix_types={"float16": _F32, "bfloat16": _F32},
        accumulator_reachable=reachable,
        vector_bytes=256,
        memories=memories,
        source=_ASCEND_SOURCE,
        ascend=ascend,
    )


_A100 = Gpu("NVIDIA A100-SXM4-80GB", 8, 0, 108, 164 * KIB, 40 * MIB, 80 * GB, 2039 * GB, 1.41)
_RTX4090 = Gpu("NVIDIA GeForce RTX 4090", 8, 9, 128, 100 * KIB, 72 * MIB, 24 * GB, 1008 * GB, 2.52)
_H100 = Gpu("NVIDIA H100 80GB HBM3", 9, 0, 132, 228 * KIB, 50 * MIB, 80 * GB, 3352 * GB, 1.98, True)
_B200 = Gpu("NVIDIA B200", 10, 0, 148, 228 * KIB, 126 * MIB, 180 * GB, 8000 * GB, 1.965, True)
_RTX5090 = Gpu(
    "NVIDIA GeForce RTX 5090", 12, 0, 170, 100 * KIB, 96 * MIB, 32 * GB, 1792 * GB, 2.41, True
)

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="cpu",
            kind="cpu",
            matrix_types={"float16": _F32, "bfloat16": _F32, "float32": _F32},
            accumulator_reachable=True,
            vector_bytes=64,
            # A tile is held in the second-level cache; 1 MiB a core is the least of the current
            # server chips (AMD Zen 4: 1 MiB, Intel Sapphire Rapids: 2 MiB). Not a hard limit.
            memories={},
            source="vendors' data sheets (AVX-512 width); XLA:CPU dots give float32 (measured)",
            device_kinds=("cpu",),
        ),
        _tpu("tpu_v5e", 128 * MIB, "v5e:2x2", "tpu v5 lite", "tpu v5e"),
        _tpu("tpu_v5p", 64 * MIB, "v5p:2x2x1", "tpu v5p", "tpu v5"),
        _tpu("tpu_v6e", 128 * MIB, "v6e:2x2", "tpu v6 lite", "tpu v6e", second=True),
        _tpu("tpu_7x", 64 * MIB, "tpu7x:2x2x1", "tpu7x", "tpu 7x", second=True),
        _gpu("a100", 163 * KIB, "a100", gpu=_A100),
        _gpu("h100", 227 * KIB, "h100", gpu=_H100),
        _gpu("h200", 227 * KIB, "h200"),
        _gpu("b200", 227 * KIB, "b200", gpu=_B200),
        _gpu("rtx4090", 99 * KIB, "rtx 4090", gpu=_RTX4090),
        _gpu("rtx5090", 99 * KIB, "rtx 5090", gpu=_RTX5090),
        # 2201: L0C leaves through Fixpipe to global memory only; the vector cores see it rounded.
        _ascend(
            "ascend_910b",
            False,
            Ascend("dav-2201", ("ascend910b", "ascend910_93"), "Ascend910B1"),
            L1=512 * KIB - 256,
            L0A=64 * KIB,
            L0B=64 * KIB,
            L0C=128 * KIB,
            UB=192 * KIB - 256 - 8 * KIB,
        ),
        # 3510: L0C -> UB in float32.
        _ascend(
            "ascend_950",
            True,
            Ascend("dav-3510", ("ascend950",), "Ascend950PR_9599"),
            L1=512 * KIB,
            L0A=64 * KIB,
            L0B=64 * KIB,
            L0C=256 * KIB,
            UB=248 * KIB,
        ),
        # 2002: cube and vector are coupled; DataCopy L0C -> UB keeps float32.
        _ascend(
            "ascend_310p",
            True,
            L1=MIB,
            L0A=64 * KIB,
            L0B=64 * KIB,
            L0C=256 * KIB,
            UB=256 * KIB,
        ),
    )
}


def find_target(name: str) -> Target:
    """The `Target` called ``name``.

    >>> find_target("ascend_910b").accumulator_reachable
    False
    """
    check_choice("target", name, tuple(TARGETS))
    return TARGETS[name]


def target_of_device(platform: str, device_kind: str) -> Target:
    """The target of a JAX device; an unknown GPU or TPU counts as the smallest of its kind.

    >>> target_of_device("gpu", "NVIDIA H200").name
    'h200'
    """
    kind = device_kind.lower()
    for target in TARGETS.values():
        if any(part in kind for part in target.device_kinds):
            return target
    fallback = {"tpu": "tpu_v5p", "gpu": "rtx4090", "cuda": "rtx4090", "rocm": "rtx4090"}
    return TARGETS[fallback.get(platform, "cpu")]
