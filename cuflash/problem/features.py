"""Score features and masks of a call: check what the caller passed, and reduce it to a frozen, hashable `Features`.

    score = [softcap · tanh](scale · q·k [/ softcap]) + attn_mask - alibi_slope · |i + shift - j|
    i sees j  ⇔  causal or j < prefix_length,  and -left <= j - i - shift <= right,  and equal segment ids,  and a boolean attn_mask is True
    P = exp(score - lse),  lse = log(Σ exp(score) + exp(sink)),  out = dropout(P) V

`shift` is 0 for causal_alignment="top_left" and seqlen_kv - seqlen_q for "bottom_right". `FeatureSet` is the part of `Features` that kernels are compiled
for; all else is a run-time argument. Nothing in this file touches an array's values, a GPU or a framework.
"""

from __future__ import annotations

import numbers
import operator
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TypeAlias

import numpy

from cuflash.arrays.borrowing import AnyArray, Array, is_array
from cuflash.arrays.descriptions import describe
from cuflash.errors import DeviceError, DTypeError, OptionError, ShapeError
from cuflash.problem.options import Options, check_bool, real
from cuflash.problem.other_names import explains_features

Shape4 = tuple[int, int, int, int]
Strides2 = tuple[int, int]

MASK_ITEMSIZES = {"bool": 1, "float16": 2, "bfloat16": 2, "float32": 4}
MASK_DTYPES = tuple(MASK_ITEMSIZES)
BESIDE = "bool+"
MASK_KINDS = (*MASK_DTYPES, *(BESIDE + dtype for dtype in MASK_DTYPES[1:]))
"""What masks kernels are compiled for: one of these element types, or a boolean mask beside an additive one."""
Seed: TypeAlias = int | tuple[int, int] | AnyArray | None

UNLIMITED = 2**31 - 1
"""What stands for no limit where kernels compare 32-bit differences of positions."""


@dataclass(frozen=True)
class FeatureArray:
    """What an array that belongs to a feature has to be. Kernels look its elements up by position.

    Attributes:
        feature: the field of `FeatureSet`.
        dtype: of its elements.
        axes: the forms that it may have, "batch", "head", "query" and "key" by their first letters; beside another axis the batch may be 1.
        meaning: for messages.
        has_gradient: the backward pass gives it.
    """

    feature: str
    dtype: str
    axes: tuple[str, ...]
    meaning: str
    has_gradient: bool = False


FEATURE_ARRAYS = {
    "alibi_slopes": FeatureArray("alibi", "float32", ("bh", "h"), "one slope for each query head, or for each batch and query head"),
    "sinks": FeatureArray("sinks", "float32", ("h",), "one logit for each query head", has_gradient=True),
    "segment_ids_q": FeatureArray("segments", "int32", ("bq",), "one id for each query, (batch, seqlen_q); a batch of 1 is broadcast"),
    "segment_ids_kv": FeatureArray("segments", "int32", ("bk",), "one id for each key, (batch, seqlen_kv); a batch of 1 is broadcast"),
    "prefix_lengths": FeatureArray("prefix", "int32", ("b",), "one length for each sequence of the batch"),
}
"""Argument of a call -> what is expected; in the order of the argument struct. Masks and seeds have rules of their own."""

FEATURE_OF = {
    "attn_mask": "attn_mask", "dropout_p": "dropout", "dropout_seed": "dropout", "window": "window", "softcap": "softcap",
    **{name: array.feature for name, array in FEATURE_ARRAYS.items()},
}  # fmt: skip
"""Argument of a call -> the field of `FeatureSet` that its kernels are compiled for."""


@explains_features(FEATURE_OF)
@dataclass(frozen=True)
class FeatureSet:
    """The features that kernels are compiled for; each is absent from the machine code of a kernel that does not have it.

    Attributes:
        attn_mask: element type of the mask, "bool", "float16", "bfloat16" or "float32"; None without. "bool+float32" and the like: an additive mask of
            that type with a boolean one beside it, as `cuflash.torch` takes by attn_bias.
        dropout, window, softcap, alibi, sinks, segments, prefix: whether the feature is used.
    """

    attn_mask: str | None = None
    dropout: bool = False
    window: bool = False
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    segments: bool = False
    prefix: bool = False

    @property
    def lists_tiles(self) -> bool:
        """Which tiles have visible pairs depends on data, and a kernel of its own lists them."""
        return self.attn_mask == "bool" or self.segments

    @property
    def additive_mask(self) -> bool:
        """A mask is added to the scores."""
        return self.attn_mask not in (None, "bool")

    @property
    def pair_mask(self) -> bool:
        """A boolean mask stands beside the additive one."""
        return self.attn_mask is not None and self.attn_mask.startswith(BESIDE)

    @property
    def hides_keys(self) -> bool:
        """Any of them masks keys."""
        return self.lists_tiles or self.pair_mask or self.window or self.prefix

    def names(self) -> tuple[str, ...]:
        """The features that are used, for people and for the model of registers."""
        flags = (flag.name for flag in fields(self) if flag.name != "attn_mask")
        additive = "additive mask beside a boolean one" if self.pair_mask else "additive mask"
        mask = () if self.attn_mask is None else ("boolean mask" if self.attn_mask == "bool" else additive,)
        return (*mask, *(name for name in flags if getattr(self, name)))

    def constants(self) -> dict[str, bool | str]:
        """What `struct Config` says of the features."""
        of_mask = None if self.attn_mask is None else self.attn_mask.removeprefix(BESIDE)
        element = {None: "NoMask", "bool": "uint8", "float32": "float"}.get(of_mask, of_mask)
        return {
            "MaskElement": str(element),
            "PAIR_MASK": self.pair_mask,
            "DROPOUT": bool(self.dropout),
            "WINDOW": bool(self.window),
            "SOFTCAP": bool(self.softcap),
            "ALIBI": bool(self.alibi),
            "SINKS": bool(self.sinks),
            "SEGMENTS": bool(self.segments),
            "PREFIX": bool(self.prefix),
        }


NO_FEATURES = FeatureSet()


@dataclass(frozen=True)
class MaskLayout:
    """An attention mask in canonical axes.

    Attributes:
        dtype: one of `MASK_DTYPES`.
        shape: as the caller has it, one to four dimensions; the shape of its gradient.
        extents: (batch, num_heads_q, seqlen_q, seqlen_kv), 1 where it is broadcast.
        strides: of the same axes in elements, 0 where it is broadcast.
        aligned: it starts on 16 bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    extents: Shape4
    strides: Shape4
    aligned: bool = True


@dataclass(frozen=True)
class Features:
    """The features of one call, without addresses.

    Attributes:
        kinds: what kernels are compiled for.
        attn_mask: layout of the mask, or None.
        pair_mask: of the boolean mask beside an additive one, or None.
        need_attn_mask_grad: the backward pass also gives the gradient of an additive mask.
        window_low, window_high: query i sees keys j with window_low <= j - i - shift <= window_high; ±UNLIMITED for no limit.
        softcap: or None.
        dropout_p: how likely a probability is dropped.
        array_strides: of each of `FEATURE_ARRAYS` that is there, by its name: of the batch and of the other axis, in elements, 0 where there is none.
    """

    kinds: FeatureSet = field(default_factory=FeatureSet)
    attn_mask: MaskLayout | None = None
    need_attn_mask_grad: bool = False
    window_low: int = -UNLIMITED
    window_high: int = UNLIMITED
    softcap: float | None = None
    dropout_p: float = 0.0
    array_strides: tuple[tuple[str, Strides2], ...] = ()
    pair_mask: MaskLayout | None = None

    def describe(self) -> str:
        """One line for people: the features that are used, with their numbers."""
        words = []
        if self.attn_mask is not None:
            gradient = ", with its gradient" if self.need_attn_mask_grad else ""
            words.append(f"attn_mask {self.attn_mask.dtype} {self.attn_mask.shape}{gradient}")
        if self.pair_mask is not None:
            words.append(f"a boolean mask {self.pair_mask.shape} beside it")
        if self.kinds.window:
            words.append(f"window of keys at distances {_limit(self.window_low, '-infinity')} to {_limit(self.window_high, 'infinity')}")
        if self.softcap is not None:
            words.append(f"softcap {self.softcap:g}")
        if self.kinds.dropout:
            words.append(f"dropout {self.dropout_p:g}")
        words += dict.fromkeys(FEATURE_ARRAYS[name].feature for name, _ in self.array_strides)
        return ", ".join(words)


@dataclass(frozen=True)
class Extents:
    """What features are checked against.

    Attributes:
        batch, num_heads_q, seqlen_q, seqlen_kv: of the scores; of packed sequences their number, and the longest.
        like: the query.
    """

    batch: int
    num_heads_q: int
    seqlen_q: int
    seqlen_kv: int
    like: Array


def check_features(extents: Extents, arrays: Mapping[str, Array], options: Options, *, is_causal: bool, scale: float) -> Features:
    """Check the features of a call, all of them.

    Args:
        extents: of the call.
        arrays: of the call, borrowed, by name.
        options: as they came from the caller.
        is_causal, scale: of the call, checked.

    Raises:
        OptionError: a scalar outside its domain, or options that exclude each other.
        DTypeError, ShapeError, DeviceError: an array that does not fit.
    """
    dropout_p = check_dropout_p(options.dropout_p)
    if "dropout_state" in arrays:
        check_dropout_state(arrays["dropout_state"], extents)
    left, right = check_window(options.window)
    cap = check_softcap(options.softcap, scale)
    mask = _check_mask(arrays["attn_mask"], extents) if "attn_mask" in arrays else None
    pair_mask = _check_mask(arrays["pair_mask"], extents) if "pair_mask" in arrays else None
    assert pair_mask is None or (pair_mask.dtype == "bool" and mask is not None and mask.dtype != "bool"), "cuflash.torch sorts masks"
    need_grad = _check_need_grad(options.need_attn_mask_grad, mask)
    if "prefix_lengths" in arrays and not is_causal:
        hint = "Pass is_causal=True: keys of the prefix are visible to all queries, the others causally."
        raise OptionError("prefix_lengths", "an array with is_causal=False", "is_causal=True", hint)
    if ("segment_ids_q" in arrays) != ("segment_ids_kv" in arrays):
        missing = "segment_ids_kv" if "segment_ids_q" in arrays else "segment_ids_q"
        hint = f"Pass {missing} too; for self-attention it is the same array."
        raise OptionError(missing, "None while the other one is given", "ids for queries and keys", hint)

    strides = tuple((name, _check_array(name, arrays[name], extents)) for name in FEATURE_ARRAYS if name in arrays)
    kinds = FeatureSet(
        attn_mask=None if mask is None else mask.dtype if pair_mask is None else BESIDE + mask.dtype, dropout=dropout_p > 0.0, window=(left, right) != (None, None), softcap=cap is not None,
        alibi="alibi_slopes" in arrays, sinks="sinks" in arrays, segments="segment_ids_q" in arrays, prefix="prefix_lengths" in arrays,
    )  # fmt: skip
    return Features(
        kinds=kinds,
        attn_mask=mask,
        need_attn_mask_grad=need_grad,
        window_low=-UNLIMITED if left is None else max(-UNLIMITED, -left),
        window_high=UNLIMITED if right is None else min(UNLIMITED, right),
        softcap=cap,
        dropout_p=dropout_p,
        array_strides=strides,
        pair_mask=pair_mask,
    )


# --- Scalars ------------------------------------------------------------------------------------------------------------------------------


def check_dropout_p(dropout_p: object) -> float:
    """A probability from 0 to 1."""
    number = real(dropout_p)
    if number is None or not 0.0 <= number <= 1.0:
        raise OptionError("dropout_p", describe(dropout_p), "a probability from 0.0 to 1.0", "Use 0.0 for no dropout, as in evaluation.")
    return number


def check_dropout_seed(dropout_p: float, dropout_seed: object) -> None:
    """With dropout there has to be a seed, since the backward pass must draw the same mask."""
    if not dropout_p:
        return
    expected = "an int, a pair (seed, offset), or an array of two (u)int64 on the device"
    hint = "Draw one for each call, and pass the same one to the backward pass: dropout_seed=random.getrandbits(63)."
    if dropout_seed is None:
        raise OptionError("dropout_seed", "None with dropout_p > 0", expected, hint)
    if is_array(dropout_seed) or words_of_seed(dropout_seed) is not None:
        return
    got = describe(dropout_seed)
    if isinstance(dropout_seed, (list, tuple)):
        got = f"a {type(dropout_seed).__name__} of {len(dropout_seed)}: {reprlib.repr(dropout_seed)}"
        hint = "Write a pair of ints as a tuple: dropout_seed=(seed, offset)."
    raise OptionError("dropout_seed", got, expected, hint)


def words_of_seed(dropout_seed: object) -> tuple[int, int] | None:
    """Seed and offset as unsigned 64-bit numbers; None for anything but ints, such as an array.

    Raises:
        OptionError: an int that has more than 64 bits.
    """
    pair = dropout_seed if isinstance(dropout_seed, tuple) and len(dropout_seed) == 2 else (dropout_seed, 0)
    words = []
    for number in pair:
        if not isinstance(number, numbers.Integral) or isinstance(number, bool):
            return None
        word = operator.index(number)
        if not -(2**63) <= word < 2**64:
            raise OptionError("dropout_seed", describe(word), "an int of 64 bits", "Take it modulo 2**64.")
        words.append(word % 2**64)
    return words[0], words[1]


def drawn_from(dropout_p: object, dropout_seed: object) -> tuple[dict[str, int], object]:
    """What dropout draws from: the words of a seed under their names in the argument structs, or the array that holds them; neither without dropout."""
    if dropout_seed is None or (isinstance(dropout_p, (int, float)) and dropout_p == 0.0):
        return {}, None
    words = words_of_seed(dropout_seed)
    return ({}, dropout_seed) if words is None else ({"dropout_seed": words[0], "dropout_offset": words[1]}, None)


def check_window(window: object) -> tuple[int | None, int | None]:
    """(left, right), each a number of keys or None for no limit, which -1 means too."""
    if window is None:
        return None, None
    expected = "a pair (left, right) of ints from 0 on, with None or -1 for no limit"
    hint = "window=(127, 0) lets a query see itself and 127 keys before it."
    if isinstance(window, numpy.ndarray):
        window = window.tolist()
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        got = describe(window)
        if isinstance(window, (tuple, list)):
            got = f"a {type(window).__name__} of {len(window)}: {reprlib.repr(window)}"
        raise OptionError("window", got, expected, hint)
    limits: list[int | None] = []
    for limit in window:
        if limit is None:
            limits.append(None)
            continue
        if not isinstance(limit, numbers.Integral) or isinstance(limit, bool) or operator.index(limit) < -1:
            raise OptionError("window", f"({describe(window[0])}, {describe(window[1])})", expected, hint)
        count = operator.index(limit)
        limits.append(None if count == -1 else count)
    return limits[0], limits[1]


def check_softcap(softcap: object, scale: float) -> float | None:
    """A positive float; None or 0.0 for no cap."""
    if softcap is None:
        return None
    number = real(softcap)
    if number == 0.0:
        return None
    if number is None or not 0.0 < number < 2.0**126:
        raise OptionError(
            "softcap", describe(softcap), "a positive float below 2**126, or None", "Leave it out for no cap; scores stay within ±softcap."
        )
    if number < 2.0**-100 or abs(scale) / number > 2.0**126:  # kernels take it times 2 log2(e)
        hint = "Use a larger softcap; usual ones are 20 to 50."
        raise OptionError("softcap", f"{number:g} with scale {scale:g}", "scale / softcap that float32 can hold", hint)
    return number


def _check_need_grad(value: object, mask: MaskLayout | None) -> bool:
    wanted = check_bool("need_attn_mask_grad", value)
    if wanted and (mask is None or mask.dtype == "bool"):
        got = "True without attn_mask" if mask is None else "True with a boolean attn_mask"
        hint = "Leave it out; only a mask of floats that is added to the scores has a gradient."
        raise OptionError("need_attn_mask_grad", got, "an additive attn_mask", hint)
    return wanted


# --- Arrays -------------------------------------------------------------------------------------------------------------------------------


def _check_kind(name: str, array: Array, extents: Extents) -> None:
    """It comes from the query's library and is on its device."""
    like = extents.like
    if array.framework.library != like.framework.library:
        hint = f"Convert it to a {like.framework.library} array."
        raise DeviceError(name, f"a {array.framework.library} array", f"a {like.framework.library} array, like query", hint)
    if array.device != like.device:
        raise DeviceError(
            name, f"an array on {array.device}", f"an array on {like.device}, like query", f"Move {name} to the query's device."
        )


def _check_array(name: str, array: Array, extents: Extents) -> Strides2:
    """Its strides of the batch and of the other axis, 0 for an axis that is broadcast or not there."""
    rule = FEATURE_ARRAYS[name]
    _check_kind(name, array, extents)
    if array.dtype != rule.dtype:
        raise DTypeError(name, array.dtype, rule.dtype, f"Cast it to {rule.dtype}.")
    forms = {shape: axes for axes in rule.axes for shape in _shapes_of(axes, extents)}
    if array.shape not in forms:
        raise ShapeError(name, f"shape {array.shape}", " or ".join(map(str, forms)), f"Pass {rule.meaning}.")
    by_axis = {
        axis: 0 if extent == 1 else stride for axis, extent, stride in zip(forms[array.shape], array.shape, array.strides, strict=True)
    }
    return by_axis.pop("b", 0), next(iter(by_axis.values()), 0)


def _shapes_of(axes: str, extents: Extents) -> list[tuple[int, ...]]:
    """The shapes of an array with these axes."""
    of = {"b": extents.batch, "h": extents.num_heads_q, "q": extents.seqlen_q, "k": extents.seqlen_kv}
    full = tuple(of[axis] for axis in axes)
    return [full, (1, *full[1:])] if axes[0] == "b" and len(axes) > 1 else [full]


def check_dropout_state(array: Array, extents: Extents) -> None:
    """Seed and offset in memory of the device."""
    _check_kind("dropout_seed", array, extents)
    if array.dtype not in ("int64", "uint64"):
        hint = "Cast it; or pass an int."
        if array.dtype == "uint32" and array.shape == (2,):
            hint = "A key of JAX is one number in two words: pass int(key[0]) << 32 | int(key[1])."
        raise DTypeError("dropout_seed", array.dtype, "int64 or uint64", hint)
    if array.shape != (2,) or array.strides != (1,):
        got = f"shape {array.shape} with strides {array.strides}"
        raise ShapeError("dropout_seed", got, "two contiguous elements, seed and offset", "Pass an array of shape (2,), or an int.")


def _check_mask(mask: Array, extents: Extents) -> MaskLayout:
    _check_kind("attn_mask", mask, extents)
    if mask.dtype not in MASK_DTYPES:
        hint = "Cast it: to bool if True means attend (the inverse of a padding mask), to a float type if it is to be added to the scores."
        raise DTypeError("attn_mask", mask.dtype, "bool, float16, bfloat16 or float32", hint)
    full = (extents.batch, extents.num_heads_q, extents.seqlen_q, extents.seqlen_kv)
    ndim = len(mask.shape)
    if not (1 <= ndim <= 4 and _broadcasts(mask.shape, full[4 - ndim :])):
        expected = f"one to four dimensions that broadcast to (batch, heads, seqlen_q, seqlen_kv) = {full}"
        hint = "The axes are those of the scores in every layout: key padding (batch, seqlen_kv) is passed as mask[:, None, None, :]."
        if ndim == 3 and _broadcasts((mask.shape[0], 1, *mask.shape[1:]), full):
            hint = "If its first axis is the batch, give it one for the heads: mask[:, None]."
        raise ShapeError("attn_mask", f"shape {mask.shape}", expected, hint)
    b, h, q, k = (1,) * (4 - ndim) + mask.shape
    strides = [0 if extent == 1 else stride for extent, stride in zip(mask.shape, mask.strides, strict=True)]
    stride_b, stride_h, stride_q, stride_k = [0] * (4 - ndim) + strides
    return MaskLayout(mask.dtype, mask.shape, (b, h, q, k), (stride_b, stride_h, stride_q, stride_k), mask.pointer % 16 == 0)


def _broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    return all(own in (1, wanted) for own, wanted in zip(shape, full, strict=True))


def _limit(limit: int, unlimited: str) -> str:
    return unlimited if abs(limit) == UNLIMITED else str(limit)
