"""Words and frames beside float32's, and the page of them in a browser."""

import re
import shutil
import subprocess

import jax
import numpy as np
import pytest

from examples.neighbours import story
from tests.weights import needs_smollm2

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium")
# What the browser sees of the page, as text in it.
PROBE = """<output></output><script>
addEventListener("load", () => {
  const images = [...document.images]
  const found = {
    images: images.length, drawn: images.filter(x => x.complete && x.naturalWidth > 4).length,
    same: document.querySelectorAll(".same").length,
    other: document.querySelectorAll(".other").length,
    outside: performance.getEntriesByType("resource")
      .filter(x => !x.name.startsWith("data:")).length
  }
  document.querySelector("output").textContent = JSON.stringify(found)
})
</script>"""


def browse(html, folder):
    """What `PROBE` finds in the page, and the browser's log."""
    page = folder / "page.html"
    page.write_text(html + PROBE, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom"
    done = subprocess.run(
        [str(CHROMIUM), *flags.split(), f"--user-data-dir={folder / 'profile'}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    text = re.search(r"<output>(.*)</output>", done.stdout).group(1)
    return {name: int(count) for name, count in re.findall(r'"(\w+)":(\d+)', text)}, done.stdout


@needs_browser
def test_the_page_in_a_browser(tmp_path):
    """Two schemes of two words and two frames each; one of the frames is NaN."""
    video = np.random.default_rng(0).random((2, 6, 8, 3)).astype(np.float32)
    said = {"float32": [("a <b", True), ("c", True)], "none": [("a <b", True), ("d", False)]}
    made = {"float32": video / 2, "none": np.full_like(video, np.nan)}
    seen, document = browse(story.page(said, made, video), tmp_path)
    assert seen == {"images": 8, "drawn": 8, "same": 3, "other": 1, "outside": 0}
    assert document.count("a &lt;b") == 2


def test_nan_pixels_are_magenta(monkeypatch):
    drawn = []
    monkeypatch.setattr(story.image, "imsave", lambda file, pixels, format: drawn.append(pixels))
    frame = np.full((2, 2, 3), 0.5, np.float32)
    frame[0, 0, 1] = np.nan
    story.png(frame)
    assert drawn[0][0, 0].tolist() == [0.5, 0, 0.5]
    assert drawn[0][1, 1].tolist() == [0.5, 0.5, 0.5]


@pytest.mark.full
def test_frames():
    video = story.pan(2, (8, 8))
    assert video.shape == (2, 8, 8, 3)
    assert 0 <= video.min() < video.max() <= 1
    with jax.numpy_dtype_promotion("standard"):  # flax's norms promote
        made = story.frames(video)
    assert np.isnan(made["none"]).all()
    errors = {name: story.error(made[name], made["float32"]) for name in made if name != "none"}
    assert errors["ours"] < 1.1 * errors["float32 scores"]
    assert errors["float32 scores"] < errors["paper"] < 0.3


@pytest.mark.full
@needs_smollm2
@needs_browser
def test_the_whole_story(tmp_path, capsys):
    with jax.numpy_dtype_promotion("standard"):
        found = story.main(tmp_path, count=2, side=12)
    assert found["float32"]["agreeing"] == 1
    assert found["none"]["agreeing"] == 0
    assert found["none"]["NaN"] == 1
    for name in ("paper", "ours", "float32 scores"):
        assert found[name]["agreeing"] > 0.75
        assert found[name]["NaN"] == 0
    assert found["ours"]["frames"] < 1.1 * found["float32 scores"]["frames"]
    seen, document = browse((tmp_path / "story.html").read_text(encoding="utf-8"), tmp_path)
    assert seen["images"] == seen["drawn"] == 2 * 2 * 5
    assert seen["same"] + seen["other"] == 20 * 5
    assert seen["same"] == round(20 * sum(row["agreeing"] for row in found.values()))
    assert seen["outside"] == 0
    assert "endoftext" in document
    assert (tmp_path / "story.png").stat().st_size > 10_000
    assert "same tokens" in capsys.readouterr().out
