"""Damaged files are refused by name, at once and in little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason='pip install "pasa-jax[models]"')
pytest.importorskip("gguf", reason='pip install "pasa-jax[models]"')
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux alone"
)
COUNT = 500


def job(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tests.pasa_jax.models.fuzz", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,  # for a file that is read without end
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_damaged_files():
    report = job("fuzz", COUNT)
    assert report["errors"] == []
    assert report["loaded"] + report["refused"] == COUNT
    assert min(report["loaded"], report["refused"]) > COUNT // 20  # of both there are some
    assert report["slowest"] < 10
    assert report["rise"] < 2**26  # the files have 25 kB


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    directory = tmp_path_factory.mktemp("large")
    job("write", directory)
    return directory


@pytest.mark.parametrize("name", [".", "model.gguf"])
def test_memory(name, large):
    """Twice the weights, which are float32: as they are read, and as the model has them.

    What JAX itself takes besides is 10 to 60 MB from run to run; a third copy would be 63 MB more.
    """
    report = job("load", large / name)
    assert report["shape"]
    assert report["rise"] < 2.5 * report["size"] + 2**26
