"""The projects around an emitted kernel: that they are whole, compile, and run where they can."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from npu_bridge import interface
from npu_bridge.emulation import EMULATOR, constants, expected, problem
from npu_bridge.functions import functions_of, shaped
from npu_bridge.program import build
from npu_bridge.project import files, write
from npu_bridge.specification import Kernel
from pasa_jax.core.errors import PlanError
from pasa_jax.core.precision import Precision
from pasa_jax.core.schedule import Schedule
from tests import gallery
from tests.npu_bridge.functions_cases import positions_mod

STUBS = Path(__file__).parent / "stubs"
COMPILER = shutil.which("g++")
CMAKE = shutil.which("cmake")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="compiles C++: needs g++")

PLAIN = Kernel(
    head_dim=64,
    value_head_dim=64,
    dtype="bfloat16",
    shift="none",
    precision=Precision.named("bfloat16"),
    schedule=Schedule(block_q=128, block_kv=128, target="ascend_910b"),
)
FUNCTIONS = functions_of(
    positions_mod,
    gallery.alibi_mod,
    shaped("int32:BT"),
    (shaped("int32:BS"), shaped("bool:S")),
    {"slope": shaped("float32:N")},
)
# Every argument that a kernel can have.
FULL = replace(
    PLAIN,
    dtype="float16",
    shift="paper",
    precision=Precision.named("float16"),
    bias="1NTS",
    mask_axes="B1TS",
    segments=True,
    sinks=True,
    lengths=True,
    return_lse=True,
    functions=FUNCTIONS,
)
PACKED = replace(PLAIN, packed=True, sinks=True, return_lse=True, dtype="float16", repair=False)
PACKED = replace(PACKED, precision=Precision.named("float16"))
LISTED = replace(PLAIN, functions=FUNCTIONS, visits="1N", repair=False)
KERNELS = {"plain": PLAIN, "full": FULL, "packed": PACKED, "lists of tiles": LISTED}
# What is run: the inputs of a file each and those that the host fills itself.
RUN = replace(FULL, bias=None)
SIZES = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 20, "keys": 200}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(FULL, tmp_path_factory)


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    return written(PACKED, tmp_path_factory)


@pytest.fixture(scope="module")
def listed_folder(tmp_path_factory):
    return written(LISTED, tmp_path_factory)


def written(kernel, tmp_path_factory):
    place = tmp_path_factory.mktemp("project")
    write(build(kernel), place)
    return place


def compile_cpp(*options, include=()):
    folders = [f"-I{place}" for place in (STUBS, EMULATOR, *include)]
    said = subprocess.run(
        # The kernel names bounds of its loop that it may not need.
        [COMPILER, "-std=c++17", "-Wall", "-Wno-unused-variable", "-Werror", *folders, *options],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr[:4000]


# What is written.


@pytest.mark.parametrize("name", KERNELS)
def test_emitted_twice_is_the_same(name):
    assert files(build(KERNELS[name])) == files(build(KERNELS[name]))


@pytest.mark.parametrize("name", KERNELS)
def test_the_readme_names_every_file_and_argument(name):
    program = build(KERNELS[name])
    texts = files(program)
    named = re.findall(r"`([^`\n]+)`", texts["README.md"])
    assert set(texts) - {"README.md"} <= set(named)
    assert set(interface.arguments(program.kernel)) <= set(named)
    assert {path for path in named if re.fullmatch(r"package/\S+", path)} <= set(texts)


def test_the_package_carries_the_same_kernel():
    texts = files(build(FULL))
    kernel = "package/op_kernel/pasa_attention_kernel.h"
    assert texts[kernel] == texts["pasa_attention.cpp"]
    for name in ("tiling.h", "make_tiling.h"):
        assert texts[f"package/op_kernel/{name}"] == texts[name]


def test_the_preset_is_json_and_names_the_chips():
    preset = json.loads(files(build(PLAIN))["package/CMakePresets.json"])
    variables = preset["configurePresets"][0]["cacheVariables"]
    assert variables["ASCEND_COMPUTE_UNIT"]["value"] == "ascend910b;ascend910_93"


def test_constants_are_there_for_the_shift_that_has_them():
    assert "paper_constants.h" not in files(build(PLAIN))
    assert "paper_constants.h" in files(build(FULL))


def test_a_target_without_such_a_project_is_refused():
    kernel = replace(PLAIN, schedule=replace(PLAIN.schedule, target="ascend_310p"))
    with pytest.raises(PlanError) as error:
        interface.values(kernel)
    assert str(error.value) == (
        "`schedule.target` must be one of ascend_910b, ascend_950; got ascend_310p"
    )


# What the host's program does.


@needs_compiler
@pytest.mark.parametrize("beta", [None, 0.9375])
def test_constants_of_paper_are_those_of_lax(tmp_path, beta):
    kernel = replace(FULL, beta=beta)
    write(build(kernel), tmp_path)
    (tmp_path / "fill.cpp").write_text("""
        #include <cstdio>
        #include <cstdlib>
        #include <vector>
        #include "paper_constants.h"
        int main(int, char** argv) {
            const int64_t n = PASA_BLOCK_KV, keys = std::atoi(argv[1]);
            std::vector<uint16_t> matrices(2 * n * n);
            std::vector<float> weights(2 * n);
            PasaFillMatrices(matrices.data(), keys);
            PasaFillWeights(weights.data(), keys);
            std::fwrite(matrices.data(), 2, matrices.size(), stdout);
            std::fwrite(weights.data(), 4, weights.size(), stdout);
        }
    """)
    compile_cpp(tmp_path / "fill.cpp", "-o", tmp_path / "fill")
    for keys in (1, 2, 3, 77, 127, 128, 129, 200, 255, 256, 1000):
        said = subprocess.run([tmp_path / "fill", str(keys)], capture_output=True, check=True)
        want = constants(kernel, keys)
        assert said.stdout == want["matrices"].tobytes() + want["weights"].tobytes(), keys


@needs_compiler
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_on_the_host(tmp_path, dtype):
    kernel = FULL if dtype == "float16" else PLAIN
    write(build(kernel), tmp_path)
    (tmp_path / "numbers.cpp").write_text("""
        #include "host.h"
        int main() {
            for (int bits = 0; bits < 1 << 16; ++bits) {
                const double x = PasaToDouble(uint16_t(bits));
                const bool normal = std::fabs(x) >= std::ldexp(1, 1 - PASA_EXPONENT_BIAS);
                if (normal && std::isfinite(x) && PasaBits(x) != bits) return 1;
                const float narrow = static_cast<float>(x);
                std::fwrite(&narrow, sizeof narrow, 1, stdout);
            }
        }
    """)
    compile_cpp(tmp_path / "numbers.cpp", "-o", tmp_path / "numbers")
    said = subprocess.run([tmp_path / "numbers"], capture_output=True, check=True)
    want = np.arange(1 << 16, dtype=np.uint16).view(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(np.frombuffer(said.stdout, np.float32), want)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return launchable(written(RUN, tmp_path_factory))


@pytest.fixture(scope="module")
def packed_program(packed_folder):
    return launchable(packed_folder)


def launchable(folder):
    """main.cpp as older toolkits build it, with the emulator behind the launch."""
    parts = []
    # Compiling costs more than running: nothing is optimised.
    for source in (folder / "main.cpp", STUBS / "device.cpp"):
        parts.append(folder / f"{source.stem}.o")
        compile_cpp("-DPASA_OLD_TOOLKIT", "-c", source, "-o", parts[-1], include=[folder])
    compile_cpp(*parts, "-o", folder / "launch")
    return folder / "launch"


def launch(program, work, *extra, given=SIZES, **environment):
    sizes = [str(given[x]) for x in ("batch", "heads", "kv_heads", "queries", "keys")]
    return subprocess.run(
        [program, *sizes, *extra],
        cwd=work,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@needs_compiler
def test_the_host_program_end_to_end(program, tmp_path):
    inputs = problem(RUN, **SIZES)
    want, want_lse = expected(RUN, inputs)
    for name, x in inputs.items():
        (tmp_path / f"{name}.bin").write_bytes(np.asarray(x).tobytes())
    (tmp_path / "expected.bin").write_bytes(np.asarray(want).tobytes())
    said = launch(program, tmp_path)
    assert said.returncode == 0, said.stderr
    assert "as expected" in said.stdout
    assert "launched on 2 cube cores" in said.stdout
    output = np.fromfile(tmp_path / "output.bin", np.float16).reshape(want.shape)
    np.testing.assert_allclose(output, np.asarray(want), atol=2 * 2**-10)
    lse = np.fromfile(tmp_path / "lse.bin", np.float32).reshape(want_lse.shape)
    np.testing.assert_allclose(lse, np.asarray(want_lse), atol=1e-2)

    wrong = np.asarray(want).copy()
    wrong.flat[7] += np.float16(0.25)
    (tmp_path / "expected.bin").write_bytes(wrong.tobytes())
    said = launch(program, tmp_path)
    assert said.returncode == 1
    assert re.search(r"largest difference 0\.2\d+, tolerance .*: WRONG", said.stdout)


@needs_compiler
def test_the_host_program_draws_what_is_missing(program, tmp_path):
    said = launch(program, tmp_path)
    assert said.returncode == 0, said.stderr
    assert "query: drawn, query.bin is not there" in said.stdout
    assert "no expected.bin to compare with" in said.stdout
    output = np.fromfile(tmp_path / "output.bin", np.float16)
    assert output.size == 2 * 20 * 64
    assert 0 < np.abs(output.astype(np.float32)).max() <= 1


@needs_compiler
@pytest.mark.parametrize(
    ("extra", "environment", "message"),
    [
        (["0.25"], {}, "the shift 'paper' holds 1/sqrt(D) in its matrix: no other scale"),
        (["x"], {}, "`SCALE` must be a finite number; got x"),
        (["0.125", "3"], {}, "`CORES` must be at most the device's 2; got 3"),
        ([], {"FAKE_ACL_FAIL": "aclrtMalloc"}, "aclrtMalloc(&at, bytes > 0 ? bytes : 32, "),
        ([], {"FAKE_ACL_FAIL": "aclrtSetDevice"}, "failed with code 507899"),
    ],
)
def test_the_host_program_says_what_is_wrong(program, tmp_path, extra, environment, message):
    said = launch(program, tmp_path, *extra, **environment)
    assert said.returncode == 2
    assert message in said.stderr


@needs_compiler
def test_the_host_program_checks_its_files(program, tmp_path):
    (tmp_path / "key.bin").write_bytes(bytes(10))
    said = launch(program, tmp_path)
    assert said.returncode == 2
    assert said.stderr == "key.bin must have 25600 bytes for [B, S, K, D] float16; it has 10\n"


TOTALS = {"batch": 3, "heads": 2, "kv_heads": 1, "queries": 27, "keys": 139}


@pytest.mark.full
@needs_compiler
def test_the_host_program_of_packed_sequences(packed_program, tmp_path):
    inputs = problem(PACKED, queries=(20, 0, 7), keys=(130, 9, 0))
    want, want_lse = expected(PACKED, inputs)
    for name, x in inputs.items():
        (tmp_path / f"{name}.bin").write_bytes(np.asarray(x).tobytes())
    (tmp_path / "expected.bin").write_bytes(np.asarray(want).tobytes())
    said = launch(packed_program, tmp_path, given=TOTALS)
    assert said.returncode == 0, said.stderr
    assert "as expected" in said.stdout
    lse = np.fromfile(tmp_path / "lse.bin", np.float32).reshape(want_lse.shape)
    np.testing.assert_allclose(lse, np.asarray(want_lse), atol=1e-2)

    for offsets in ([0, 130, 120, 139], [1, 130, 139, 139], [0, 130, 139, 140]):
        (tmp_path / "keyOffsets.bin").write_bytes(np.asarray(offsets, np.int32).tobytes())
        said = launch(packed_program, tmp_path, given=TOTALS)
        assert said.returncode == 2
        assert said.stderr == "keyOffsets must grow from 0 to 139\n"


@needs_compiler
def test_a_missing_list_visits_all_tiles(tmp_path):
    write(build(LISTED), tmp_path)
    (tmp_path / "lists.cpp").write_text("""
        #include "host.h"
        int main() {
            const PasaRun run{1, 2, 1, 300, 280, 1.0f, 0};
            std::vector<PasaArray> arrays = PasaArrays(run);
            PasaFillInputs(arrays, run);
            for (const PasaArray& a : arrays) {
                if (std::strcmp(a.name, "visits") != 0) continue;
                std::fwrite(a.bytes.data(), 1, a.bytes.size(), stderr);
            }
        }
    """)
    compile_cpp(tmp_path / "lists.cpp", "-o", tmp_path / "lists")
    said = subprocess.run([tmp_path / "lists"], cwd=tmp_path, capture_output=True, check=True)
    visits = np.frombuffer(said.stderr, np.int32).reshape(1, 2, 3, 4)
    np.testing.assert_array_equal(visits, np.broadcast_to([3, 0, 2, 4], visits.shape))


@needs_compiler
def test_the_host_program_draws_sequences(packed_program, tmp_path):
    said = launch(packed_program, tmp_path, given=TOTALS)
    assert said.returncode == 0, said.stderr
    assert "queryOffsets: drawn, queryOffsets.bin is not there" in said.stdout
    output = np.fromfile(tmp_path / "output.bin", np.float16)
    assert output.size == 27 * 2 * 64
    assert 0 < np.abs(output.astype(np.float32)).max() <= 1


# What can only be compiled.

both = pytest.mark.parametrize(
    "which",
    ["folder", "packed_folder", pytest.param("listed_folder", marks=pytest.mark.full)],
)


@needs_compiler
@both
def test_the_newer_toolkits_launch_compiles(request, which):
    """With a plain call in the place of `<<<…>>>`, which only CANN's compiler knows."""
    folder = request.getfixturevalue(which)
    text = (folder / "main.cpp").read_text()
    plain, count = re.subn(r"pasa_attention<<<cores, nullptr, stream>>>", "pasa_attention", text)
    assert count == 1
    (folder / "plain.cpp").write_text(plain)
    compile_cpp("-fsyntax-only", folder / "plain.cpp")


@needs_compiler
@both
def test_the_operator_package_compiles(request, which):
    folder = request.getfixturevalue(which)
    package = folder / "package"
    compile_cpp("-fsyntax-only", package / "op_host" / "pasa_attention.cpp")
    compile_cpp("-fsyntax-only", package / "examples" / "aclnn_call.cpp", include=[folder])
    entry = package / "op_kernel" / "pasa_attention.cpp"
    compile_cpp("-fsyntax-only", "-include", "operator_kernel.h", entry)


@needs_compiler
@pytest.mark.skipif(CMAKE is None, reason="configures a project: needs cmake")
def test_the_emulator_is_a_target_without_cann(folder, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "ASCEND_HOME_PATH"}
    configure = [CMAKE, "-S", folder, "-B", tmp_path, f"-DPASA_EMULATOR={EMULATOR}"]
    subprocess.run(configure, env=environment, check=True, capture_output=True)
    targets = subprocess.run(
        [CMAKE, "--build", tmp_path, "--target", "help"], capture_output=True, text=True
    ).stdout
    assert "emulate" in targets
    assert "pasa_attention_check" not in targets
