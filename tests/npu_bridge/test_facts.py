"""The table of facts: who takes it, and that seeded faults are found by someone who does.

Each fault is first shown to be one by a line of the true headers. ``ASC_DEVKIT=folder pytest``
reads those lines again, in a checkout of cann/asc-devkit at the commit that the table names.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import npu_bridge
from npu_bridge.emulation import EMULATOR
from npu_bridge.expressions import Scalar
from npu_bridge.facts import FACTS, cpp
from npu_bridge.facts.text import problems
from npu_bridge.instructions import (
    Binary,
    BinaryStrided,
    Brcb,
    Cast,
    Compare,
    DataCopy,
    Duplicate,
    Fixpipe,
    LoadData,
    MatrixIn,
    Mmad,
    RowsIn,
    Strided,
    Unary,
    WholeReduce,
    WithScalar,
)
from npu_bridge.ir import Barrier, Buffer, CrossSet, SetFlag, WaitFlag
from npu_bridge.memory import Memory
from pasa_jax.core.errors import LoweringError
from tests.npu_bridge.cases import CASES
from tests.npu_bridge.parts import COMPILER
from tests.npu_bridge.test_emulator import DEFECTS

HERE = Path(__file__).parent / "emulator"
DEVKIT = os.environ.get("ASC_DEVKIT")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")

_CHECKS = "impl/basic_api/kernel_operator_data_copy_check.h"
_CUBE = "impl/basic_api/kernel_operator_mm_check.h"
_REDUCE = "impl/basic_api/kernel_operator_vec_reduce_intf_impl.h"
_C220 = "impl/basic_api/dav_c220/kernel_operator"
_GUIDE = FACTS.static_tensors
# Fault -> where the headers or the guide say so, and a word of what they say there.
EVIDENCE = {
    # found by the emulator: tests/npu_bridge/emulator/defects.cpp
    "no_state": (f"{_GUIDE}:182", "InitSocState"),
    "late_state": (f"{_GUIDE}:182", "InitSocState"),
    "no_end": (f"{_GUIDE}:183", "PIPE_ALL"),
    "after_the_end": (f"{_GUIDE}:183", "PIPE_ALL"),
    "index_by_tpipe": (f"{_C220}_vec_createvecindex_impl.h:52", "GetTPipePtr"),
    "scalar_store": (f"{_C220}_vec_createvecindex_impl.h:53", "S_V"),
    "scalar_store_after_vector": (f"{_C220}_vec_reduce_impl.h:175", "V_S"),
    "scalar_store_to_global": (f"{_C220}_vec_reduce_impl.h:181", "S_MTE3"),
    "over_the_scratch": ("impl/basic_api/utils/kernel_utils_constants.h:131", "184 * 1024"),
    "cross_reserved": (f"{_C220}_sync_impl.h:117", "12"),
    "event_reserved": (f"{_GUIDE}:180", "6和7"),
    "repeat_0": ("impl/basic_api/kernel_npu_debug.h:332", "ReportNopWarning"),
    "load_0": (f"{_CUBE}:379", "ReportNopWarning"),
    "copy_0": (f"{_CHECKS}:110", "ReportNopWarning"),
    "long_copy": ("impl/basic_api/kernel_operator_data_copy_intf_impl.h:815", "blockLen = count"),
    "many_rows": (f"{_CHECKS}:388", "UINT12_MAX"),
    "row_stride": (f"{_CHECKS}:242", "65535"),
    "tall_product": (f"{_CUBE}:66", "UINT12_MAX"),
    "tall_result": (f"{_CUBE}:224", "8192"),
    "quantisation": (f"{_CUBE}:147", "F322F16"),
    "wide_mask": ("impl/basic_api/kernel_npu_debug.h:321", "ONE_REPEAT_BYTE_SIZE"),
    "partial_repeat": ("impl/basic_api/kernel_operator_vec_cmpsel_intf_impl.h:177", "% ONE_REPEAT"),
    "odd_maximum": (f"{_REDUCE}:177", "2 * sizeof"),
    "integers_in_order": (f"{_C220}_vec_cmp_impl.h:233", "half, float"),
    "no_such_rounding": (f"{_C220}_vec_vconv_impl.h:375", "CAST_ODD"),
    # found by the compiler: tests/npu_bridge/emulator/refused.cpp
    "Muls": (f"{_C220}_vec_binary_scalar_impl.h:96", "half, float, int16_t, int32_t>"),
    "Exp": (f"{_C220}_vec_unary_impl.h:46", "half, float>"),
    "Duplicate": (f"{_C220}_vec_duplicate_impl.h:31", "half, bfloat16_t, int16_t"),
    "Cast": (f"{_C220}_vec_vconv_impl.h:975", "Tuple<T, U>"),
    "And": (f"{_C220}_vec_binary_impl.h:391", "int16_t, uint16_t>"),
    "Div": (f"{_C220}_vec_binary_impl.h:213", "half, float>"),
    "CompareScalar": (f"{_C220}_vec_cmp_impl.h:219", "uint8_t>"),
    "Select": (f"{_C220}_vec_cmpsel_impl.h:165", "half, float>"),
    "BlockReduceMax": (f"{_REDUCE}:63", "half, float>"),
    "WholeReduceSum": (f"{_C220}_vec_reduce_impl.h:283", "WholeReduceSumImpl"),
    "Brcb": (f"{_C220}_vec_brcb_impl.h:35", "half, bfloat16_t, float>"),
    "LoadData": (f"{_CUBE}:326", "float, int4b_t>"),
    "Mmad": (f"{_C220}_mm_impl.h:373", "Tuple<float, half, half>"),
    "SetFlag": ("impl/basic_api/kernel_event.h:38", "HardEvent"),
}


@pytest.mark.skipif(DEVKIT is None, reason="ASC_DEVKIT names no checkout of cann/asc-devkit")
def test_the_headers_say_so() -> None:
    """Every line that the table and `EVIDENCE` cite holds the types, or the word."""
    cited = dict(EVIDENCE)
    for call in FACTS.calls.values():
        words = {word for types in call.types for word in types}
        if call.tpipe:
            words = {"GetTPipePtr"}
        cited |= {f"{call.name} {word}": (call.source, word) for word in words}
    missing = []
    for name, (source, word) in cited.items():
        path, line = source.rsplit(":", 1)
        lines = (Path(DEVKIT or "") / path).read_text(errors="replace").splitlines()
        near = "\n".join(lines[int(line) - 3 : int(line) + 12])
        if word not in near:
            missing.append(f"{name}: {word} at {source}")
    assert missing == []


@pytest.mark.skipif(DEVKIT is None, reason="ASC_DEVKIT names no checkout of cann/asc-devkit")
def test_the_headers_cast_so() -> None:
    """The pairs of types and the modes of each that lead to an instruction."""
    text = (Path(DEVKIT or "") / f"{_C220}_vec_vconv_impl.h").read_text()
    overload = r"void CastIntrinsicsImpl\(\s*__ubuf__ (\w+)\* dst, __ubuf__ (\w+)\* src.*?\n}\n"
    found = {}
    for m in re.finditer(overload, text, re.DOTALL):
        cases = re.split(r"case RoundMode::CAST_(\w+):|default:", m[0])[1:]
        modes = {
            mode for mode, body in zip(cases[::2], cases[1::2], strict=True) if "vconv" in body
        }
        if modes and "int4b_t" not in m.groups():
            found[m.groups()] = modes
    assert found == {types: set(modes) for types, modes in FACTS.call("Cast").types.items()}


def test_the_emulator_has_the_facts() -> None:
    assert cpp.PATH.read_text() == cpp.header(FACTS), "run: python -m npu_bridge.facts.cpp"


def test_every_emulated_call_is_in_the_table() -> None:
    text = "\n".join(x.read_text() for x in EMULATOR.glob("*.h") if x.name != "facts.h")
    functions = re.findall(r"^(?:inline )?(?:void|int64_t) ([A-Z]\w*)\(", text, re.MULTILINE)
    macros = re.findall(r"^ASCENDC_[A-Z]+\(([A-Z]\w*),", text, re.MULTILINE)
    methods = {"SetValue", "GetValue", "SetGlobalBuffer", "ReinterpretCast"}
    elsewhere = {"LocalTensor", "GlobalTensor", "ToBfloat16", "Nd2Nz", "GetUserWorkspace"}
    names = {*functions, *macros, *methods, *elsewhere} - {"Name"}
    assert names == set(FACTS.calls)


def test_what_is_kept_for_the_library_is_beyond_the_plan() -> None:
    begin, end = FACTS.scratch
    assert Memory.of("ascend_910b", "UB").capacity <= begin < end == 192 * 1024


def test_not_every_emitted_call_is_listed_for_static_tensors() -> None:
    """What docs/npu.md says of them."""
    emitted = [x for x in FACTS.calls.values() if not x.tpipe]
    unlisted = [x.name for x in emitted if not x.listed]
    assert unlisted == ["Select", "SyncAll", "GetUserWorkspace"]


@needs_compiler
def test_calls_that_the_chip_does_not_have_do_not_compile() -> None:
    source = HERE / "refused.cpp"
    lines = source.read_text().splitlines()
    wanted = {i: m[1] for i, x in enumerate(lines, 1) if (m := re.search(r"refused: (\w+)", x))}
    said = subprocess.run(
        [COMPILER, "-std=c++17", "-fsyntax-only", "-w", f"-I{EMULATOR}", source],
        capture_output=True,
        text=True,
    ).stderr
    found = {int(line) for line in re.findall(r"refused\.cpp:(\d+):\d+: +(?:error|required)", said)}
    assert found == set(wanted)
    assert set(wanted.values()) == {name for name in EVIDENCE if name not in DEFECTS}


def test_every_seeded_fault_has_its_evidence() -> None:
    faults = {name for name in EVIDENCE if name in DEFECTS}
    assert {"tpipe", "state", "end", "scratch"} == {DEFECTS[n] for n in faults} - {
        "race", "field", "alignment", "event id", "flag id",
    }  # fmt: skip
    assert len(faults) > 20


GM = {name: Buffer("there", "GM", name, 0).at() for name in ("half", "float", "bfloat16_t")}
UB = {name: Buffer("here", "UB", name, 4096).at() for name in (*GM, "uint16_t", "int32_t")}
L1, L0A, L0B = (Buffer("m", memory, "half", 4096).at() for memory in ("L1", "L0A", "L0B"))
L0C = Buffer("c", "L0C", "float", 4096).at()


def _strided(block: int, repeat: int) -> Strided:
    return Strided(UB["float"], UB["float"], block, repeat)


def _binary(lanes: int, repeats: int, repeat_stride: int = 8) -> BinaryStrided:
    sides = (_strided(1, 8), _strided(1, 8), _strided(0, repeat_stride))
    return BinaryStrided("Sub", *sides, lanes, repeats)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: WithScalar("Muls", UB["bfloat16_t"], UB["bfloat16_t"], Scalar(-1), 128),
            "Muls takes half or float or int16_t or int32_t on this chip, not bfloat16_t (impl/",
        ),
        (
            lambda: Unary("Exp", UB["float"], UB["half"], 64),
            "Exp takes half or float on this chip, not (float, half)",
        ),
        (
            lambda: Binary("Div", *[UB["int32_t"]] * 3, 64),
            "Div takes half or float on this chip, not int32_t",
        ),
        (
            lambda: Cast(UB["bfloat16_t"], UB["half"], 64),
            "Cast takes (float, half) or (bfloat16_t, float)",
        ),
        (
            lambda: Duplicate(UB["half"], Scalar(0), 0),
            "Vector.count must be 1 to 2147483647 on this chip; got 0",
        ),
        (lambda: _binary(65, 1), "Vector.lanesOf4 must be 1 to 64 on this chip; got 65"),
        (lambda: _binary(64, 0), "Vector.repeat must be 1 to 255 on this chip; got 0"),
        (lambda: _binary(64, 1, 256), "BinaryRepeatParams.repeatStride must be 0 to 255 on this"),
        (lambda: Brcb(UB["float"], UB["float"], 2048), "Vector.repeat must be 1 to 255 on this"),
        (
            lambda: WholeReduce("Max", UB["half"], UB["half"], 128, 256),
            "Vector.repeat must be 1 to 255 on this chip; got 256",
        ),
        (
            lambda: Compare("LT", UB["uint16_t"], UB["half"], Scalar(0), 64),
            "CompareScalar takes whole repeats of 256 bytes, not 64 of half",
        ),
        (
            lambda: DataCopy(UB["half"], GM["half"], 9),
            "DataCopy takes whole blocks of 32 bytes, not 18 bytes",
        ),
        (
            lambda: RowsIn(UB["half"], GM["half"], 4096, 16, 0),
            "DataCopyExtParams.blockCount must be 1 to 4095 on this chip; got 4096",
        ),
        (
            lambda: MatrixIn(L1, GM["half"], 16, 16, 65536),
            "Nd2NzParams.srcDValue must be 1 to 65535 on this chip; got 65536",
        ),
        (
            lambda: LoadData(L0A, L1, 0, 1),
            "LoadData2DParams.repeatTimes must be 1 to 255 on this chip; got 0",
        ),
        (
            lambda: Mmad(L0C, L0A, L0B, 4096, 16, 16, "true"),
            "MmadParams.m must be 1 to 4095 on this chip; got 4096",
        ),
        (
            lambda: Mmad(L0A, L0A, L0B, 16, 16, 16, "true"),
            "Mmad takes (float, half, half) on this chip, not (half, half, half)",
        ),
        (
            lambda: Fixpipe(GM["half"], L0C, 8193, 16, 16),
            "FixpipeParamsV220.mSize must be 1 to 8192 on this chip; got 8193",
        ),
        (lambda: SetFlag("MTE2", "V", 6), "Event.id must be 0 to 5 on this chip; got 6"),
        (lambda: WaitFlag("S", "FIX", 0), "WaitFlag takes MTE2_MTE1 or"),
        (lambda: CrossSet("FIX", 12, "READY"), "the cross-core flag 12 is one of SyncAll's"),
        (lambda: CrossSet("S", 1, "READY"), "CrossCoreSetFlag takes PIPE_V or"),
        (lambda: Barrier("S"), "PipeBarrier takes PIPE_V or"),
        (
            lambda: FACTS.call("CreateVecIndex").require("float"),
            "CreateVecIndex needs a live TPipe",
        ),
        (lambda: FACTS.call("Gather"), "Gather is not in npu_bridge/facts/dav_2201.toml"),
    ],
)
def test_refused_where_it_is_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(LoweringError) as error:
        make()
    assert str(error.value).startswith(message)


_SYNC = "        SyncAll<false>();\n"
# Text of a kernel -> what stands there instead, and what `check` says of it.
EDITS = [
    ("        InitSocState();\n", "", "CubeCore: its Run() begins without InitSocState()"),
    (
        "        PipeBarrier<PIPE_ALL>();\n    }\n",
        "    }\n",
        "CubeCore: its Run() ends without PipeBarrier<PIPE_ALL>()",
    ),
    (_SYNC, f"{_SYNC}        CreateVecIndex(c, 0.0f, 64);\n", "needs a live TPipe"),
    (_SYNC, f"{_SYNC}        Gather(a, b, c);\n", "Gather is in no table"),
    ("LocalTensor<half> a =", "LocalTensor<double> a =", "not (float, double, half)"),
    ("QuantMode_t::F322F16", "QuantMode_t::NoQuant", "Fixpipe takes F322F16"),
    ("RoundMode::CAST_RINT", "RoundMode::CAST_HYBRID", "not HYBRID of"),
    ("P_READY = 1;", "P_READY = 13;", "the flag P_READY = 13 is reserved"),
    ("MTE1_MTE2>(0)", "MTE1_MTE2>(7)", "uses the reserved event id 7"),
    ("TPosition::VECCALC, 0, ", "TPosition::VECCALC, 188416, ", "are the library's: Select"),
    ("FIX_M>(0)", "FIX_V>(0)", "not FIX_V"),
    (_SYNC, f"{_SYNC}        Exp(a, a, 64, 1);\n", "Exp takes (dst, src, count) or"),
]


def test_check_finds_what_the_chip_does_not_have(tmp_path: Path) -> None:
    npu_bridge.emit(CASES["reference, causal"].kernel(), tmp_path)
    source = tmp_path / "pasa_attention.cpp"
    text = source.read_text()
    for old, new, _ in EDITS:
        assert old in text
        text = text.replace(old, new, 1)
    source.write_text(text)
    found = "\n".join(npu_bridge.check(tmp_path))
    assert [message for *_, message in EDITS if message not in found] == []


def test_the_text_tells_the_types_of_tensors() -> None:
    """Of the class, of the function, of a part of one, and of another reading."""
    text = """
__aicore__ inline int32_t Max(int32_t a, int32_t b) { return a > b ? a : b; }
class Core {
    __aicore__ inline void Run() {
        LocalTensor<bfloat16_t> x = LocalTensor<bfloat16_t>(TPosition::VECCALC, 0, 64);
        Exp(x[Max(1, 2) * 8], x, 64);
        Exp(y[8], y, Max(8, 64));  // Exp(x, x, 64)
        Max(y, y, x.ReinterpretCast<half>()[8], 64);
    }
    __aicore__ inline void Other() {
        LocalTensor<half> x = y.ReinterpretCast<half>();
        Exp(x, x, 64);
    }
    LocalTensor<float> y = LocalTensor<float>(TPosition::VECCALC, 128, 64);
};
"""
    lines = [finding.split(" on this chip")[0] for finding in problems(text)]
    assert lines == [
        "line 6: Exp takes half or float",
        "line 8: Max takes half or float or int16_t or int32_t",
    ]
