"""What is lowered for which chip; the compile worker, without a compiler; the tuned tables."""

import contextlib
import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import aot, tune, worker
from pallas_kernels.aot import Compiler
from pallas_kernels.worker import Report
from pasa_jax import Schedule, dot_product_attention
from pasa_jax.core.errors import BackendUnsupported
from pasa_jax.core.schedule import TUNED, Tuned, tuned_for
from tests.thin import some

KERNELS = {"tpu": ("tpu_v6e", "tpu_custom_call"), "cuda": ("h100", "__gpu$xla.gpu.triton")}


def attend(target):
    """Causal attention, scheduled for a chip; nothing is said of the implementation."""
    schedule = Schedule.for_target(target, dtype="bfloat16", length=256, is_causal=True)
    return lambda q, k, v: dot_product_attention(q, k, v, is_causal=True, schedule=schedule)


def total(function):
    return lambda q, k, v: jnp.sum(function(q, k, v).astype(jnp.float32))


def lowered(function, platform):
    x = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.bfloat16)
    with named(platform):
        return jax.jit(function).trace(x, x, x).lower(lowering_platforms=(platform,)).as_text()


def named(platform):
    """JAX 0.12 wants to know for which GPU."""
    return worker.as_if_on("h100") if platform == "cuda" else contextlib.nullcontext()


class TestLowering:
    @pytest.mark.parametrize("chip", KERNELS)
    @pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
    def test_each_platform_gets_its_kernel_and_others_lax(self, chip, platform):
        target, call = KERNELS[chip]
        assert (call in lowered(attend(target), platform)) == (platform == chip)

    @pytest.mark.parametrize("chip", KERNELS)
    @pytest.mark.parametrize(
        "transform",
        some(
            [
                jax.vmap,
                jax.checkpoint,
                nnx.jit,
                lambda f: jax.grad(total(f)),
                lambda f: jax.grad(jax.checkpoint(total(f))),
                lambda f: jax.vmap(jax.grad(total(f))),
            ],
            4,
            3,
        ),
    )
    def test_transforms(self, chip, transform):
        target, call = KERNELS[chip]
        assert call in lowered(transform(attend(target)), chip)

    @pytest.mark.parametrize("chip", KERNELS)
    @pytest.mark.parametrize(
        "options",
        [
            {"segment_ids": np.zeros((2, 256), np.int32)},
            {"mask": np.ones((1, 1, 256, 256), bool)},
            {"bias": np.zeros((1, 2, 1, 256), np.float32), "sinks": np.zeros(2, np.float32)},
            {"key_value_seq_lengths": np.asarray([3, 256]), "local_window_size": 64},
            {"logits_soft_cap": 30.0, "shift": "mean", "return_residual": True},
        ],
    )
    def test_every_kind_of_mask(self, chip, options):
        """What an interpreter takes, a compiler may not: Triton has no reduction by "or"."""
        target, call = KERNELS[chip]
        schedule = Schedule.for_target(target, dtype="bfloat16", length=256)
        name = "pallas_tpu" if chip == "tpu" else "pallas_gpu"

        def function(q, k, v):
            return dot_product_attention(q, k, v, schedule=schedule, implementation=name, **options)

        assert call in lowered(function, chip)

    @pytest.mark.parametrize("chip", KERNELS)
    def test_shard_map_with_types_of_varying_axes(self, chip):
        target, call = KERNELS[chip]
        mesh = Mesh(jax.devices()[:1], ("heads",))
        if chip == "cuda":
            mesh = worker.gpu_mesh(target, heads=1)
        spec = PartitionSpec(None, None, "heads")
        sharded = jax.shard_map(
            attend(target), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True
        )
        assert call in lowered(sharded, chip)
        assert call in lowered(jax.grad(total(sharded)), chip)

    @pytest.mark.parametrize("chip", KERNELS)
    def test_donation(self, chip):
        target, call = KERNELS[chip]
        x = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.bfloat16)
        with named(chip):
            donating = jax.jit(attend(target), donate_argnums=0).trace(x, x, x)
            text = donating.lower(lowering_platforms=(chip,)).as_text()
        assert call in text
        assert "tf.aliasing_output" in text or "jax.buffer_donor" in text

    def test_jax_s_word_on_triton_is_seen_once_at_most(self):
        """By who shows such warnings; jax before 0.11 has none."""
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("default")
            for _ in range(2):
                lowered(attend("h100"), "cuda")
        assert [str(w.message)[:25] for w in seen] in ([], ["The Pallas Triton backend"])

    def test_export_for_one_platform_holds_its_kernel(self):
        x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
        exported = export.export(jax.jit(attend("tpu_v6e")), platforms=("tpu",))(x, x, x)
        assert "tpu_custom_call" in exported.mlir_module()

    def test_export_for_several_platforms_at_once(self):
        """Scheduled for this machine it is lax everywhere, which any platform can run. (JAX lowers
        a Pallas call for every platform of an export, and refuses it on the CPU.)
        """
        x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
        function = jax.jit(lambda q, k, v: dot_product_attention(q, k, v, is_causal=True))
        exported = export.export(function, platforms=("cpu", "tpu", "cuda"))(x, x, x)
        assert exported.platforms == ("cpu", "tpu", "cuda")
        assert "custom_call" not in exported.mlir_module()


class TestCompiler:
    @pytest.fixture
    def worker(self, monkeypatch, tmp_path):
        """Stands in for the process that holds the compilers: dies while it estimates."""

        def install(script):
            path = tmp_path / "worker.py"
            path.write_text(script)
            popen = aot.subprocess.Popen

            def start(command, **options):
                return popen([sys.executable, str(path)], **options)

            monkeypatch.setattr(aot.subprocess, "Popen", start)

        return install

    def test_a_crash_of_the_estimator_costs_the_estimate_only(self, worker):
        worker(
            "import json, os, sys\n"
            "for line in sys.stdin:\n"
            "    if 'static_llo_profile' in os.environ['LIBTPU_INIT_ARGS']: sys.exit(1)\n"
            "    answer = {'target': json.loads(line)['target'], 'bundles': 7}\n"
            "    print(json.dumps(answer), flush=True)\n"
        )
        with Compiler() as compiler:
            assert compiler("module:name", "tpu_7x") == Report("tpu_7x", bundles=7)

    def test_a_compiler_that_dies_is_a_report(self, worker):
        worker("import sys; sys.stdin.readline(); print('out of luck', file=sys.stderr)")
        with Compiler() as compiler:
            report = compiler("module:name", "h100")
        assert report.error == "the compiler crashed: out of luck"

    def test_unknown_chips_are_refused(self):
        with Compiler() as compiler, pytest.raises(ValueError, match="`target` must be one of"):
            compiler("module:name", "cpu")

    def test_reads_what_the_tpu_compiler_writes(self, tmp_path):
        for part in ("tpu", "cycles"):
            (tmp_path / part).mkdir()
        (tmp_path / "cycles" / "pasa_tpu.1_static_llo_profile.textproto").write_text(
            'hlo_op_estimate {\n  hlo_op_name: "pasa_tpu.1"\n  estimated_cycles: 1200\n}\n'
        )
        (
            tmp_path / "tpu" / "17-pasa_tpu.1-00-final_hlo-static-per-bundle-utilization.txt"
        ).write_text(
            "== CAPACITY:\nMXU\n== UTILIZATION:\n0 0 1 0 0 0 2 0 1 0\n1 0 0 0 0 0 1 0 0 0\n"
        )
        found = Report("tpu_v6e", **worker._read_tpu(tmp_path, "tpu_v6e"))
        assert (found.total_cycles, found.bundles, found.fills, found.spills) == (1200, 2, 3, 1)

    def test_reads_what_the_gpu_compilers_write(self, tmp_path, monkeypatch):
        (tmp_path / "gpu").mkdir()
        (tmp_path / "gpu" / "a.ptx").write_text(
            ".visible .entry pasa_gpu(\nwgmma.mma_async.sync.aligned.m64n64k16.f16.f16.f16 {%r1}\n"
            "ex2.approx.f16x2 %r2, %r3;\nex2.approx.f16x2 %r4, %r5;\n"
        )
        (tmp_path / "gpu" / "b.ptx").write_text(
            ".visible .entry pasa_gpu_dq(\ncvt.rn.bf16x2.f32 %r1, %r2, %r3;\n"
        )
        (tmp_path / "gpu" / "jit.pasa_gpu.triton-to-llvm.txt").write_text("ttg.shared = 4096 : i32")
        assembler = tmp_path / "ptxas"
        assembler.write_text(
            "#!/bin/sh\necho '8 bytes spill stores, 12 bytes spill loads' >&2\n"
            "echo 'ptxas info    : Used 168 registers, used 1 barriers' >&2\n"
        )
        assembler.chmod(0o755)
        monkeypatch.setattr(worker, "_ptxas", lambda: str(assembler))
        found = Report("h100", **worker._read_gpu(tmp_path, "h100"))
        assert (found.registers, found.spills, found.fills, found.shared) == (168, 8, 12, 4096)
        assert found.instructions == {
            "wgmma.mma_async.sync.aligned.m64n64k16.f16.f16.f16": 1,
            "ex2.approx.f16x2": 2,
            "cvt.rn.bf16x2.f32": 1,
        }
        assert {name: x["shared"] for name, x in found.kernels.items()} == {
            "pasa_gpu": 4096,
            "pasa_gpu_dq": 0,
        }
        assert found.kernels["pasa_gpu_dq"]["instructions"] == {"cvt.rn.bf16x2.f32": 1}


class TestTuning:
    def test_the_cheapest_candidate_is_written_and_read(self, tmp_path, monkeypatch):
        class Cost:
            unit, source = "cycles", "made up"

            def __init__(self, target):
                pass

            def __call__(self, shape, schedule):
                return abs(schedule.block_q - 1024) + schedule.block_kv

            def close(self):
                pass

        monkeypatch.setattr(tune, "meter", Cost)
        path = tune.tune("tpu_v6e", tmp_path, "bfloat16, D=128, S=2048", say=lambda line: None)
        table = json.loads(path.read_text())
        assert [x["schedule"]["block_q"] for x in table["schedules"]] == [1024, 1024]
        assert Schedule(**table["schedules"][0]["schedule"]).block_kv == 512
        # What is not measured again stays.
        tune.tune("tpu_v6e", tmp_path, "D=64", say=lambda line: None)
        assert len(json.loads(path.read_text())["schedules"]) == 4

    def test_chips_that_are_not_here_have_no_clock(self):
        with pytest.raises(ValueError, match="`target` must be a TPU, or the chip of this machine"):
            tune.meter("h100")

    @pytest.mark.parametrize("target", ["tpu_v6e", "h100"])
    def test_candidates_fit(self, target):
        for shape in tune.shapes("tpu" if target == "tpu_v6e" else "gpu"):
            found = list(tune.candidates(target, shape))
            assert found
            for schedule in found:
                schedule.check(head_dim=shape.head_dim, dtype=shape.dtype)

    @pytest.mark.parametrize("tiles", [(128, 128, 128, 8, 3), (64, 64, 128, 4, 3)])
    def test_tokamax_s_fastest_tiles_of_an_h100_are_candidates(self, tiles):
        size, *schedule = tiles
        shape = tune.Shape("", 2048, size, "bfloat16", is_causal=True)
        found = tune.candidates("h100", shape)
        assert schedule in [[x.block_q, x.block_kv, x.warps, x.stages] for x in found]

    @pytest.mark.parametrize("target", ["tpu_v5e", "tpu_v5p", "tpu_v6e"])
    def test_tables_that_are_shipped(self, target):
        table = json.loads((TUNED / f"{target}.json").read_text())
        assert set(table) == {"target", "cost", "date", "versions", "schedules"}
        found = tuned_for(target)
        shapes, names = tune.shapes("tpu"), {x.shape for x in found}
        assert {x.name for x in shapes if x.window is None} <= names <= {x.name for x in shapes}
        for x in found:
            told = Schedule.for_target(
                target,
                head_dim=x.head_dim,
                dtype=x.dtype,
                length=x.length,
                is_causal=x.is_causal,
                window=x.window,
            )
            assert told == Schedule(**x.schedule)

    def test_the_most_similar_problem_counts(self, monkeypatch):
        def tuned(length, is_causal, block_q):
            return Tuned(
                shape="",
                length=length,
                head_dim=128,
                dtype="bfloat16",
                is_causal=is_causal,
                cost=1,
                schedule={"block_q": block_q, "target": "tpu_v6e"},
            )

        table = (tuned(1024, False, 8), tuned(8192, False, 16), tuned(1024, True, 32))
        monkeypatch.setattr("pasa_jax.core.schedule.tuned_for", lambda target: table)

        def found(**problem):
            return Schedule.for_target("tpu_v6e", dtype="bfloat16", **problem).block_q

        assert found(length=1500) == 8
        assert found(length=7000) == 16
        assert found(length=7000, is_causal=True) == 32


def test_names_that_no_kernel_supports_say_so():
    x = jnp.zeros((1, 8, 1, 16), jnp.float32)
    with pytest.raises(BackendUnsupported, match="its schedule would have to be for a GPU"):
        dot_product_attention(x, x, x, implementation="pallas_gpu")
