// Score features and masks that the generated Config asks for, under the names that kernels use. A feature that is not asked for compiles to nothing.
#pragma once
#include "arguments.cuh"
#include "ptx/convert.cuh"
#include "tile/sequence.cuh"

using MaskElement = Config::MaskElement;  // uint8: True means attend; a float type: added to the scores; NoMask

constexpr bool BOOLEAN_MASK = SameType<MaskElement, uint8>::value;
constexpr bool ADDITIVE_MASK = !BOOLEAN_MASK && !SameType<MaskElement, NoMask>::value;
constexpr bool PAIR_MASK = Config::PAIR_MASK;  // a boolean mask beside an additive one
constexpr bool WINDOW = Config::WINDOW;
constexpr bool PREFIX = Config::PREFIX;
constexpr bool SEGMENTS = Config::SEGMENTS;
constexpr bool SINKS = Config::SINKS;
constexpr bool DROPOUT = Config::DROPOUT;

constexpr bool TILE_LISTS = BOOLEAN_MASK || SEGMENTS;  // which tiles have visible pairs depends on data
constexpr bool ONLY_CAUSAL = !TILE_LISTS && !PAIR_MASK && !WINDOW && !PREFIX;  // no mask but the end of the arrays and the causal one
constexpr bool PER_HEAD_WALK = TILE_LISTS || PREFIX || SEQLENS_KV;  // the tiles of a walk differ between batches or heads

// What an element of a mask means. Templates, so that nothing is asked of the elements of another kind of mask.
template <typename T>
DEVICE float mask_bias(T element) {
  if constexpr (ADDITIVE_MASK) return to_float(element);
  return 0.0f;
}
template <typename T>
DEVICE bool mask_attends(T element) {
  if constexpr (BOOLEAN_MASK) return element != 0;
  return true;
}

static_assert(!PAIR_MASK || ADDITIVE_MASK, "a boolean mask alone is attn_mask");
static_assert(!PREFIX || Config::CAUSAL, "prefix_lengths lifts a causal mask");
static_assert(!VARLEN || (!TILE_LISTS && !ADDITIVE_MASK), "packed sequences have neither masks nor segments");
