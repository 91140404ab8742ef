"""A small causal transformer on bytes, its backward pass written out, on NumPy or CuPy arrays alike. Attention is cuflash's; there is no framework.

    x = E[byte];   x += Attention(norm(x)), x += MLP(norm(x)) in each layer;   logits = norm(x) Eᵀ

Positions enter by rotating queries and keys (Su et al. 2021, RoFormer, arXiv 2104.09864, section 3.2). Activations are float32 and have two dimensions, `(batch * seqlen, width)`. Only attention's operands are of the `dtype` that the demo shows off. Each
layer function returns its result and what its backward function needs of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

import cuflash
from cuflash.demo.products import dot

Array = Any  # numpy.ndarray or cupy.ndarray
Parameters = dict[str, Array]

_EPSILON = 1e-5
_ROTARY_BASE = 100.0  # the slowest pair of a head turns once in about 2π · 100 positions


@dataclass(frozen=True)
class Shape:
    """How large the model is.

    Attributes:
        seqlen: bytes that it sees at a time.
        width: of an activation.
        num_heads: of attention; each is `width // num_heads` wide.
        num_layers: of attention and MLP.
        vocabulary: every byte is a token.
    """

    seqlen: int = 128
    width: int = 128
    num_heads: int = 4
    num_layers: int = 2
    vocabulary: int = 256

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


class Transformer:
    """The model.

    Attributes:
        parameters: name -> float32 array.
    """

    def __init__(self, shape: Shape, xp: Any, dtype: str = "float16", seed: int = 0) -> None:
        """Initialise.

        Args:
            shape: how large.
            xp: `numpy` or `cupy`.
            dtype: of the operands of attention, "float16", "bfloat16" or "float32".
            seed: of the initial parameters, which are the same for both libraries.
        """
        self.shape, self.xp, self.dtype = shape, xp, dtype
        generator = numpy.random.default_rng(seed)
        width = shape.width

        def normal(rows: int, columns: int, deviation: float) -> Array:
            return xp.asarray(deviation * generator.standard_normal((rows, columns), dtype=numpy.float32))

        self.parameters: Parameters = {
            "embedding": normal(shape.vocabulary, width, 0.2),
            "norm": xp.ones(width, xp.float32),
        }
        for layer in range(shape.num_layers):
            self.parameters |= {
                f"{layer}.attention.norm": xp.ones(width, xp.float32),
                f"{layer}.attention.qkv": normal(width, 3 * width, width**-0.5),
                f"{layer}.attention.out": normal(width, width, 0.5 * width**-0.5),
                f"{layer}.mlp.norm": xp.ones(width, xp.float32),
                f"{layer}.mlp.up": normal(width, 4 * width, width**-0.5),
                f"{layer}.mlp.down": normal(4 * width, width, 0.5 * (4 * width) ** -0.5),
            }

        half = shape.head_dim // 2
        angles = numpy.arange(shape.seqlen)[:, None] * _ROTARY_BASE ** (-numpy.arange(half) / half)
        # (seqlen, 1, 1, head_dim / 2): the same for queries and keys and for every head
        self._cos, self._sin = (xp.asarray(wave.astype(numpy.float32)[:, None, None]) for wave in (numpy.cos(angles), numpy.sin(angles)))

    def loss(self, tokens: Array, targets: Array) -> float:
        """Mean cross-entropy in nats of `targets` after `tokens`, both int `(batch, seqlen)`."""
        logits, _ = self._forward(tokens)
        return float(self._cross_entropy(logits, targets.reshape(-1))[0] / targets.size)

    def loss_and_gradients(self, tokens: Array, targets: Array) -> tuple[float, Parameters]:
        """The mean loss, and the gradients of it.

        Inside, gradients are those of the sum over all targets: divided by their number they would be too small for float16.
        """
        logits, saved = self._forward(tokens)
        total, grad_logits = self._cross_entropy(logits, targets.reshape(-1))
        gradients = self._backward(grad_logits, tokens, saved)
        for gradient in gradients.values():
            gradient /= targets.size
        return float(total) / targets.size, gradients

    # --- Parts, for who has no gradients ---------------------------------------------------------------------------------------------------

    @property
    def rotation(self) -> tuple[Array, Array]:
        """Cosines and sines of each position, `(seqlen, head_dim / 2)`."""
        return self._cos[:, 0, 0], self._sin[:, 0, 0]

    def normed(self, x: Array, name: str) -> Array:
        """`x` as the part of this name takes it; as the embedding does, with no name."""
        return self._rms_norm(x, self.parameters[f"{name}.norm".lstrip(".")])[0]

    def transformed(self, x: Array, name: str) -> Array:
        """What an MLP makes of x."""
        return self._mlp(x, name)[0]

    # --- The whole ------------------------------------------------------------------------------------------------------------------------

    def _forward(self, tokens: Array) -> tuple[Array, dict[str, Any]]:
        """Logits `(batch * seqlen, vocabulary)`, and what `_backward` needs."""
        weights, batch = self.parameters, len(tokens)
        saved: dict[str, Any] = {}
        x = weights["embedding"][tokens].reshape(-1, self.shape.width)
        for layer in range(self.shape.num_layers):
            normed, saved[f"{layer}.attention.norm"] = self._rms_norm(x, weights[f"{layer}.attention.norm"])
            attended, saved[f"{layer}.attention"] = self._attention(normed, f"{layer}.attention", batch)
            x = x + attended
            normed, saved[f"{layer}.mlp.norm"] = self._rms_norm(x, weights[f"{layer}.mlp.norm"])
            transformed, saved[f"{layer}.mlp"] = self._mlp(normed, f"{layer}.mlp")
            x = x + transformed
        saved["out"], saved["norm"] = self._rms_norm(x, weights["norm"])
        return dot(saved["out"], weights["embedding"].T), saved

    def _backward(self, grad_logits: Array, tokens: Array, saved: dict[str, Any]) -> Parameters:
        """Gradients of all parameters, in reverse order of `_forward`."""
        weights, xp = self.parameters, self.xp
        gradients: Parameters = {"embedding": dot(grad_logits.T, saved["out"])}
        grad, gradients["norm"] = self._rms_norm_backward(dot(grad_logits, weights["embedding"]), saved["norm"])
        for layer in reversed(range(self.shape.num_layers)):
            for part, backward in (("mlp", self._mlp_backward), ("attention", self._attention_backward)):
                name = f"{layer}.{part}"
                grad_normed = backward(grad, name, saved[name], gradients)
                grad_x, gradients[f"{name}.norm"] = self._rms_norm_backward(grad_normed, saved[f"{name}.norm"])
                grad = grad + grad_x
        one_hot = (tokens.reshape(-1, 1) == xp.arange(self.shape.vocabulary)).astype(xp.float32)
        gradients["embedding"] += dot(one_hot.T, grad)  # the embedding is used at both ends
        return gradients

    # --- Attention ------------------------------------------------------------------------------------------------------------------------

    def _attention(self, x: Array, name: str, batch: int) -> tuple[Array, tuple[Any, ...]]:
        """Project, attend, project. Query, key and value are views of one array: cuflash takes any strides."""
        shape = self.shape
        qkv = dot(x, self.parameters[f"{name}.qkv"]).reshape(batch, shape.seqlen, 3, shape.num_heads, shape.head_dim)
        self._rotate(qkv[:, :, :2], self._sin)
        rounded = narrow(qkv, self.dtype)
        query, key, value = (operand(rounded[:, :, index], self.dtype) for index in range(3))
        out, lse = cuflash.scaled_dot_product_attention(query, key, value, is_causal=True, return_lse=True)
        flat = widen(out).reshape(x.shape)
        return dot(flat, self.parameters[f"{name}.out"]), (x, query, key, value, out, lse, flat)

    def _attention_backward(self, grad: Array, name: str, saved: tuple[Any, ...], gradients: Parameters) -> Array:
        x, query, key, value, out, lse, flat = saved
        gradients[f"{name}.out"] = dot(flat.T, grad)
        grad_flat = narrow(dot(grad, self.parameters[f"{name}.out"].T), self.dtype)
        grad_out = operand(grad_flat.reshape(out.shape), self.dtype)
        grads = cuflash.scaled_dot_product_attention_backward(grad_out, query, key, value, out, lse, is_causal=True)
        grad_packed = self.xp.stack([widen(grad_input) for grad_input in grads], axis=2)
        self._rotate(grad_packed[:, :, :2], -self._sin)
        grad_packed = grad_packed.reshape(len(x), -1)
        gradients[f"{name}.qkv"] = dot(x.T, grad_packed)
        return dot(grad_packed, self.parameters[f"{name}.qkv"].T)

    def _rotate(self, x: Array, sin: Array) -> None:
        """Turn, in place, the pairs (i, i + head_dim / 2) of x `(batch, seqlen, 2, heads, head_dim)` by their position's angles."""
        first, second = self.xp.split(x, 2, axis=-1)
        turned = first * self._cos - second * sin
        second[...] = first * sin + second * self._cos
        first[...] = turned

    # --- Everything else ------------------------------------------------------------------------------------------------------------------

    def _mlp(self, x: Array, name: str) -> tuple[Array, tuple[Array, Array]]:
        """Two projections with relu(x)² between them."""
        rectified = self.xp.maximum(dot(x, self.parameters[f"{name}.up"]), 0)
        return dot(rectified * rectified, self.parameters[f"{name}.down"]), (x, rectified)

    def _mlp_backward(self, grad: Array, name: str, saved: tuple[Array, Array], gradients: Parameters) -> Array:
        x, rectified = saved
        gradients[f"{name}.down"] = dot((rectified * rectified).T, grad)
        grad_hidden = 2 * rectified * dot(grad, self.parameters[f"{name}.down"].T)
        gradients[f"{name}.up"] = dot(x.T, grad_hidden)
        return dot(grad_hidden, self.parameters[f"{name}.up"].T)

    def _rms_norm(self, x: Array, gain: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        """gain · x / √mean(x²)."""
        inverse = 1 / self.xp.sqrt((x * x).mean(axis=1, keepdims=True) + _EPSILON)
        normed = x * inverse
        return normed * gain, (normed, inverse, gain)

    def _rms_norm_backward(self, grad: Array, saved: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        """Gradients of x and gain."""
        normed, inverse, gain = saved
        scaled = grad * gain
        return inverse * (scaled - normed * (scaled * normed).mean(axis=1, keepdims=True)), (grad * normed).sum(axis=0)

    def _cross_entropy(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        """Sum over all targets of -log softmax(logits)[target], and the gradient of it: softmax(logits) - one-hot target."""
        rows = self.xp.arange(len(targets))
        shifted = logits - logits.max(axis=1, keepdims=True)
        exponentials = self.xp.exp(shifted)
        row_sums = exponentials.sum(axis=1, keepdims=True)
        grad = exponentials / row_sums
        total = (self.xp.log(row_sums[:, 0]) - shifted[rows, targets]).sum()
        grad[rows, targets] -= 1
        return total, grad


class AdamW:
    """Adam with decoupled weight decay on the matrices. Source: Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2."""

    def __init__(self, parameters: Parameters, xp: Any, decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.98)) -> None:
        self._parameters, self._xp, self._decay, self._betas = parameters, xp, decay, betas
        self._first = {name: xp.zeros_like(parameter) for name, parameter in parameters.items()}
        self._second = {name: xp.zeros_like(parameter) for name, parameter in parameters.items()}
        self._step = 0

    def update(self, gradients: Parameters, rate: float) -> None:
        """Change the parameters in place."""
        self._step += 1
        beta1, beta2 = self._betas
        for name, parameter in self._parameters.items():
            gradient, first, second = gradients[name], self._first[name], self._second[name]
            first += (1 - beta1) * (gradient - first)
            second += (1 - beta2) * (gradient * gradient - second)
            direction = (first / (1 - beta1**self._step)) / (self._xp.sqrt(second / (1 - beta2**self._step)) + 1e-8)
            if parameter.ndim == 2:
                parameter *= 1 - rate * self._decay
            parameter -= rate * direction


# --- Precision of attention's operands ----------------------------------------------------------------------------------------------------


def narrow(x: Array, dtype: str) -> Array:
    """`x`, float32, rounded to `dtype`; bfloat16, which NumPy and CuPy lack, as the uint16 array of its bits (ties to even)."""
    if dtype != "bfloat16":
        return x.astype(dtype)
    bits = x.view("uint32")
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("uint16")


def operand(x: Array, dtype: str) -> Any:
    """What `narrow` gave, or a view of it, as an argument for cuflash."""
    return cuflash.bfloat16(x) if dtype == "bfloat16" else x


def widen(x: Any) -> Array:
    """A result of cuflash as float32."""
    return x.to_float32() if isinstance(x, cuflash.BFloat16Bits) else x.astype("float32")
