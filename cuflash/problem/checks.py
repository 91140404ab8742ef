"""Check everything a user can get wrong, and reduce what is left to one frozen, hashable `Problem`.

`make_problem` takes borrowed arrays and the options of a public call. All forms of arrays become `View`s in canonical order (batch,
seqlen, heads, head_dim), and a broadcast becomes a stride of 0 with the full extent. From here on nothing asks what the caller's arrays
looked like, except `Layout`, which presents results in the caller's form, and `check_out` and `check_backward`, which judge the others.

Nothing in this file touches an array's values, a GPU or a framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cuflash.arrays.borrowing import Array
from cuflash.errors import ArgumentError, DeviceError, DTypeError, OptionError, ShapeError, UnsupportedError
from cuflash.problem import options, sequences
from cuflash.problem.features import Extents, check_features
from cuflash.problem.layout import CANONICAL, Layout, View, is_first_columns, overlaps_itself, share_memory
from cuflash.problem.options import Options
from cuflash.problem.problem import DTYPES, MAX_EXTENT, MAX_HEAD_DIM, BackwardViews, Problem, Shape3
from cuflash.problem.sequences import Lengths


def make_problem(arrays: Mapping[str, Array], given: Options) -> Problem:
    """Check a call's inputs and options, all of them, and return what is left to compute.

    Options come first, since they say how shapes are to be read; then library and device, element types, ranks, and extents.

    Args:
        arrays: what `operands.borrowed` gives, by name. Query has four dimensions in the order of `layout`, any strides; float16, bfloat16 or float32. Or three
            dimensions (batch, seqlen, heads * head_dim), with `layout="sbhd"` or `batch_first=False` (seqlen, batch, heads * head_dim); or of packed
            sequences (tokens, heads, head_dim). Key has the same form and dtype; batch may be 1, heads may be 1, or divide the query's heads if
            `enable_gqa`. Value is like key, with key's seqlen; a head_dim of its own in four dimensions.
        given: the options as they came from the caller.

    Raises:
        OptionError: an option is of a wrong type or outside its domain.
        UnsupportedError: the call is meaningful, but there is no kernel for it.
        DeviceError: arrays on different devices or of different libraries.
        DTypeError: unsupported or different element types.
        ShapeError: ranks or extents that do not fit together.
    """
    is_causal = options.check_bool("is_causal", given.is_causal)
    scale = options.check_scale(given.scale)
    gqa = options.check_bool("enable_gqa", given.enable_gqa)
    order = options.check_layout(given.layout, given.batch_first)
    num_heads = options.check_num_heads(given.num_heads)
    causal_alignment = options.check_causal_alignment(given.causal_alignment)
    return_lse = options.check_bool("return_lse", given.return_lse)
    deterministic = options.check_bool("deterministic", given.deterministic)
    allow_tf32 = options.check_bool("allow_tf32", given.allow_tf32)

    inputs = {name: arrays[name] for name in ("query", "key", "value")}
    query = inputs["query"]
    check_same_kind(
        inputs
        | {
            name: arrays[name]
            for name in ("seqlens_q", "seqlens_kv", "cu_seqlens_q", "cu_seqlens_kv", "seqused_q", "seqused_kv")
            if name in arrays
        }
    )
    check_dtypes(inputs)
    form = _varlen_form(inputs) if given.varlen else _form_of(inputs, order)
    head_dim = _head_dim_of(query, form, num_heads)
    head_dim_v = _check_head_dims(inputs, form, head_dim)
    views = {name: form.view(array, head_dim_v if name == "value" else head_dim) for name, array in inputs.items()}
    _Extents(views, form, gqa).check()

    batch, seqlen_q, num_heads_q, _ = views["query"].shape
    batch_k, seqlen_kv, heads_k, _ = key_shape = views["key"].shape
    batch_v, _, heads_v, _ = value_shape = views["value"].shape
    num_heads_kv = heads_v if heads_k == 1 else heads_k
    lengths = _lengths(arrays, given, batch, seqlen_q, seqlen_kv)
    sequences_or_batch = batch if lengths.num_sequences is None else lengths.num_sequences
    extents = Extents(sequences_or_batch, num_heads_q, lengths.max_seqlen_q, lengths.max_seqlen_kv, query)
    chosen_scale = head_dim**-0.5 if scale is None else scale
    features = check_features(extents, arrays, given, is_causal=is_causal, scale=chosen_scale)
    return Problem(
        dtype=query.dtype,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        batch_kv=batch_v if batch_k == 1 else batch_k,
        head_dim=head_dim,
        scale=chosen_scale,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        deterministic=deterministic,
        allow_tf32=allow_tf32,
        return_lse=return_lse,
        query=views["query"],
        key=views["key"].broadcast(batch, num_heads_kv),
        value=views["value"].broadcast(batch, num_heads_kv),
        key_shape=key_shape,
        value_shape=value_shape,
        layout=form,
        head_dim_v=head_dim_v,
        features=features,
        aligned=all(array.pointer % 16 == 0 for array in inputs.values()),
        vectorized=form.order.endswith("d")  # contiguous rows in the output and the gradients, too
        and head_dim * query.itemsize % 16 == 0 == head_dim_v * query.itemsize % 16
        and all(views[name].vectorized(query.itemsize, array.pointer) for name, array in inputs.items()),
        value_in_key=is_first_columns(inputs["value"], views["value"], inputs["key"], views["key"]),
        **lengths._asdict(),
    )


def _lengths(arrays: Mapping[str, Array], given: Options, batch: int, seqlen_q: int, seqlen_kv: int) -> Lengths:
    """The lengths of a call, whose arrays have so many tokens."""
    query = arrays["query"]
    if given.varlen:
        offsets, bounds = (arrays["cu_seqlens_q"], arrays["cu_seqlens_kv"]), (given.max_seqlen_q, given.max_seqlen_kv)
        lengths = sequences.check_cu_seqlens(offsets, bounds, query, (seqlen_q, seqlen_kv))
        assert lengths.num_sequences is not None
        return lengths._replace(in_places=sequences.check_lengths_in_places(arrays, query, lengths.num_sequences))
    for name in ("seqlens_q", "seqlens_kv"):
        if name in arrays:
            sequences.check_seqlens(name, arrays[name], query, batch)
    return Lengths(seqlen_q, seqlen_kv, seqlens_kv="seqlens_kv" in arrays, seqlens_q="seqlens_q" in arrays)


def check_out(problem: Problem, out: Array, inputs: Mapping[str, Array]) -> View:
    """Check the caller's array for the output and return its canonical view.

    Args:
        problem: the call.
        out: has the output's shape in the call's layout, its dtype, library and device; any strides.
        inputs: query and the other arrays that the kernels read, by name.

    Raises:
        DeviceError, DTypeError, ShapeError: `out` differs from the output in library, device, element type or shape.
        ArgumentError: `out` must not be written, some of its elements share memory, or it shares memory with an input.
    """
    check_same_kind({"query": inputs["query"], "out": out})
    _check_like_output("out", out, problem)
    check_may_be_written(out, inputs)
    return problem.layout.view(out, problem.head_dim_v)


def check_may_be_written(out: Array, inputs: Mapping[str, Array]) -> None:
    """Check that the caller's array for the result is memory of its own.

    Args:
        out: the array.
        inputs: what the kernels read, by name.

    Raises:
        ArgumentError: as `check_out`.
    """
    if out.read_only:
        got = "a tensor that requires grad" if out.framework.name == "torch" else "a read-only or immutable array"
        hint = "Pass out.detach(), or leave out= away." if out.framework.name == "torch" else "Pass a writable array, or leave out= away."
        raise ArgumentError("out", got, "memory that may be written", hint)
    if overlaps_itself(out):
        got = f"shape {out.shape} with strides {out.strides}, where elements share memory"
        raise ArgumentError("out", got, "separate memory for each element", "Pass a copy, or leave out= away.")
    for name, array in inputs.items():
        if share_memory(out, array):
            hint = "Pass an array with memory of its own, or leave out= away."
            raise ArgumentError("out", f"an array that shares memory with {name}", f"memory that {name} does not use", hint)


def check_backward(problem: Problem, grad_out: Array, out: Array, lse: Array, grad_lse: Array | None) -> BackwardViews:
    """Check what the backward pass gets besides query, key and value.

    Args:
        problem: the call.
        grad_out: gradient of the output; the output's shape, dtype, library and device; any strides.
        out: the forward pass's output.
        lse: the forward pass's log-sum-exp, float32, (batch, num_heads_q, seqlen_q), any strides.
        grad_lse: gradient of `lse`, same shape and dtype, or None for 0.

    Raises:
        DeviceError, DTypeError, ShapeError: an array differs from what the forward pass made in library, device, element type or shape.
    """
    others = {"out": out, "grad_out": grad_out, "lse": lse}
    check_same_kind(others if grad_lse is None else {**others, "grad_lse": grad_lse})
    out_view, lse_strides = check_results(problem, out, lse)
    _check_like_output("grad_out", grad_out, problem)
    return BackwardViews(
        problem.layout.view(grad_out, problem.head_dim_v),
        out_view,
        lse_strides,
        None if grad_lse is None else _lse_strides("grad_lse", grad_lse, problem),
    )


def check_results(problem: Problem, out: Array, lse: Array) -> tuple[View, Shape3]:
    """Check what the forward pass gave, which another call is given: the view of `out`, and the strides of `lse`.

    Raises:
        DTypeError, ShapeError: as `check_backward`.
    """
    if len(lse.shape) > len(out.shape):
        got, expected = f"shape {lse.shape} beside out of {out.shape}", "lse, which has no head_dim"
        raise ShapeError("lse", got, expected, "out and lse are exchanged: out comes first.")
    _check_like_output("out", out, problem)
    return problem.layout.view(out, problem.head_dim_v), _lse_strides("lse", lse, problem)


# --- Kinds, element types, ranks --------------------------------------------------------------------------------------------------------

_CONVERSIONS = {"numpy": "numpy.asarray({0})", "cupy": "cupy.asarray({0})", "torch": "torch.as_tensor({0})"}


def check_same_kind(arrays: dict[str, Array]) -> None:
    """All arrays come from the first one's library and are on its device."""
    (first_name, first), *others = arrays.items()
    library = first.framework.library
    for name, array in others:
        if array.framework.library != library:
            got = f"a {array.framework.library} array, while {first_name} is a {library} array"
            hint = f"Convert it: {_CONVERSIONS.get(library, library + '.from_dlpack({0})').format(name)}."
            raise DeviceError(name, got, f"arrays of one library, {library}", hint)
        if array.device != first.device:
            got, expected = _device_name(array.device), f"{_device_name(first.device)}, like {first_name}"
            raise DeviceError(name, got, expected, f"Move {name} or {first_name}, so that all arrays are on one device.")


def check_dtypes(arrays: dict[str, Array]) -> None:
    """All element types are supported and the same."""
    (first_name, first), *others = arrays.items()
    for name, array in arrays.items():
        if array.dtype not in DTYPES:
            hint = f"Cast it: {cast_to(name, array, 'float32')}, or to a 16-bit type."
            if array.dtype == "uint16":
                hint = f"If these are the bits of bfloat16 values: cuflash.bfloat16({name})."
            raise DTypeError(name, array.dtype, "float16, bfloat16 or float32", hint)
    for name, array in others:
        if array.dtype != first.dtype:
            raise DTypeError(name, array.dtype, f"{first.dtype}, like {first_name}", f"Cast it: {cast_to(name, array, first.dtype)}.")


def _form_of(inputs: dict[str, Array], order: str) -> Layout:
    """Whether arrays have four dimensions or three, and in which order."""
    ndim = len(inputs["query"].shape)
    for name, array in inputs.items():
        got = f"{len(array.shape)} dimensions, {array.shape}"
        if len(array.shape) not in (3, 4):
            hint = {
                2: "Add dimensions of extent 1 for what is missing: x[None, :, None, :] for one sequence and one head.",
                5: "Split a stacked array into query, key and value, such as qkv[:, :, 0]; strided views are not copied.",
            }.get(len(array.shape), "Reshape it; strided views are not copied.")
            raise ShapeError(name, got, f"4 dimensions {Layout(order).describe()}, or 3 with num_heads=", hint)
        if len(array.shape) != ndim:
            expected = f"{ndim} dimensions, like query with {inputs['query'].shape}"
            raise ShapeError(name, got, expected, "Bring query, key and value into the same form.")
        if max(array.shape) > MAX_EXTENT:
            raise UnsupportedError(name, f"shape {array.shape}", f"extents of at most {MAX_EXTENT}", "Split the call.")
    if ndim == 4:
        return Layout(order)
    # Heads are part of the last dimension, so that batch_first=False means (seqlen, batch, heads * head_dim), as in recurrent layers.
    flat_order = {"bshd": "bshd", "sbhd": "sbhd", "hbsd": "sbhd"}.get(order)
    if flat_order is None:
        expected = "'bshd' or 'sbhd' for arrays of 3 dimensions, where the last one is heads * head_dim"
        raise OptionError("layout", repr(order), expected, "Leave layout out, or pass arrays of 4 dimensions.")
    return Layout(flat_order, flat=True)


def _varlen_form(inputs: dict[str, Array]) -> Layout:
    """Packed sequences have three dimensions."""
    form = Layout(varlen=True)
    for name, array in inputs.items():
        if len(array.shape) != 3:
            hint = "Call scaled_dot_product_attention for padded batches; pack sequences one behind the other for this call."
            raise ShapeError(name, f"{len(array.shape)} dimensions, {array.shape}", f"3 dimensions {form.describe()}", hint)
        if max(array.shape) > MAX_EXTENT:
            raise UnsupportedError(name, f"shape {array.shape}", f"extents of at most {MAX_EXTENT}", "Split the call.")
    return form


def _head_dim_of(query: Array, form: Layout, num_heads: int | None) -> int:
    """The query's head_dim, checked against num_heads and the kernels' limit."""
    if form.flat:
        if num_heads is None:
            hint = (
                "Pass num_heads=1 if these are (batch, seqlen, head_dim) of one head; call varlen_attention if they are packed sequences, "
                "(tokens, heads, head_dim); index with [None] if they are one sequence, (seqlen, heads, head_dim)."
            )
            raise OptionError("num_heads", f"None with a query of 3 dimensions, {query.shape}", f"the heads in {form.describe()}", hint)
        width, heads = query.shape[2], num_heads
        if width % heads:
            hint = "Pass the number of heads that the last dimension consists of."
            raise ShapeError("query", f"shape {query.shape} with num_heads={heads}", f"a last dimension divisible by {heads}", hint)
        head_dim = width // heads
    else:
        _, _, heads, head_dim = form.to_canonical(query.shape)
        if num_heads not in (None, heads):
            expected = f"{heads}, the heads in query's shape {query.shape}, or None"
            raise OptionError("num_heads", num_heads, expected, f"It is meant for arrays of 3 dimensions. {_how_read(form)}")
    if head_dim == 0:
        raise ShapeError("query", f"head_dim 0 in {query.shape}", f"a head_dim from 1 to {MAX_HEAD_DIM}", _how_read(form))
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedError("query", f"head_dim {head_dim} in {query.shape}", f"a head_dim of at most {MAX_HEAD_DIM}", _how_read(form))
    return head_dim


def _check_head_dims(inputs: dict[str, Array], form: Layout, head_dim: int) -> int:
    """Key has the query's head_dim; returns value's. In three dimensions both have a multiple of it, which gives their number of heads."""
    for name in ("key", "value"):
        shape = inputs[name].shape
        if form.flat:
            if shape[2] % head_dim:
                expected = f"a last dimension that is a multiple of {head_dim}, the query's last dimension divided by num_heads"
                hint = "Check num_heads=, the number of heads of the query."
                if name == "value":
                    hint += " A head_dim of value's own needs arrays of 4 dimensions."
                raise ShapeError(name, f"shape {shape}", expected, hint)
            continue
        own = form.to_canonical(shape)[3]
        got = f"head_dim {own} in {shape}"
        if name == "key" and own != head_dim:
            raise ShapeError(name, got, f"head_dim {head_dim}, like query with {inputs['query'].shape}", _how_read(form))
        if name == "value" and own == 0:
            raise ShapeError(name, got, f"a head_dim from 1 to {MAX_HEAD_DIM}", _how_read(form))
        if name == "value" and own > MAX_HEAD_DIM:
            raise UnsupportedError(name, got, f"a head_dim of at most {MAX_HEAD_DIM}", _how_read(form))
    return head_dim if form.flat else form.to_canonical(inputs["value"].shape)[3]


# --- Extents ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Extents:
    """Whether batches, heads and lengths of query, key and value fit together; a swapped layout is known by what would fit instead."""

    views: dict[str, View]
    form: Layout
    enable_gqa: bool

    def check(self) -> None:
        batch, _, heads, _ = self.views["query"].shape
        for name in ("key", "value"):
            own_batch, seqlen, own_heads, _ = self.views[name].shape
            if own_batch not in (1, batch):
                hint = self._swap() or _how_read(self.form)
                if batch == 1:
                    hint = (
                        f"Only key and value are broadcast: expand query to batch {own_batch}, which needs no copy (broadcast_to, expand)."
                    )
                raise ShapeError(name, f"batch {own_batch} in {self._shape(name)}", f"batch {batch}, {self._like('query')}, or 1", hint)
            if not self._heads_fit(heads, own_heads):
                raise self._heads_error(name, heads, own_heads)
            seqlen_k = self.views["key"].shape[1]
            if seqlen != seqlen_k:
                hint = self._swap() or "There has to be one value for each key."
                raise ShapeError(name, f"seqlen {seqlen} in {self._shape(name)}", f"seqlen {seqlen_k}, {self._like('key')}", hint)
        heads_k, heads_v = self.views["key"].shape[2], self.views["value"].shape[2]
        if heads_k != heads_v and 1 not in (heads_k, heads_v):
            got, expected = f"{heads_v} heads in {self._shape('value')}", f"{heads_k} heads, {self._like('key')}, or 1"
            raise ShapeError("value", got, expected, "Keys and values come in pairs: give both the same number of heads.")

    def _heads_fit(self, heads: int, own: int) -> bool:
        return own in (1, heads) or (self.enable_gqa and own > 0 and heads % own == 0)

    def _heads_error(self, name: str, heads: int, own: int) -> ShapeError:
        divisor = f", or a divisor of {heads}" if self.enable_gqa else ""
        hint = self._swap()
        if own > 0 and heads % own == 0:
            grouped = f"For grouped queries, {heads // own} query heads per key head, pass enable_gqa=True."
            hint = f"{grouped} Or, if these are not heads: {hint}" if hint else grouped
        if hint is None:
            hint = "Check num_heads=, the number of heads of the query." if self.form.flat else _how_read(self.form)
        return ShapeError(name, f"{own} heads in {self._shape(name)}", f"{heads} heads, {self._like('query')}, or 1{divisor}", hint)

    def _swap(self) -> str | None:
        """A hint that names the layout with heads and seqlen exchanged, if the arrays fit together in that one."""
        (batch, heads, _, _), (batch_k, heads_k, seqlen_k, _), (batch_v, heads_v, seqlen_v, _) = (
            view.shape for view in self.views.values()
        )
        batches_fit = {batch_k, batch_v} <= {1, batch}
        if (
            self.form.flat
            or self.form.varlen
            or not (batches_fit and seqlen_k == seqlen_v and self._heads_fit(heads, heads_k) and self._heads_fit(heads, heads_v))
        ):
            return None
        order = self.form.order.translate(str.maketrans("sh", "hs"))
        return f'The arrays fit together if heads and sequence are the other way round: pass layout="{order}".'

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.form.from_canonical(self.views[name].shape)

    def _like(self, name: str) -> str:
        return f"like {name} with {self._shape(name)}"


# --- Arrays besides the inputs ------------------------------------------------------------------------------------------------------------


def _check_like_output(name: str, array: Array, problem: Problem) -> None:
    """`array` has the output's dtype and shape."""
    if array.dtype != problem.dtype:
        hint = "Pass an array of that type." if name == "out" else f"Cast it: {cast_to(name, array, problem.dtype)}."
        raise DTypeError(name, array.dtype, f"{problem.dtype}, like query", hint)
    expected = problem.layout.from_canonical(problem.output_shape)
    if array.shape != expected:
        hint = f"The output has the form of query, {problem.layout.describe()}."
        raise ShapeError(name, f"shape {array.shape}", f"{expected}, the shape of the output", hint)


def _lse_strides(name: str, array: Array, problem: Problem) -> Shape3:
    """The strides of `array`, which has the dtype and shape of lse."""
    if array.dtype != "float32":
        raise DTypeError(name, array.dtype, "float32", f"Cast it: {cast_to(name, array, 'float32')}.")
    if array.shape != problem.lse_shape:
        words = "(heads, tokens)" if problem.layout.varlen else "(batch, heads, seqlen_q) in every layout"
        expected = f"{problem.lse_shape}, which is {words}"
        hint = "Pass the lse that the forward pass returned with return_lse=True." if name == "lse" else "It has the shape of lse."
        raise ShapeError(name, f"shape {array.shape}", expected, hint)
    batch, heads, seqlen = (0, *array.strides) if problem.layout.varlen else array.strides
    return batch, heads, seqlen


# --- Words ------------------------------------------------------------------------------------------------------------------------------


def _how_read(form: Layout) -> str:
    """How dimensions were taken, and how to say otherwise."""
    if form.flat:
        return f"Dimensions are read as {form.describe()}; num_heads= says how many heads the last one holds."
    if form.varlen:
        return f"Dimensions are read as {form.describe()}."
    other = "bhsd" if form.order == CANONICAL else CANONICAL
    return f'Dimensions are read as {form.describe()}; say otherwise with layout=, such as layout="{other}".'


def cast_to(name: str, array: Array, dtype: str) -> str:
    """The expression that casts an array of its library to `dtype`."""
    library = array.framework.library
    if library == "torch":
        return f"{name}.to(torch.{dtype})"
    return f"{name}.astype({'ml_dtypes' if dtype == 'bfloat16' else 'numpy'}.{dtype})"


def _device_name(device: tuple[str, int]) -> str:
    return "the CPU" if device[0] == "cpu" else f"{device[0]}:{device[1]}"
