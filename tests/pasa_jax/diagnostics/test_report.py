"""The report as text, as data, and as a page in a browser."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from pasa_jax import dot_product_attention
from pasa_jax.diagnostics import Report, inspect
from pasa_jax.diagnostics._tables import added

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def report():
    """Three calls of 4, 4 and 2 heads; two heads of the second overflow."""
    q, k = (jnp.asarray(RNG.standard_normal((1, 40, 4, 32)), jnp.float32) for _ in "qk")
    loud = jnp.asarray([0, 1, 0, 1], jnp.float32)[:, None]

    def model():
        dot_product_attention(q, k, k)
        dot_product_attention(q + 60 * loud, k + 90 * loud, k)

    calls = inspect(model).calls
    return Report((*calls, first_heads(calls[0], 2)))


def first_heads(call, count):
    """The call with fewer heads, as a UNet's levels have."""
    cut = {
        f.name: getattr(call, f.name)[:count]
        for f in dataclasses.fields(call)
        if isinstance(getattr(call, f.name), np.ndarray)
    }
    errors = {d: {f: e[:count] for f, e in forms.items()} for d, forms in call.errors.items()}
    return dataclasses.replace(call, **cut, errors=errors)


def test_the_verdict_names_what_overflows(report):
    assert sorted(report.overflowing) == [(1, 1), (1, 3)]
    assert report.heads == 10
    assert re.fullmatch(
        r"2 of 10 heads overflow float16, in report\.<locals>\.model:\d+ \(call 1\): code that "
        r"stores q·k in float16 gives NaN there\.",
        report.verdict,
    )
    assert report.inaccurate("float16") == [(1, 1), (1, 3)]
    assert report.advice[0] == (
        "These heads call `pasa_jax.dot_product_attention`, which is safe as it is."
    )
    assert report.advice[0].replace("`", "") not in report.to_html()
    assert "<li>These heads call <code>pasa_jax.dot_product_attention</code>" in report.to_html()


def test_many_calls_that_overflow_are_counted(report):
    many = Report(report.calls[1:2] * 3)
    assert "in report.<locals>.model:" in many.verdict
    assert "(calls 0, 1, 2): code" in many.verdict
    assert "(calls 0, 1, 2), 1 more: code" in Report(report.calls[1:2] * 4).verdict


def test_a_report_without_trouble(report):
    quiet = Report(report.calls[:1])
    assert quiet.verdict.startswith("No head overflows float16: the largest |q·k| is ")
    assert quiet.advice == []
    assert "good" in quiet.to_html()


def test_json_is_valid_and_whole(report):
    data = json.loads(report.to_json())
    assert [len(call["max_product"]) for call in data["calls"]] == [4, 4, 2]
    assert data["calls"][1]["errors"]["float16"]["eager"][1] is None  # NaN is no JSON
    assert set(data["calls"][0]) == {f.name for f in dataclasses.fields(report.calls[0])}
    assert data["verdict"] == report.verdict


def test_the_tables(report, capsys):
    report.print(rows=2)
    printed = capsys.readouterr().out
    assert "2 of 10 heads overflow float16" in printed
    assert "the 2 loudest of 3 calls" in printed
    assert "2 of 4" in printed
    assert re.search(r"eager +NaN", printed)


def test_what_attention_adds_to_the_cast(report):
    quiet, loud, _ = report.calls
    errors = loud.errors["float16"]
    expected = errors["mean"] / errors["float32 scores"]
    np.testing.assert_allclose(loud.added("float16", "mean"), expected)
    np.testing.assert_array_equal(np.isnan(loud.added("float16", "eager")), loud.overflows)
    np.testing.assert_array_equal(loud.cast_cost("float16"), errors["float32 scores"])
    # Sorted over the heads of all calls, NaN last.
    every = added(report.calls, "float16", "eager")
    assert len(every) == 10
    assert np.isnan(every[-2:]).all()
    assert (np.diff(every[:-2]) >= 0).all()
    equal = {"float16": {form: np.zeros(4) for form in ("float32 scores", "none")}}
    exact = dataclasses.replace(quiet, errors=equal)
    np.testing.assert_array_equal(exact.added("float16", "none"), 1)


# Run in the page: every image has pixels, sorting sorts, the box hides rows.
PROBE = """
<script>
window.addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("#heads tbody tr")];
  const column = i => rows().map(row => Number(row.cells[i].dataset.value));
  const head = document.querySelectorAll("#heads th")[5];
  const out = {ready: document.documentElement.dataset.ready};
  out.loudest = rows()[0].cells[2].textContent;
  head.click(); out.down = column(5);
  head.click(); out.up = column(5);
  document.querySelector("#only").click();
  out.shown = rows().filter(row => row.offsetHeight > 0).length;
  out.images = [...document.images].map(image => image.naturalWidth);
  const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
  out.outside = loaded.filter(name => !name.startsWith("data:"));
  document.body.innerHTML = "<output>" + JSON.stringify(out) + "</output>";
});
</script>
"""


def browse(page, profile):
    """What Chromium makes of a page: the document in the end, and what it logged."""
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync dump-dom "
        "disable-background-networking disable-component-update enable-logging=stderr "
        "virtual-time-budget=5000"
    )
    done = subprocess.run(
        [CHROMIUM, *(f"--{f}" for f in flags.split()), f"--user-data-dir={profile}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")
def test_the_page_in_a_browser(report, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(report.to_html() + PROBE, encoding="utf-8")
    document, log = browse(page, tmp_path / "profile")
    assert "CONSOLE" not in log, log
    found = json.loads(re.search(r"<output>(.*)</output>", document).group(1))
    assert found["ready"] == "yes"
    assert found["loudest"] in ("1", "3")
    assert found["down"] == sorted(found["up"], reverse=True)
    assert len(found["up"]) == 10
    assert found["shown"] == 2
    assert len(found["images"]) == 7
    assert min(found["images"]) > 100
    assert found["outside"] == []


@pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")
def test_an_error_in_a_page_is_seen(tmp_path):
    page = tmp_path / "broken.html"
    page.write_text("<script>undefined_function()</script>")
    assert "CONSOLE" in browse(page, tmp_path / "profile")[1]


def test_the_page_is_the_same_each_time_and_escapes(report):
    assert report.to_html() == report.to_html()
    evil = Report((dataclasses.replace(report.calls[0], name="<script>x</script>"),))
    assert "<script>x" not in evil.to_html()


def test_save(report, tmp_path):
    page, data = report.save(tmp_path / "new" / "folder")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads(data.read_text(encoding="utf-8"))["calls"]


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named(report, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "pasa-jax\[diagnostics\]"'):
        report.to_html()


def test_inspecting_and_printing_need_no_extra():
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'jinja2', 'typer'): sys.modules[name] = None\n"
        "import jax.numpy as jnp\n"
        "from pasa_jax import dot_product_attention\n"
        "from pasa_jax.diagnostics import inspect\n"
        "x = jnp.ones((1, 4, 1, 8))\n"
        "report = inspect(dot_product_attention, x, x, x, error_rows=0)\n"
        "report.print()\n"
        "assert 'verdict' in report.to_json()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
