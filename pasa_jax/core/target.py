"""The hardware shim, as data: what a chip's matrix unit takes, gives, and lets one see.

Two questions decide how attention is computed on a chip, and both are answered here and nowhere
else: does the float32 accumulator of Q·Kᵀ reach vector code before it is rounded to 16 bits
(then the shift ``reference`` costs nothing), and how large may a tile be.
"""

from __future__ import annotations

from dataclasses import dataclass

from pasa_jax.core.errors import check_choice

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the schedule and the shift ``auto`` need to know of one chip.

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


def _tpu(name: str, vmem: int, *device_kinds: str, second: bool = False) -> Target:
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
    )


def _gpu(name: str, shared: int, *device_kinds: str) -> Target:
    return Target(
        name=name,
        kind="gpu",
        matrix_types={"float16": _BOTH, "bfloat16": _F32, "float32": _F32},
        accumulator_reachable=True,
        vector_bytes=32 * 4,  # one warp
        memories={"shared": shared, "registers": 256 * KIB},
        source=_GPU_SOURCE,
        device_kinds=device_kinds,
    )


def _ascend(name: str, reachable: bool, **memories: int) -> Target:
    return Target(
        name=name,
        kind="npu",
        matrix_types={"float16": _F32, "bfloat16": _F32},
        accumulator_reachable=reachable,
        vector_bytes=256,
        memories=memories,
        source=_ASCEND_SOURCE,
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
        _tpu("tpu_v5e", 128 * MIB, "tpu v5 lite", "tpu v5e"),
        _tpu("tpu_v5p", 64 * MIB, "tpu v5p", "tpu v5"),
        _tpu("tpu_v6e", 128 * MIB, "tpu v6 lite", "tpu v6e", second=True),
        _tpu("tpu_7x", 64 * MIB, "tpu7x", "tpu 7x", second=True),
        _gpu("a100", 163 * KIB, "a100"),
        _gpu("h100", 227 * KIB, "h100"),
        _gpu("h200", 227 * KIB, "h200"),
        _gpu("b200", 227 * KIB, "b200"),
        _gpu("rtx4090", 99 * KIB, "rtx 4090"),
        _gpu("rtx5090", 99 * KIB, "rtx 5090"),
        # 2201: L0C leaves through Fixpipe to global memory only; the vector cores see it rounded.
        _ascend(
            "ascend_910b",
            False,
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
