"""Damaged files, and what `models.load` makes of them; in a process of its own, for its memory.

    python -m tests.pasa_jax.models.fuzz fuzz 500
    python -m tests.pasa_jax.models.fuzz load PATH

Prints JSON. Every damage is drawn from the random numbers of its own seed, 0, 1, 2, …
"""

import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import jax

from pasa_jax import models
from tests.pasa_jax.models.directories import CONFIG, tensors, write

INDEX = "model.safetensors.index.json"
DEEP = "[" * 100 + "]" * 100
DEEPER = "[" * 100_000 + "]" * 100_000
# JSON texts, for what Python does not write.
VALUES = ["null", "true", "false", "-1", "0", "1", "3", "2147483648", "1" + "0" * 400, "16.0"]
VALUES += ["-0.5", "NaN", "Infinity", "1e400", "1e39", "1e-39", '""', '"16"', '"F8_E4M3"', '"I64"']
VALUES += ['"\\ud800"', "[]", "[1]", "[[16]]"]
VALUES += ["{}", '{"rope_type": []}', '{"a": {"b": 1}}', DEEP, DEEPER, '"' + "x" * 100_000 + '"']
EXTRA = ["rope_theta", "rope_scaling", "rope_parameters", "layer_types", "head_dim", "rms_norm_eps"]
EXTRA += ["use_sliding_window", "sliding_window", "max_window_layers", "tie_word_embeddings"]
EXTRA += ["attention_bias", "hidden_act", "mlp_bias", "quantization_config", "torch_dtype"]
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
NAMES = ["../other.safetensors", "/etc/passwd", "a\0b", "x" * 300, "", ".", "no.safetensors"]
NAMES += ["\ud800.safetensors"]


def safetensors_bytes(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def substituted(rng, objects):
    """The text of ``objects`` with one value at one place replaced, or a key more."""
    mark = "@here@"
    copy = json.loads(json.dumps(objects))
    place, key = copy, None
    while isinstance(place, (dict, list)) and place and (key is None or rng.random() < 0.8):
        keys = list(place) if isinstance(place, dict) else range(len(place))
        parent, key = place, rng.choice(keys)
        place = parent[key]
    parent[key] = mark
    return json.dumps(copy).replace(f'"{mark}"', rng.choice(VALUES)).encode()


def config_bytes(rng):
    config = CONFIG | rng.choice([{}, WINDOW, {"model_type": "llama"}])
    config |= {rng.choice(EXTRA): None} if rng.random() < 0.6 else {}
    name = rng.choice(list(config)[::-1][: rng.choice([1, len(config)])])
    text = json.dumps(config | {name: "@here@"})
    return text.replace('"@here@"', rng.choice(VALUES)).encode()


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def typed(value):
    """The type and the bytes of a field; a pair gives them as they are."""
    if isinstance(value, tuple):
        return struct.pack("<I", value[0]) + value[1]
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, (str, bytes)):
        return struct.pack("<I", 8) + string(value)
    kind, items = (8, map(string, value)) if isinstance(value[0], str) else (5, map(int32, value))
    return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(items)


def int32(value):
    return struct.pack("<i", value)


FIELDS = {
    "general.architecture": "qwen2",
    "qwen2.block_count": 2,
    "qwen2.embedding_length": 16,
    "qwen2.feed_forward_length": 24,
    "qwen2.attention.head_count": 4,
    "qwen2.attention.head_count_kv": 2,
    "qwen2.context_length": 64,
    "qwen2.rope.freq_base": 10_000.0,
    "qwen2.attention.layer_norm_rms_epsilon": 1e-5,
    "qwen2.rope.dimension_count": 4,
    "qwen2.rope.scaling.type": "none",
    "qwen2.vocab_size": 20,
    "general.alignment": (4, struct.pack("<I", 32)),
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": [*"abcdefghijklmnopqr", "ab", "cd"],
    "tokenizer.ggml.token_type": [1] * 19 + [3],
    "tokenizer.ggml.merges": ["a b", "c d"],
}
GGUF_VALUES = [True, False, -1, 0, 1, 3, 2**31, 2**62, float("nan"), float("inf"), -1.0, 0.0]
GGUF_VALUES += [1e-40, "", "x", b"\xff\xfe", "llama", ["x"], [""], ["a c"], ["a", "a"], [1], [-1]]
GGUF_VALUES += [(99, b""), (9, struct.pack("<IQ", 0, 2**60)), (9, struct.pack("<IQ", 8, 2**60))]
GGUF_VALUES += [(8, struct.pack("<Q", 2**63)), (9, struct.pack("<IQ", 9, 1) * 500)]
NAMED = {"embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
NAMED |= {"input_layernorm": "attn_norm", "self_attn.": "attn_", "_proj": ""}
NAMED |= {
    "attn_o.": "attn_output.",
    "post_attention_layernorm": "ffn_norm",
    "mlp.": "ffn_",
    "model.layers": "blk",
    "model.": "",
}


def gguf_name(name):
    for theirs, ours in NAMED.items():
        name = name.replace(theirs, ours)
    return name


def gguf_bytes(fields, infos, counts=None, version=3):
    """A file of float32 tensors; ``infos``: name -> [shape, type, offset, data]."""
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack("<QQ", *(counts or (len(infos), len(fields))))
    head += b"".join(string(name) + typed(value) for name, value in fields.items())
    body = b""
    for name, (shape, kind, offset, data) in infos.items():
        axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        at = len(body) if offset is None else offset
        head += string(name) + axes + struct.pack("<IQ", kind, at)
        body += data + bytes(-len(data) % 32)
    return head + bytes(-len(head) % 32) + body


def infos(weights):
    """By GGUF's names: shape, type, offset (None: where it comes) and data."""
    found = {gguf_name(name): x for name, x in weights.items()}
    return {name: [list(x.shape), 0, None, x.tobytes()] for name, x in found.items()}


def gguf_damaged(rng):
    fields, about = dict(FIELDS), infos(tensors(CONFIG))
    what = rng.choice(["field", "field", "field", "info", "counts", "missing"])
    if what == "field":
        fields[rng.choice(list(fields))] = rng.choice(GGUF_VALUES)
    if what == "missing":
        del fields[rng.choice(list(fields))]
    if what == "info":
        one = about[rng.choice(list(about))]
        one[1] = rng.choice([0, 0, 1, 2, 8, 12, 16, 24, 28, 31, 99, 2**31])
        one[0] = rng.choice([one[0], [], [0], [2**63, 2], [2**40, 2**40], [1] * 5, [32, 8]])
        one[2] = rng.choice([None, 0, 1, 32, 2**62, 2**64 - 32])
    odd = [0, 1, 2**16, 2**32, 2**60, 2**64 - 1]
    counts = (rng.choice([len(about), *odd]), rng.choice([len(fields), *odd]))
    return gguf_bytes(fields, about, counts if what == "counts" else None, rng.choice([2, 3, 3]))


def flipped(rng, data):
    data = bytearray(data)
    reach = len(data) if rng.random() < 0.3 else min(len(data), 2000)  # headers come first
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(reach)] = rng.choice([rng.randrange(256), 0, 255])
    return bytes(data)


def special(rng, path):
    """Something else that has the file's name."""
    path.unlink()
    kind = rng.choice(["fifo", "directory", "device", "link to itself"])
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    return kind


def substituted_bytes(rng, name, data):
    """A file in which a value or two are others."""
    size = struct.unpack_from("<Q", data)[0]
    if name == "config.json":
        return config_bytes(rng)
    if name == "model.safetensors":
        header = json.loads(data[8 : 8 + size])
        return safetensors_bytes(substituted(rng, header), data[8 + size :])
    if name == INDEX:
        index = json.loads(data)
        text = substituted(rng, index)
        index["weight_map"]["model.norm.weight"] = rng.choice(NAMES)
        return rng.choice([json.dumps(index).encode(), text])
    if name == "tokenizer.json":
        return substituted(rng, json.loads(data))
    return gguf_damaged(rng)


def damage(rng, root):
    """Damages one of the files in ``root``; returns (what load is given, the file, how)."""
    single = ["config.json", "config.json", "model.safetensors", INDEX, "tokenizer.json"]
    name = rng.choice(single + ["model.gguf"] * 3)
    path = root / name
    if name == INDEX:
        files = dict.fromkeys(tensors(CONFIG), "model.safetensors")
        path.write_text(json.dumps({"weight_map": files}))
    how = rng.choice(["substituted"] * 10 + ["flipped"] * 6 + ["truncated"] * 3 + ["special"])
    data = path.read_bytes()
    if how == "special":
        how = special(rng, path)
    elif how == "substituted":
        path.write_bytes(substituted_bytes(rng, name, data))
    elif how == "flipped":
        path.write_bytes(flipped(rng, data))
    else:
        path.write_bytes(data[: rng.randrange(len(data))])
    return (path if name == "model.gguf" else root), path, how


def base(root):
    """Files that are whole, in ``root``."""
    import tokenizers

    write(root, CONFIG, tensors(CONFIG))
    words = tokenizers.models.WordLevel({"a": 0, "b": 7}, "a")
    tokenizers.Tokenizer(words).save(str(root / "tokenizer.json"))
    (root / "model.gguf").write_bytes(gguf_bytes(FIELDS, infos(tensors(CONFIG))))
    return root


def is_as_declared(model):
    """Every parameter as the config says, and the config's numbers of use."""
    c, attention = model.config, model.blocks.attention
    found = [model.embedding, attention.query.kernel, attention.key.kernel, model.norm.scale]
    found += [model.blocks.feed_forward.up.kernel, *([model.head.kernel] if model.head else [])]
    true = [(c.vocabulary, c.width), (c.layers, c.width, c.heads * c.head_dim)]
    true += [(c.layers, c.width, c.kv_heads * c.head_dim), (c.width,)]
    true += [(c.layers, c.width, c.hidden), *([(c.width, c.vocabulary)] if model.head else [])]
    in_range = 1 <= c.rope_base < 1e39 and 0 < c.epsilon <= 1
    return in_range and [x[...].shape for x in found] == true


def outcome(source, path):
    """What load did: "loaded", "refused", or what is wrong with that."""
    try:
        model, _ = models.load(source)
    except (ValueError, FileNotFoundError) as error:
        # Tensors that do not fit the config: `directory` or `path` and the tensor are named.
        named = (path.name, str(path.parent), "`directory` must hold", "`path` must hold")
        return "refused" if any(x in str(error) for x in named) else f"names no file: {error!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "loaded" if is_as_declared(model) else "not as declared"


class Memory:
    """How far the memory of this process, mapped files included, rose within the block."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        self.before = self._read("VmRSS")
        return self

    def __exit__(self, *_):
        self.rise = self._read("VmHWM") - self.before

    def _read(self, name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def fuzz(count):
    """Loads ``count`` damaged files."""
    whole = Path(tempfile.mkdtemp())
    base(whole)
    for source in (whole, whole / "model.gguf"):
        assert outcome(source, source) == "loaded"
    done, errors, slowest, rise = Counter(), [], 0.0, 0
    begin = time.perf_counter()
    for i in range(count):
        work = Path(shutil.copytree(whole, tempfile.mkdtemp(), dirs_exist_ok=True))
        source, path, how = damage(random.Random(i), work)
        start = time.perf_counter()
        with Memory() as memory:
            result = outcome(source, path)
        slowest, rise = max(slowest, time.perf_counter() - start), max(rise, memory.rise)
        done[result] += 1
        if result not in ("loaded", "refused"):
            errors.append(f"{i}: {path.name}, {how}: {result}")
        shutil.rmtree(work)
    shutil.rmtree(whole)
    found = {name: done[name] for name in ("loaded", "refused")}
    seconds = time.perf_counter() - begin
    return found | {"errors": errors, "slowest": slowest, "rise": rise, "seconds": seconds}


def write_large(root):
    """Whole files of 64 MB in ``root``."""
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16}
    write(root, config, tensors(config))
    sizes = {"embedding_length": 256, "feed_forward_length": 1024, "block_count": 16}
    sizes["rope.dimension_count"] = 64
    fields = FIELDS | {f"qwen2.{field}": size for field, size in sizes.items()}
    (root / "model.gguf").write_bytes(gguf_bytes(fields, infos(tensors(config))))


def load(source):
    """Loads what is whole, after a small one, for what is loaded once."""
    small = base(Path(tempfile.mkdtemp()))
    for one in (small, small / "model.gguf"):
        models.load(one)
    with Memory() as memory:
        model = models.load(source).model
    shutil.rmtree(small)
    size = sum(x.nbytes for x in jax.tree.leaves(model))
    return {"shape": is_as_declared(model), "size": size, "rise": memory.rise}


if __name__ == "__main__":
    warnings.simplefilter("error")
    job, argument = sys.argv[1:]
    work = {"fuzz": lambda: fuzz(int(argument)), "load": lambda: load(Path(argument))}
    work["write"] = lambda: write_large(Path(argument))
    print(json.dumps(work[job](), indent=1))
