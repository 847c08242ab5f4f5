"""The paper's own story, in words and frames: float16 attention without a shift, PASA, and ours.

    python -m examples.neighbours.story [--output out]

Words: SmolLM2-135M with a constant on the keys of three heads (`pasa_jax.evidence.demo`), as the
biases of Qwen2's keys are. In float32 it goes on with a text, and each scheme says what comes next
at each place of that. (A random Qwen2, as in examples/qwen2_in_float16.py, says nothing.) Frames: a
UNet of two of the blocks of examples/video_diffusion_attention.py, whose queries and keys resonate,
is given a pan over a photograph. Its weights are random: the question is whether the pattern that
it adds is the same. All is in story.html, which loads nothing.

Columns but the first have float16 arrays. "none" is eager code, which stores unscaled scores in
float16; "paper" is PASA, all in float16; "ours" is the library's default.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from matplotlib import cbook, image
from numpy.typing import NDArray

from examples.neighbours import _shared
from examples.video_diffusion_attention import AttentionFn, SpatialTransformer, resonate
from pasa_jax import dot_product_attention
from pasa_jax.evidence import demo
from pasa_jax.evidence.plain import plain_attention

Array = jax.Array
WIDTH, HEADS, CONTEXT = 96, 3, 32  # of the UNet
PAPER: dict[str, Any] = {"shift": "paper", "precision": "paper", "schedule": demo.PAPER_TILES}


def schemes(causal: bool) -> dict[str, tuple[str, AttentionFn]]:
    """The columns of the page: a type, and attention on arrays of that type."""
    ours = partial(dot_product_attention, is_causal=causal)
    none = partial(plain_attention, scores="float16", prescaled=False, is_causal=causal)
    return {
        "float32": ("float32", partial(ours, shift="none")),
        "float32 scores": ("float16", partial(ours, shift="none", precision="float32")),
        "none": ("float16", none),
        "paper": ("float16", partial(ours, **PAPER)),
        "ours": ("float16", ours),
    }


def words(tokens: int, count: int) -> dict[str, list[tuple[str, bool]]]:
    """What each scheme says next at each place of float32's text; whether float32 says the same."""
    model, tokenizer = _shared.smollm2()
    prompt = jnp.asarray([tokenizer.encode(str(argparse.__doc__)).ids[:tokens]])
    bias, _ = demo.choose_bias(model, prompt)
    attentions = {
        name: demo.in_model(demo.Scheme(name, *scheme), bias)
        for name, scheme in schemes(causal=True).items()
    }
    said = model.generate(prompt, count, attention=attentions["float32"])
    text, found = jnp.concatenate([prompt, said], axis=1), {}
    for name, attention in attentions.items():
        log_p = demo.log_probabilities(model, text, attention)[0, tokens - 1 : -1]
        ids = jnp.argmax(log_p, axis=-1).tolist()  # of NaN: 0
        pairs = zip(ids, said[0].tolist(), strict=True)
        found[name] = [(tokenizer.decode([x], skip_special_tokens=False), x == y) for x, y in pairs]
    return found


def pan(count: int, side: tuple[int, int]) -> NDArray[np.float32]:
    """[count, *side, 3] in [0, 1]: a window that moves over matplotlib's sample photograph."""
    path = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    photograph = image.imread(path)[::6, ::6]
    starts = np.linspace(0, photograph.shape[0] - side[0], count).astype(int)
    left = (photograph.shape[1] - side[1]) // 2
    rows = [photograph[x : x + side[0], left : left + side[1]] for x in starts]
    return np.stack(rows).astype(np.float32) / np.float32(255)


class UNet(nnx.Module):
    """A block at the full size, and one at half of it; x [F, H, W, C] -> what they add."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.fine, self.coarse = (
            SpatialTransformer(WIDTH, HEADS, CONTEXT, rngs=rngs) for _ in range(2)
        )
        for block in (self.fine, self.coarse):
            resonate(block)

    def __call__(self, x: Array, context: Array, attention: AttentionFn) -> Array:
        small = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        added = self.coarse(small, context, attention) - small
        return self.fine(x, context, attention) - x + added.repeat(2, axis=1).repeat(2, axis=2)


def frames(video: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """[F, H, W, 3] what each scheme's UNet adds to the video, as colours."""
    rng = np.random.default_rng(0)
    lift = np.linalg.qr(rng.standard_normal((WIDTH, 3)))[0].T.astype(np.float32)  # [3, C]
    context = rng.standard_normal((len(video), 1, CONTEXT), np.float32)
    graph, state = nnx.split(UNet(nnx.Rngs(0)))
    given = state, (video - 0.5) * np.float32(WIDTH**0.5) @ lift, context

    @partial(jax.jit, static_argnums=0)
    def run(attention: AttentionFn, state: Any, x: Array, context: Array) -> Array:
        return nnx.merge(graph, state)(x, context, attention)

    made = {}
    for name, (dtype, attention) in schemes(causal=False).items():
        narrow = jax.tree.map(partial(jnp.asarray, dtype=dtype), given)
        added = np.asarray(run(attention, *narrow), np.float32)
        made[name] = added @ lift.T / np.float32(WIDTH**0.5)
    return made


def error(made: NDArray, true: NDArray) -> float:
    """The root mean square difference over the spread of what is true."""
    return float(np.sqrt(np.mean((made - true) ** 2)) / np.std(true))


def png(frame: NDArray) -> str:
    """An <img> that holds its pixels [H, W, 3]; those that are NaN are magenta."""
    colours = np.where(np.isfinite(frame), frame.clip(0, 1), (1, 0, 1))
    buffer = io.BytesIO()
    image.imsave(buffer, colours, format="png")
    return (
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )


STYLE = """body{font:16px/1.5 sans-serif;margin:2em} td{vertical-align:top;padding:.4em 1em}
img{width:180px;image-rendering:pixelated;display:block;margin:2px} span{padding:2px 0}
.same{background:#c8f0c8} .other{background:#f4b8b8}"""


def page(said: dict[str, list[tuple[str, bool]]], made: dict[str, NDArray], video: NDArray) -> str:
    """The HTML: a column for each scheme."""

    def spans(tokens: list[tuple[str, bool]]) -> str:
        kinds = ("other", "same")
        return "".join(f'<span class="{kinds[same]}">{html.escape(x)}</span>' for x, same in tokens)

    def pictures(frames: NDArray) -> str:
        return "".join(png(frame) for frame in frames)

    true = made["float32"]
    rows = {
        "": [f"<b>{name}</b>" for name in made],
        "words, green where they are float32's": [spans(said.get(name, [])) for name in made],
        "the video and a quarter of what the UNet adds": [
            pictures(video + added / 4) for added in made.values()
        ],
        "ten times the difference from float32": [
            pictures(10 * abs(added - true)) for added in made.values()
        ],
    }
    cells = ("<td>".join([f"<tr><th>{title}", *row]) for title, row in rows.items())
    head = f"<!doctype html><meta charset=utf-8><title>PASA's story</title><style>{STYLE}</style>"
    return f"{head}<table>{''.join(cells)}</table>\n"


def main(
    output: Path = Path("out"), tokens: int = 48, new: int = 20, count: int = 3, side: int = 24
) -> dict[str, dict[str, Any]]:
    """Prints the table, writes story.html and story.png, returns the numbers of each scheme."""
    video = pan(count, (side, side * 4 // 3))
    said, made = words(tokens, new), frames(video)
    found = {
        name: {
            "agreeing": float(np.mean([same for _, same in said[name]])),
            "text": "".join(x for x, _ in said[name]),
            "frames": error(made[name], made["float32"]),
            "NaN": float(np.mean(np.isnan(made[name]))),
        }
        for name in made
    }
    columns = ("attention", "same tokens", "text", "error of the frames", "NaN pixels")
    _shared.show("Beside float32", columns, ((name, *row.values()) for name, row in found.items()))
    output.mkdir(parents=True, exist_ok=True)
    (output / "story.html").write_text(page(said, made, video), encoding="utf-8")
    _shared.console.print(f"written: {output / 'story.html'}")
    figure, axes = _shared.picture(columns=count, rows=len(made))
    for row, (name, added) in zip(axes, made.items(), strict=True):
        for axis, frame in zip(row, video + added / 4, strict=True):
            axis.imshow(frame.clip(0, 1))
            axis.set(title=name, xticks=[], yticks=[])
    _shared.save(figure, output, "story")
    return found


if __name__ == "__main__":
    typer.run(main)
