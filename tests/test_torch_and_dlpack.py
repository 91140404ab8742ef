"""Arrays of other libraries: torch tensors, JAX arrays, tagged bfloat16 and whatever else speaks DLPack. Nothing is copied on the way.

Reading arrays is tested in test_arrays.py; here whole calls run, on the CPU's simulator and, for what needs one, on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import pytest

import cuflash
from cuflash.errors import DeviceError, DTypeError, UnsupportedError
from cuflash.reference import attention, attention_naive, compare, to_float64

if TYPE_CHECKING:
    from conftest import Target

DTYPES = ["float16", "bfloat16", "float32"]


@pytest.fixture
def torch(simulator: Target) -> Any:
    assert simulator.device.kind == "simulator"
    return pytest.importorskip("torch")


@pytest.fixture
def jax(simulator: Target) -> Any:
    assert simulator.device.kind == "simulator"
    return pytest.importorskip("jax")


def tensors(torch: Any, *shapes: tuple[int, ...], dtype: str = "bfloat16", device: str = "cpu") -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(getattr(torch, dtype)).to(device) for shape in shapes]


# --- torch --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors_go_in_and_come_out(torch: Any, simulator: Target, dtype: str) -> None:
    """Judged by the reference, and the same bits as NumPy arrays with the same values."""
    query, key, value, grad_out = tensors(torch, (2, 70, 4, 40), (2, 50, 2, 40), (2, 50, 2, 40), (2, 70, 4, 40), dtype=dtype)
    results = simulator.run(query, key, value, grad_out=grad_out, enable_gqa=True, is_causal=True)
    assert results.grads is not None
    for x, like in zip((results.out, *results.grads), (query, query, key, value), strict=True):
        assert isinstance(x, torch.Tensor)
        assert (x.dtype, x.shape, x.device, x.requires_grad) == (like.dtype, like.shape, like.device, False)
    assert results.lse.dtype == torch.float32
    assert results.lse.shape == (2, 4, 70)
    want, want_lse = attention(query, key, value, enable_gqa=True, is_causal=True)
    naive, naive_lse = attention_naive(query, key, value, dtype, enable_gqa=True, is_causal=True)  # type: ignore[arg-type]
    compare(results.out, want, naive, name="out")
    compare(results.lse, want_lse, naive_lse, name="lse")
    if dtype != "bfloat16":  # NumPy's own types
        plain = simulator.run(*(x.numpy() for x in (query, key, value)), grad_out=grad_out.numpy(), enable_gqa=True, is_causal=True)
        assert plain.grads is not None
        for x, other in zip((results.out, results.lse, *results.grads), (plain.out, plain.lse, *plain.grads), strict=True):
            assert simulator.bits(x.numpy()) == simulator.bits(other)


def test_torch_agrees_with_its_own_attention(torch: Any) -> None:
    """The arguments mean what they mean in torch: positions, layout "bhsd", top-left causal, default scale, enable_gqa."""
    query, key, value = tensors(torch, (2, 4, 33, 64), (2, 2, 50, 64), (2, 2, 50, 64), dtype="float32")
    for is_causal in (False, True):
        got = cuflash.scaled_dot_product_attention(query, key, value, None, 0.0, is_causal, None, True, layout="bhsd")
        want = torch.nn.functional.scaled_dot_product_attention(query, key, value, None, 0.0, is_causal, enable_gqa=True)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


def test_torch_gradients_agree_with_autograd(torch: Any) -> None:
    query, key, value, grad_out = tensors(torch, (1, 40, 2, 32), (1, 40, 2, 32), (1, 40, 2, 32), (1, 40, 2, 32), dtype="float32")
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    heads_first = [x.transpose(1, 2) for x in leaves]
    torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2).backward(grad_out)
    out, lse = cuflash.scaled_dot_product_attention(query, key, value, is_causal=True, return_lse=True)
    grads = cuflash.scaled_dot_product_attention_backward(grad_out, query, key, value, out, lse, is_causal=True)
    for got, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-5, atol=1e-5)


def test_torch_views_are_read_where_they_are(torch: Any) -> None:
    """A projection that is split, transposed and expanded: no `contiguous()` and the same result."""
    (buffer,) = tensors(torch, (2, 50, 3, 4, 40))
    query, key, value = buffer.unbind(2)
    expanded = key[:, :, :1].expand(-1, -1, 4, -1)
    transposed = value.transpose(1, 2).contiguous().transpose(1, 2)
    got = cuflash.scaled_dot_product_attention(query, expanded, transposed)
    want = cuflash.scaled_dot_product_attention(*(x.contiguous() for x in (query, expanded, transposed)))
    assert torch.equal(got, want)


def test_torch_out(torch: Any) -> None:
    query, key, value = tensors(torch, (2, 50, 4, 40), (2, 50, 4, 40), (2, 50, 4, 40))
    want = cuflash.scaled_dot_product_attention(query, key, value)
    out = torch.full((2, 4, 50, 48), float("nan"), dtype=torch.bfloat16)
    view = out[..., 8:].transpose(1, 2)
    assert cuflash.scaled_dot_product_attention(query, key, value, out=view) is view
    assert torch.equal(view, want)
    assert out[..., :8].isnan().all()


def test_torch_kept_calls(torch: Any) -> None:
    """The second call of a kind, on other tensors, on a view at an odd address, and inside inference mode."""
    for seed in range(3):
        torch.manual_seed(seed)
        query, key, value = (torch.randn(1, 20, 2, 32).half() for _ in range(3))
        got = cuflash.scaled_dot_product_attention(query, key, value)
        assert numpy.abs(to_float64(got) - attention(query, key, value)[0]).max() < 5e-3
        shifted = torch.empty(query.numel() + 1, dtype=torch.float16)[1:].view_as(query).copy_(query)
        assert torch.equal(cuflash.scaled_dot_product_attention(shifted, key, value), got)
        with torch.inference_mode():
            assert torch.equal(cuflash.scaled_dot_product_attention(query, key, value), got)


def test_torch_zero_size(torch: Any) -> None:
    query, key = torch.ones(1, 3, 2, 8), torch.ones(1, 0, 2, 8)
    out, lse = cuflash.scaled_dot_product_attention(query, key, key, return_lse=True)
    assert torch.equal(out, torch.zeros_like(query))
    assert torch.isneginf(lse).all()
    grads = cuflash.scaled_dot_product_attention_backward(out, query, key, key, out, lse)
    assert [tuple(grad.shape) for grad in grads] == [(1, 3, 2, 8), (1, 0, 2, 8), (1, 0, 2, 8)]


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("kept", [False, True], ids=["first_call", "kept_call"])
def test_torch_autograd_is_refused_rather_than_ignored(torch: Any, name: str, kept: bool) -> None:
    """A tensor that requires grad would silently lose it. Also after the same call went well without."""
    inputs = dict(zip(("query", "key", "value"), tensors(torch, *[(1, 8, 1, 16)] * 3), strict=True))
    if kept:
        cuflash.scaled_dot_product_attention(**inputs)
    inputs[name].requires_grad_()
    with pytest.raises(UnsupportedError, match=f"{name}: got a tensor that requires grad.*{name}.detach"):
        cuflash.scaled_dot_product_attention(**inputs)
    with torch.no_grad():
        assert not cuflash.scaled_dot_product_attention(**inputs).requires_grad


def test_torch_and_numpy_do_not_mix(torch: Any) -> None:
    query, key, value = tensors(torch, *[(1, 8, 1, 16)] * 3, dtype="float16")
    with pytest.raises(DeviceError, match=r"key: got a numpy array, while query is a torch array"):
        cuflash.scaled_dot_product_attention(query, key.numpy(), value)


def test_torch_double_is_refused(torch: Any) -> None:
    with pytest.raises(DTypeError, match=r"query.to\(torch.float32\)"):
        cuflash.scaled_dot_product_attention(*tensors(torch, *[(1, 8, 1, 16)] * 3, dtype="float64"))


@pytest.mark.gpu
def test_torch_on_a_gpu_works_on_the_current_stream() -> None:
    """The result is ready for work that is queued behind it on the same stream, and for nobody else."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch without CUDA")
    query, key, value = tensors(torch, *[(2, 300, 4, 64)] * 3, device="cuda")
    want = cuflash.scaled_dot_product_attention(query, key, value)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        late = torch.empty_like(query)
        torch.cuda._sleep(50_000_000)
        late.copy_(query)
        got = cuflash.scaled_dot_product_attention(late, key, value) + 0
    torch.cuda.synchronize()
    assert torch.equal(got, want)


# --- JAX and others -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_jax_arrays_go_in_and_come_out(jax: Any, simulator: Target, dtype: str) -> None:
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    query, key, value, grad_out = (jax.random.normal(k, (1, 40, 2, 32)).astype(dtype) for k in keys)
    results = simulator.run(query, key, value, grad_out=grad_out, is_causal=True)
    plain = simulator.run(*(numpy.asarray(x) for x in (query, key, value)), grad_out=numpy.asarray(grad_out), is_causal=True)
    assert results.grads is not None
    assert plain.grads is not None
    for x, other in zip((results.out, results.lse, *results.grads), (plain.out, plain.lse, *plain.grads), strict=True):
        assert isinstance(x, jax.Array)
        assert simulator.bits(numpy.asarray(x)) == simulator.bits(other)


def test_jax_arrays_are_immutable(jax: Any) -> None:
    x = jax.numpy.ones((1, 8, 1, 16), "float16")
    with pytest.raises(cuflash.ArgumentError, match="out: got a read-only or immutable array"):
        cuflash.scaled_dot_product_attention(x, x, x, out=jax.numpy.zeros_like(x))


class Exported:
    """An array of no library in particular."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __dlpack__(self, **options: Any) -> Any:
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()


def test_anything_with_dlpack_goes_in(simulator: Target) -> None:
    """Results come as NumPy arrays, since the library has no `from_dlpack` to make its own."""
    inputs = [simulator.random((1, 40, 2, 32), "float16", seed) for seed in (1, 2, 3)]
    want = cuflash.scaled_dot_product_attention(*inputs)
    got = cuflash.scaled_dot_product_attention(*(Exported(x) for x in inputs))
    assert type(got) is numpy.ndarray
    assert simulator.bits(got) == simulator.bits(want)


def test_dlpack_keeps_strides(simulator: Target) -> None:
    inputs = [simulator.random((1, 40, 2, 32), "float16", seed, "transposed") for seed in (1, 2, 3)]
    got = cuflash.scaled_dot_product_attention(*(Exported(x) for x in inputs))
    assert simulator.bits(got) == simulator.bits(cuflash.scaled_dot_product_attention(*inputs))


# --- bfloat16 without ml_dtypes -----------------------------------------------------------------------------------------------------------


def test_tagged_bfloat16_gives_the_bits_of_ml_dtypes(target: Target) -> None:
    """uint16 in, tagged uint16 out, without anybody knowing a bfloat16."""
    inputs = [target.random((2, 50, 2, 40), "bfloat16", seed) for seed in (1, 2, 3, 99)]
    *tagged, grad_out = (cuflash.bfloat16(x.view(numpy.uint16)) for x in inputs)
    want = target.run(*inputs[:3], is_causal=True)
    out, lse = cuflash.scaled_dot_product_attention(*tagged, is_causal=True, return_lse=True)
    grads = cuflash.scaled_dot_product_attention_backward(grad_out, *tagged, out, lse, is_causal=True)
    assert all(isinstance(x, cuflash.BFloat16Bits) for x in (out, *grads))
    assert tuple(target.bits(x) for x in (out, lse, *grads)) == want.bits()


def test_tagged_bfloat16_out(target: Target) -> None:
    inputs = [target.random((1, 20, 2, 32), "bfloat16", seed) for seed in (1, 2, 3)]
    tagged = [cuflash.bfloat16(x.view(numpy.uint16)) for x in inputs]
    out = cuflash.bfloat16(target.empty_like(inputs[0]).view(numpy.uint16))
    assert cuflash.scaled_dot_product_attention(*tagged, out=out) is out
    assert target.bits(out) == target.bits(cuflash.scaled_dot_product_attention(*inputs))
