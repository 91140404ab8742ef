"""A chat loop: prompts of different lengths go into one cache in chunks, then every step feeds each sequence's last token. The model is random.

Run: python examples/generate.py [steps]
"""

import sys
import time

import numpy

import cuflash

try:
    import cupy

    xp = cupy if cupy.is_available() else numpy
except ImportError:
    xp = numpy

VOCABULARY, LAYERS, HEADS, HEADS_KV, HEAD_DIM = 256, 2, 8, 2, 64
WIDTH, WIDTH_KV = HEADS * HEAD_DIM, HEADS_KV * HEAD_DIM
generator = numpy.random.default_rng(0)


def weights(rows: int, columns: int):
    return xp.asarray((generator.standard_normal((rows, columns)) / rows**0.5).astype("float16"))


embedding, to_logits = weights(VOCABULARY, WIDTH), weights(WIDTH, VOCABULARY)
layers = [
    (weights(WIDTH, WIDTH + 2 * WIDTH_KV), weights(WIDTH, WIDTH), cuflash.KVCache(2, HEADS_KV, HEAD_DIM, xp=xp)) for _ in range(LAYERS)
]
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 32
positions = 16 + steps + 64  # of a prompt, what is said, and the rest of a page
angles = numpy.arange(positions)[:, None] * 10000.0 ** (-numpy.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
rotary = {"rotary_cos": xp.asarray(numpy.cos(angles).astype("float32")), "rotary_sin": xp.asarray(numpy.sin(angles).astype("float32"))}


def step(tokens):
    """Tokens (batch, seqlen) that come next -> the likeliest token behind each sequence."""
    x = embedding[tokens]
    for project, project_out, cache in layers:
        heads = (x @ project).reshape(*tokens.shape, HEADS + 2 * HEADS_KV, HEAD_DIM)
        query, key, value = heads[:, :, :HEADS], heads[:, :, HEADS:-HEADS_KV], heads[:, :, -HEADS_KV:]
        out = cache.attend(query, key, value, **rotary, rotary_interleaved=False)
        x = x + out.reshape(*tokens.shape, WIDTH) @ project_out
    return (x[:, -1] @ to_logits).argmax(axis=1)[:, None]


tokens = step(xp.asarray(numpy.frombuffer(b"Tell me a story.What is a page? ", "uint8").reshape(2, 16).astype("int32")))
said, start = [tokens], time.perf_counter()
for _ in range(steps - 1):
    said.append(step(said[-1]))
text = xp.concatenate(said, axis=1)
print(
    bytes(int(token) for token in text[0]), layers[0][2].lengths, f"{2 * (steps - 1) / (time.perf_counter() - start):.0f} tokens per second"
)
