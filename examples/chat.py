"""A chat: each message goes into a paged cache in one chunk, each answer comes byte by byte. The model is random. The first answer waits for compilation.

Run: python examples/chat.py "Tell me a story." "And then?"
"""

import sys
import time

import numpy

import cuflash

rng = numpy.random.default_rng(0)
embedding, to_query, to_key, to_value, to_logits = (
    (rng.standard_normal((rows, heads * 64)) / 23).astype("float16") for rows, heads in ((256, 8), (512, 8), (512, 2), (512, 2), (512, 4))
)
angles = numpy.arange(4096)[:, None] * 10000.0 ** -(numpy.arange(32) / 32)
rotary = {"rotary_cos": numpy.cos(angles).astype("float32"), "rotary_sin": numpy.sin(angles).astype("float32")}
cache = cuflash.KVCache(batch=1, num_heads=2, head_dim=64, page_size=16)  # xp=cupy, or torch, for a GPU


def next_token(tokens: list[int]) -> int:
    x = embedding[tokens]
    query, key, value = ((x @ weights).reshape(1, len(tokens), -1, 64) for weights in (to_query, to_key, to_value))
    out = cache.attend(query, key, value, **rotary, rotary_interleaved=False)
    return int(((x + out.reshape(x.shape))[-1] @ to_logits).argmax())


answer: list[int] = []
for message in sys.argv[1:] or ("Tell me a story.", "And then?"):
    start = time.perf_counter()
    answer = [next_token([*answer[-1:], *message.encode()])]
    while len(answer) < 16:
        answer.append(next_token(answer[-1:]))
    rate = len(answer) / (time.perf_counter() - start)
    print(f"> {message}\n{bytes(answer)!r} ({rate:.0f} tokens per second, {cache.lengths[0]} keys in {len(cache.keys)} pages)")
