// What score features and masks add to a kernel's parameter. cuflash/planning/argument_structs.py lists the same fields in the same order with the
// same sizes.
//
// Strides are in elements and 64 bits wide: nothing is copied or expanded, a broadcast axis has stride 0. Fields of features that the generated
// Config does not ask for are zero and never read.
#pragma once
#include "ptx/types.cuh"

struct MaskView {  // one element for each (batch, head, query, key)
  void* data;
  int64 stride_batch, stride_head, stride_query, stride_key;
};

struct HeadView {  // one float32 for each (batch, head)
  const float* data;
  int64 stride_batch, stride_head;

  DEVICE float load(int batch, int head) const { return data[batch * stride_batch + head * stride_head]; }
  DEVICE float load_or_1(int batch, int head) const { return data == nullptr ? 1.0f : load(batch, head); }
};

struct SequenceView {  // one int32 for each (batch, position)
  const int* data;
  int64 stride_batch, stride_position;

  DEVICE int load(int batch, int position) const { return data[batch * stride_batch + position * stride_position]; }
};

constexpr int UNLIMITED = 0x7fffffff;  // what stands for no limit of a window

struct FeatureArguments {
  MaskView attn_mask;
  MaskView grad_attn_mask;  // an extent of 1 that is broadcast has stride 0
  HeadView alibi_slopes;
  HeadView sinks;  // stride_batch 0
  float* grad_sinks;  // [num_heads_q]
  SequenceView segment_ids_q, segment_ids_kv;
  SequenceView prefix_lengths;  // stride_position 0
  int* visible_tiles;  // tile/visible_tiles.cuh
  const uint64* dropout_state;  // {seed, offset} on the device, or null: the two numbers that follow
  uint64 dropout_seed, dropout_offset;
  int list_batches, list_heads;  // 1 where lists of visible tiles are the same for all batches or heads
  int window_low, window_high;  // query i sees keys with window_low <= key - i - causal_offset <= window_high; ±UNLIMITED: all on that side
  float score_factor;  // what multiplies Q Kᵀ: scale in units of the scores (tile/score.cuh), or scale / softcap
  float softcap;  // in units of the scores
  uint32 dropout_limit;  // an element is kept where its random half of a word, as the upper one, is above this
  float dropout_scale;  // 1 / (1 - dropout_p), 0 where dropout_p is 1
  float* log2_sums;  // [batch][num_heads_q][seqlen_q], next to RowStatistics
  MaskView pair_mask;  // boolean, beside an additive attn_mask
};
