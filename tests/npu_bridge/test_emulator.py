"""The emulator of AscendC: what its instructions compute, and that it finds what is wrong."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.thin import only

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++")


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Compiles a kernel once and gives its program."""
    directory = tmp_path_factory.mktemp("emulator")

    def compiled(name):
        program = directory / name
        if not program.exists():
            source = Path(__file__).parent / "emulator" / f"{name}.cpp"
            include = f"-I{ROOT / 'npu_bridge' / 'emulator'}"
            # The tests are small: compiling costs more than running.
            flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror"]
            subprocess.run([COMPILER, *flags, include, source, "-o", program], check=True)
        return program

    return compiled


def emulate(program, directory, arguments, *options, blocks=1, policies=("all",)):
    """Runs a job of (name, role, array or shape) and returns its report and its outputs."""
    lines = [f"blocks {blocks}", f"report {directory / 'report'}"]
    lines += [f"policy {policy}" for policy in policies]
    for name, role, value in arguments:
        path = directory / name
        if role == "in":
            value.tofile(path)
        lines.append(f"arg {name} {role} {value.nbytes} {path}")
    job = directory / "job"
    job.write_text("\n".join(lines))
    code = subprocess.run([program, job, *map(str, options)]).returncode
    report = json.loads((directory / "report").read_text())
    assert code == (1 if report["total"] else 0)
    results = {
        name: np.fromfile(directory / name, value.dtype).reshape(value.shape)
        for name, role, value in arguments
        if role == "out"
    }
    return report, results


@pytest.fixture
def instruct(build, tmp_path):
    """Runs one kernel of instructions.cpp and returns its output; it must give no complaint."""

    def run(name, a, b, out, shape=(0, 0, 0), **settings):
        arguments = [("a", "in", a), ("b", "in", b)]
        arguments += [("shape", "in", np.array(shape, np.int32)), ("out", "out", out)]
        program = build("instructions")
        report, results = emulate(program, tmp_path, arguments, name, **settings)
        assert report["complaints"] == []
        return results["out"]

    return run


def to_bfloat16(x):
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def numbers(dtype, shape, seed=0, low=-4, high=4):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(dtype)


@pytest.mark.parametrize("dtype", only([np.float16], [np.float16, np.float32]))
def test_arithmetic(instruct, dtype):
    a, b = numbers(dtype, 256), numbers(dtype, 256, 1, 0.1, 4)
    name = "arithmetic_" + ("half" if dtype == np.float16 else "float")
    out = instruct(name, a, b, np.empty((17, 256), dtype))
    x, y = a.astype(np.float64), b.astype(np.float64)
    expected = [np.exp(x), np.log(y), abs(x), np.sqrt(y), 1 / np.sqrt(y), 1 / y, np.maximum(x, 0)]
    expected += [x + y, x - y, x * y, x / y, np.maximum(x, y), np.minimum(x, y)]
    expected += [x * 0.9375, x + 0.9375, np.maximum(x, 0.5), np.minimum(x, 0.5)]
    np.testing.assert_array_equal(out, np.array(expected).astype(dtype))


def test_integers(instruct):
    a, b = numbers(np.int16, 256, 0, -30000, 30000), numbers(np.int16, 256, 1, -30000, 30000)
    out = instruct("integers", a, b, np.empty((4, 256), np.int16))
    total = np.clip(a.astype(int) + b, -32768, 32767)
    np.testing.assert_array_equal(out, [~a, a & b, a | b, total])


def test_strides_and_masks(instruct):
    x, y = numbers(np.float32, (8, 128)), numbers(np.float32, 1024, 1)
    out = instruct("strides", x, y, np.empty(4096, np.float32))
    np.testing.assert_array_equal(out[:1024].reshape(8, 128), x - y[:8, None])
    columns = np.where(np.arange(128) < 40, 2 * x, 0)
    np.testing.assert_array_equal(out[1024:2048].reshape(8, 128), columns)
    odd = np.where(np.arange(256) % 2, x.reshape(-1)[:256] + 1, 0)
    np.testing.assert_array_equal(out[2048:2304], odd)
    # Two repeats of eight blocks, each second block.
    spread = np.tile(np.repeat([3, 0], 8), 16)
    np.testing.assert_array_equal(out[3072:3328], spread)
    np.testing.assert_array_equal(out[3584:3648], 2 * x.reshape(-1)[:64])
    total = np.zeros(64, np.float32)
    for row in x.reshape(-1, 64)[:4]:
        total += row
    np.testing.assert_array_equal(out[3840:3904], total)
    np.testing.assert_array_equal(out[3904:3968], np.repeat(y[:8], 8))
    np.testing.assert_array_equal(out[3968:3976], 0)
    np.testing.assert_array_equal(out[3976:4040], np.repeat(y[8:16], 8))


def tree_sum(x):
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_reductions(instruct, dtype):
    lanes = 256 // np.dtype(dtype).itemsize
    x = numbers(dtype, (8, lanes))
    name = "reductions_" + ("half" if dtype == np.float16 else "float")
    out = instruct(name, x, x, np.empty((16, lanes), dtype))
    np.testing.assert_array_equal(out[0, :8], x.max(1))
    np.testing.assert_array_equal(out[1, :8], x.min(1))
    np.testing.assert_array_equal(out[2, :8], tree_sum(x))
    kept = np.where(np.arange(lanes) < lanes - 5, x, 0)
    np.testing.assert_array_equal(out[3, :16:2], tree_sum(kept))
    np.testing.assert_array_equal(out[3, 1:16:2], 0)
    index = np.uint16 if dtype == np.float16 else np.uint32
    np.testing.assert_array_equal(out[4, :16:2], x.max(1))
    np.testing.assert_array_equal(out[4, 1:16:2].copy().view(index), x.argmax(1))
    blocks = x.reshape(8, 8, -1)
    np.testing.assert_array_equal(out[5, :64], blocks.max(2).reshape(-1))
    np.testing.assert_array_equal(out[6, :64], blocks.min(2).reshape(-1))
    np.testing.assert_array_equal(out[7, :64], tree_sum(blocks).reshape(-1))
    pairs = (x[:, ::2] + x[:, 1::2]).reshape(-1)
    np.testing.assert_array_equal(out[8:].reshape(-1)[: pairs.size], pairs)


def rounded(x, grid_below, grid_above, is_odd):
    """The five rounding modes and to odd, from the neighbours on the grid of the result."""
    below, above = grid_below.astype(np.float64), grid_above.astype(np.float64)
    down = x - below < above - x
    tie = x - below == above - x
    nearest = np.where(down | (tie & ~is_odd(grid_below)), below, above)
    away = np.where(down | (tie & (x < 0)), below, above)
    odd = np.where(is_odd(grid_below) | (below == x), below, above)
    return np.array([nearest, below, above, away, np.where(x < 0, above, below), odd])


def integer_modes(x):
    x = x.astype(np.float64)
    return rounded(x, np.floor(x), np.ceil(x), lambda v: v % 2 != 0)


SAMPLES = np.concatenate(
    [
        numbers(np.float32, 200, 5, -100, 100),
        np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0, 1, -3, 7.25], np.float32),
        np.array([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, 2**-20, -(2**-24)], np.float32),
        np.array([2**-25, 3 * 2**-25, 65000, 65503, -65503, 1 + 2**-8], np.float32),
    ]
)
SAMPLES = np.concatenate([SAMPLES, numbers(np.float32, 256 - SAMPLES.size, 6, -1e-6, 1e-6)])


def test_cast_to_half(instruct):
    out = instruct("float_to_half", SAMPLES, SAMPLES, np.empty((6, 256), np.float16))
    x = SAMPLES.astype(np.float64)
    near = x.astype(np.float16)
    with np.errstate(over="ignore", under="ignore"):
        below = np.where(near > x, np.nextafter(near, np.float16(-np.inf)), near)
        above = np.where(near < x, np.nextafter(near, np.float16(np.inf)), near)
    expected = rounded(x, below, above, lambda v: v.view(np.uint16) % 2 == 1)
    np.testing.assert_array_equal(out.astype(np.float64), expected)


def test_cast_overflows(instruct):
    x = np.resize(np.array([65519, 65520, -1e6, np.inf, np.nan], np.float32), 256)
    out = instruct("float_to_half", x, x, np.empty((6, 256), np.float16))[:, :5]
    np.testing.assert_array_equal(out[0], [65504, np.inf, -np.inf, np.inf, np.nan])
    np.testing.assert_array_equal(out[4], [65504, 65504, -65504, np.inf, np.nan])


def test_cast_to_bfloat16(instruct):
    out = instruct("float_to_bfloat16", SAMPLES, SAMPLES, np.empty((6, 256), np.uint16))
    np.testing.assert_array_equal(out[0], to_bfloat16(SAMPLES))
    towards_zero = (SAMPLES.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(out[4], towards_zero)


@pytest.mark.parametrize("name", ["float_to_int32", "float_to_float", "half_to_int8"])
def test_cast_to_integers(instruct, name):
    source, result = {
        "float_to_int32": (np.float32, np.int32),
        "float_to_float": (np.float32, np.float32),
        "half_to_int8": (np.float16, np.int8),
    }[name]
    x = SAMPLES.astype(source)
    out = instruct(name, x, x, np.empty((6, 256), result))
    expected = integer_modes(x)[:5]
    if result == np.int8:
        expected = np.clip(expected, -128, 127)
    np.testing.assert_array_equal(out[:5], expected.astype(result))


def test_exact_casts(instruct):
    out = np.empty(256, np.float32)
    x = numbers(np.float16, 256)
    np.testing.assert_array_equal(instruct("half_to_float", x, x, out), x)
    x = to_bfloat16(numbers(np.float32, 256))
    np.testing.assert_array_equal(instruct("bfloat16_to_float", x, x, out), from_bfloat16(x))
    x = numbers(np.int32, 256, 0, -(2**30), 2**30)
    np.testing.assert_array_equal(instruct("int32_to_float", x, x, out), x.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_compare_and_select(instruct, dtype):
    a, b = numbers(dtype, 256), numbers(dtype, 256, 1)
    b[::3] = a[::3]
    name = "compare_select_" + ("half" if dtype == np.float16 else "float")
    out = instruct(name, a, b, np.empty((9, 256), dtype))
    masks = [a < b, a > b, a == b, a <= b, a >= b, a != b]
    for row, mask in zip(out, masks, strict=False):
        np.testing.assert_array_equal(row, np.where(mask, a, b))
    np.testing.assert_array_equal(out[6], np.where(a > 0.5, a, -1))
    np.testing.assert_array_equal(out[7], np.where(a > 0.5, a, b))
    lanes = 256 // a.itemsize
    first = np.tile(a[:lanes] > 0.5, 256 // lanes)
    np.testing.assert_array_equal(out[8], np.where(first, a, b))


def test_padded_copy(instruct):
    # Rows of 10 numbers, 2 apart; in UB each takes one block, and the next is free.
    x = np.arange(48, dtype=np.float16).reshape(4, 12)
    report = instruct("padded_copy", x, x, np.empty(112, np.float16))
    np.testing.assert_array_equal(report[:40].reshape(4, 10), x[:, :10])
    padded = np.pad(x[:, :10], ((0, 0), (0, 6)), constant_values=-1)
    np.testing.assert_array_equal(report[48:].reshape(4, 16), padded)


@pytest.mark.parametrize("shape", [(16, 16, 16), (64, 128, 64), (33, 48, 40), (5, 17, 23)])
@pytest.mark.parametrize("kind", ["half", "half_transposed", "bfloat16", "float"])
def test_matmul(instruct, kind, shape):
    m, n, k = shape
    transposed = kind in ("half_transposed", "bfloat16")
    a, b = numbers(np.float32, (m, k)), numbers(np.float32, (k, n) if transposed else (n, k), 1)
    out = np.empty((m, n), {"half_transposed": np.float16, "bfloat16": np.uint16}.get(kind, "f4"))
    if kind.startswith("half"):
        a, b = a.astype(np.float16), b.astype(np.float16)
    if kind == "bfloat16":
        a, b = to_bfloat16(a), to_bfloat16(b)
    result = instruct(f"matmul_{kind}", a, b, out, shape)
    if kind == "bfloat16":
        a, b, result = from_bfloat16(a), from_bfloat16(b), from_bfloat16(result)
    exact = 2 * (a.astype(np.float64) @ (b if transposed else b.T).astype(np.float64))
    rounding = {"half_transposed": 2**-11, "bfloat16": 2**-8}.get(kind, 2**-20)
    np.testing.assert_allclose(result, exact, rtol=rounding, atol=1e-4)


@pytest.mark.parametrize("kernel", ["sync_vectors", "sync_everyone"])
def test_sync_all(instruct, kernel):
    x = np.zeros(8, np.float32)
    out = instruct(kernel, x, x, np.empty((2, 6, 8), np.float32), blocks=3)
    np.testing.assert_array_equal(out[0, :, 0], np.arange(6))
    np.testing.assert_array_equal(out[1, :, 0], (np.arange(6) + 1) % 6)


DEFECTS = {
    "missing_barrier": "race",
    "missing_flag": "race",
    "race_between_cores": "race",
    "accumulate_without_barrier": "race",
    "overlapping_stores": "race",
    "scalar_store": "race",
    "scalar_store_after_vector": "race",
    "scalar_store_to_global": "race",
    "no_state": "state",
    "late_state": "state",
    "no_end": "end",
    "after_the_end": "end",
    "index_by_tpipe": "tpipe",
    "over_the_scratch": "scratch",
    "deadlock": "deadlock",
    "cross_deadlock": "deadlock",
    "double_set": "double set",
    "left_over_flag": "left over",
    "cross_left_over": "left over",
    "cross_counter": "counter",
    "cross_reserved": "flag id",
    "event_reserved": "event id",
    "event_of_no_pipe": "pipe",
    "scalar_barrier": "pipe",
    "pipe_of_other_core": "pipe",
    "capacity": "bounds",
    "tensor_bounds": "bounds",
    "global_bounds": "bounds",
    "buffer_bounds": "bounds",
    "null_buffer": "bounds",
    "unaligned": "alignment",
    "unaligned_fractal": "alignment",
    "odd_maximum": "alignment",
    "uninitialised": "uninitialised",
    "uninitialised_global": "uninitialised",
    "read_only": "read-only",
    "narrow_repeat": "field",
    "narrow_stride": "field",
    "narrow_block_length": "field",
    "wide_mask": "field",
    "odd_length": "field",
    "partial_repeat": "field",
    "no_such_rounding": "field",
    "repeat_0": "field",
    "count_0": "field",
    "load_0": "field",
    "copy_0": "field",
    "long_copy": "field",
    "many_rows": "field",
    "row_stride": "field",
    "tall_product": "field",
    "tall_result": "field",
    "integers_in_order": "field",
    "quantisation": "field",
    "partial_overlap": "overlap",
    "written_twice": "overlap",
    "vector_memory_on_cube": "memory",
    "cube_memory_on_vector": "memory",
    "wrong_memory": "memory",
    "scalar_read": "scalar",
    "scalar_read_of_nothing": "uninitialised",
    "scalar_read_too_early": "race",
    "scalar_cache": "cache",
}


def run_defect(build, directory, name):
    arguments = [
        ("in", "in", numbers(np.float32, 1024)),
        ("out", "out", np.empty(1024, np.float32)),
        ("space", "in" if "accumulate" in name else "workspace", np.zeros(1024, np.float32)),
    ]
    return emulate(build("defects"), directory, arguments, name)


@pytest.mark.parametrize("name", DEFECTS)
def test_finds(build, tmp_path, name):
    report, _ = run_defect(build, tmp_path, name)
    found = [complaint for complaint in report["complaints"] if complaint["kind"] == DEFECTS[name]]
    assert found
    if DEFECTS[name] != "deadlock":
        assert found[0]["where"].startswith("defects.cpp:")


def test_says_where(build, tmp_path):
    source = (Path(__file__).parent / "emulator" / "defects.cpp").read_text().splitlines()
    line = {text.strip(): number for number, text in enumerate(source, 1)}
    report, _ = run_defect(build, tmp_path, "missing_barrier")
    complaint = report["complaints"][0]
    assert (complaint["instruction"], complaint["core"]) == ("Muls", "AIV0.0")
    assert complaint["where"] == f"defects.cpp:{line['Muls(x, x, 2.f, kCount);']}"
    assert f"Exp (defects.cpp:{line['Exp(x, x, kCount);']}, AIV0.0 PIPE_V)" in complaint["text"]


def test_names_what_is_stuck(build, tmp_path):
    report, _ = run_defect(build, tmp_path, "cross_deadlock")
    text = report["complaints"][0]["text"]
    assert "AIC0 PIPE_S stands at CrossCoreWaitFlag" in text
    assert "for flag 1" in text
    assert "AIC0 PIPE_MTE2 stands at an instruction behind PIPE_S: DataCopy" in text


SOUND = [
    "none",
    "none_through_memory",
    "none_accumulate",
    "none_scalar_store",
    "none_scalar_store_to_global",
    "none_scalar_wait",
    "none_scalar_look",
]


@pytest.mark.parametrize("name", SOUND)
def test_is_silent(build, tmp_path, name):
    report, results = run_defect(build, tmp_path, name)
    assert report["complaints"] == []
    assert len(report["policies"]) == 13
    if name == "none_scalar_look":
        x = numbers(np.float32, 1024)[:16]
        np.testing.assert_array_equal(results["out"][:16], x * x[0])
    if name == "none":
        expected = 2 * np.exp(numbers(np.float32, 1024).astype(np.float64))
        np.testing.assert_allclose(results["out"], expected, rtol=2e-7)
        assert report["unwritten"] == {"out": 0}
        assert report["bytes"]["UB"] == 1024
        assert report["instructions"]["AIV PIPE_V"] == 2 * 4 * 5


def attention(build, directory, *options, policies):
    query, key = numbers(np.float16, (128, 64)), numbers(np.float16, (256, 64), 1)
    value = numbers(np.float16, (256, 64), 2)
    arguments = [("query", "in", query), ("key", "in", key), ("value", "in", value)]
    arguments += [("out", "out", np.empty((128, 64), np.float32))]
    arguments += [("space", "workspace", np.empty(2 * 65536, np.uint8))]
    program = build("attention_prototype")
    report, results = emulate(program, directory, arguments, *options, blocks=2, policies=policies)
    scores = query.astype(np.float64) @ key.astype(np.float64).T / 8
    weights = np.exp(scores - scores.max(1, keepdims=True))
    expected = weights / weights.sum(1, keepdims=True) @ value.astype(np.float64)
    return report, results["out"], expected


def test_attention(build, tmp_path):
    report, out, expected = attention(build, tmp_path, policies=["all"])
    assert report["complaints"] == []
    np.testing.assert_allclose(out, expected, atol=2e-3)


@pytest.mark.full
@pytest.mark.parametrize("third", only([0], range(3)))
def test_attention_needs_every_flag(build, tmp_path, third):
    program = build("attention_prototype")
    count = int(subprocess.run([program], capture_output=True, text=True, check=True).stdout)
    policies = ["round_robin"]
    silent = [
        i
        for i in range(third, count, 3)
        if not attention(build, tmp_path, i, policies=policies)[0]["total"]
    ]
    assert count == 59
    assert silent == []
