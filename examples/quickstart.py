"""Attention and its gradients on CuPy arrays where there is a GPU, on NumPy arrays where there is none.

Run: python examples/quickstart.py
"""

import numpy

import cuflash

try:
    import cupy

    xp = cupy if cupy.is_available() else numpy
except ImportError:
    xp = numpy

generator = numpy.random.default_rng(0)
# (batch, seqlen, heads, head_dim); eight query heads share two key heads
query = xp.asarray(generator.standard_normal((1, 500, 8, 64)).astype("float16"))
key, value = (xp.asarray(generator.standard_normal((1, 500, 2, 64)).astype("float16")) for _ in range(2))

print(cuflash.plan(query, key, value, is_causal=True, enable_gqa=True))
out, lse = cuflash.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, return_lse=True)
print("out", out.shape, out.dtype, " lse", lse.shape, lse.dtype)

grad_out = xp.ones_like(out)
gradients = cuflash.scaled_dot_product_attention_backward(grad_out, query, key, value, out, lse, is_causal=True, enable_gqa=True)
for name, gradient in gradients._asdict().items():
    print(f"gradient of {name}", gradient.shape, gradient.dtype)
