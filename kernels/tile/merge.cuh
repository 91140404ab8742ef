// What the two kernels that merge attention over disjoint sets of keys share: rows, their parts, and the sum over the lses of a row.
//
// Neighbouring threads, `lanes` of them, share a row and take VECTOR columns of it in turn. Where rows are few, as of a step of generation, several
// such groups share a row, and each has some of its parts: what they wait for is not bandwidth but the trips to memory that depend on each other.
#pragma once
#include "merge_arguments.cuh"
#include "ptx/math.cuh"
#include "ptx/warp.cuh"
#include "tile/packed_rows.cuh"
#include "tile/schedule.cuh"
#include "tile/softmax.cuh"
#include "tile/vector.cuh"

using Element = Config::Element;
using PartElement = Config::PartElement;  // of the parts: float where they are sums that are not rounded yet
constexpr bool PARTS_HAVE_SUMS = Config::PARTS_HAVE_SUMS;  // behind each reference in memory
constexpr bool LOG2_PARTS = Config::LOG2_PARTS;            // whose references are log2 units, as those of a softmax without an additive mask
constexpr bool STREAM_K = Config::STREAM_K;  // a row has parts of its own, or none where its result is there already

constexpr int NUM_THREADS = Config::NUM_WARPS * WARP_SIZE;

struct Row {
  int batch, head, query;
  int lane, lanes, group, groups;
  int num_parts;               // 0 where the row does not exist
  int first_block, tile_row;  // STREAM_K: which block has its first part, and where the row is in a part
  bool exists;

  DEVICE explicit Row(const MergeArguments& arguments) : lanes(arguments.lanes), groups(arguments.groups) {
    const Work work = work_of_block(arguments.num_tiles, arguments.num_heads);
    const int threads = lanes * groups;
    batch = work.batch;
    head = work.head;
    query = work.tile * (NUM_THREADS / threads) + int(threadIdx.x) / threads;
    lane = int(threadIdx.x) % lanes;
    group = int(threadIdx.x) % threads / lanes;
    exists = query < arguments.seqlen_q;
    num_parts = exists ? arguments.parts.num_parts : 0;
    if constexpr (STREAM_K) find_parts(arguments.stream, arguments.num_heads);
  }

  DEVICE int64 stream_part(int i) const { return part_of_block(first_block + i, i == 0); }

  DEVICE float* of(const RowView& view) const { return view.pointer(batch, head, query); }
  template <typename T = Element>
  DEVICE T* of(const TensorView& view) const {
    return view.row_pointer<T>(batch, head) + query * view.stride_seqlen;
  }

  // Over the lanes of the thread's group, for all of them. Every thread of the warp takes part.
  DEVICE float sum_of_lanes(float x) const {
    for (int lane_mask = lanes / 2; lane_mask > 0; lane_mask /= 2) x += shfl_xor(x, lane_mask);
    return x;
  }
  DEVICE float max_of_lanes(float x) const {
    for (int lane_mask = lanes / 2; lane_mask > 0; lane_mask /= 2) x = fmaxf(x, shfl_xor(x, lane_mask));
    return x;
  }

  // One number of each group of the row, behind a barrier of the block, which there is none of where a row has one group: the number of group `i` is
  // `numbers[first_thread() + i * lanes]`.
  DEVICE void publish(float (&numbers)[NUM_THREADS], float x) const {
    if (lane == 0) numbers[threadIdx.x] = x;
    __syncthreads();
  }
  DEVICE int first_thread() const { return int(threadIdx.x) / (lanes * groups) * (lanes * groups); }

  // Over all of the row's threads, for all of them; `numbers` is not used again.
  DEVICE float sum(float x, float (&numbers)[NUM_THREADS]) const {
    x = sum_of_lanes(x);
    if (groups == 1) return x;
    publish(numbers, x);
    x = 0.0f;
    for (int i = 0; i < groups; ++i) x += numbers[first_thread() + i * lanes];
    return x;
  }
  DEVICE float max(float x, float (&numbers)[NUM_THREADS]) const {
    x = max_of_lanes(x);
    if (groups == 1) return x;
    publish(numbers, x);
    for (int i = 0; i < groups; ++i) x = fmaxf(x, numbers[first_thread() + i * lanes]);
    return x;
  }

 private:
  DEVICE void find_parts(const MergeStream& stream, int num_heads) {
    int sequence = batch, first_query = 0;
    if (stream.cu_seqlens_q != nullptr && exists) {
      sequence = sequence_of_row(stream.cu_seqlens_q, stream.num_sequences, query);
      if (sequence >= 0) first_query = ::max(stream.cu_seqlens_q[sequence], 0);
    }
    const int grouped = (query - first_query) * stream.group + head % stream.group, tile = grouped / stream.tile_q;
    exists = exists && sequence >= 0 && grouped >= 0 && tile < stream.num_tiles;  // others are zeros already
    tile_row = grouped % stream.tile_q;
    const int output_tile = (sequence * stream.num_tiles + tile) * (num_heads / stream.group) + head / stream.group;
    const PartsOfTile parts = exists ? stream.part_table[output_tile] : PartsOfTile{0, 1};
    first_block = parts.first_block;
    exists = parts.num_parts > 1;
    num_parts = exists ? parts.num_parts : 0;
  }
};

// exp(LSE) of a row of a part is sum * exp(reference), or sum * 2^reference. Parts without sums have LSE itself for a reference.
struct PartLse {
  float reference, sum;

  DEVICE bool is_empty() const { return reference == -infinity(); }
};

// This row of one part.
struct PartRow {
  const PartElement* out;
  int64 stride_dim;
  bool vectorized;

  DEVICE PartRow(const MergeParts& parts, const Row& row, int i) {
    if constexpr (STREAM_K) {
      out = parts.listed[0].out.row_pointer<PartElement>(0, 0, row.tile_row) + row.stream_part(i) * parts.stride_part_out;
      stride_dim = parts.listed[0].out.stride_dim;
      vectorized = parts.listed[0].out.vectorized;
      return;
    }
    if (parts.table != nullptr) {
      take(parts.table[i], row);
    } else {
      take(parts.listed_part(i), row);
    }
    out += i * parts.stride_part_out;
  }

  DEVICE static PartLse load_lse(const MergeParts& parts, const Row& row, int i) {
    const float* lse;
    if constexpr (STREAM_K) {
      lse = parts.listed[0].lse.pointer(0, 0, row.tile_row) + row.stream_part(i) * parts.stride_part_lse;
    } else {
      lse = parts.table != nullptr ? row.of(parts.table[i].lse) : row.of(parts.listed_part(i).lse);
      lse += i * parts.stride_part_lse;
    }
    return {lse[0], PARTS_HAVE_SUMS ? lse[1] : 1.0f};
  }

 private:
  DEVICE void take(const MergePart& part, const Row& row) {
    out = part.out.row_pointer<PartElement>(row.batch, row.head) + row.query * part.out.stride_seqlen;
    stride_dim = part.out.stride_dim;
    vectorized = part.out.vectorized;
  }
};

// exp(lse - lse of all parts) of a row's parts, from their largest reference and the sum of exp(lse - it): differences of huge numbers are exact. The
// LSE of parts that are splits is what their softmax would make of it, bit by bit. The threads of a row share out its parts; those of a row that does
// not exist come along.
struct Weights {
  float reference = 0.0f;  // 0 where all parts are empty
  float sum = 0.0f;  // 0 there
  float log2_sum = -infinity();  // -inf there
  PartLse own = {-infinity(), 0.0f};  // of the first of the thread's parts, which is not read again

  DEVICE explicit Weights(float lse) : reference(lse), sum(1.0f), log2_sum(0.0f) {}

  DEVICE Weights(const MergeParts& parts, const Row& row) {
    __shared__ float largest_of_groups[NUM_THREADS], sums_of_groups[NUM_THREADS];
    const int first = row.lane * row.groups + row.group, step = row.lanes * row.groups;
    if (first < row.num_parts) own = PartRow::load_lse(parts, row, first);
    float largest = fmaxf(own.reference, -infinity());
#pragma unroll 1
    for (int i = first + step; i < row.num_parts; i += step) largest = fmaxf(largest, PartRow::load_lse(parts, row, i).reference);
    largest = row.max(largest, largest_of_groups);
    reference = largest == -infinity() ? 0.0f : largest;
    sum = above(own) * own.sum;
#pragma unroll 1
    for (int i = first + step; i < row.num_parts; i += step) {
      const PartLse part = PartRow::load_lse(parts, row, i);
      sum += above(part) * part.sum;
    }
    sum = row.sum(sum, sums_of_groups);
    log2_sum = lg2(sum);
  }

  DEVICE float lse() const {
    if constexpr (LOG2_PARTS) return OnlineSoftmax<1, false, SHIFT_OF<Element>>::lse_of(reference, sum);
    return __fmaf_rn(log2_sum, LN_2, reference);
  }

  // Of a part that is not empty.
  DEVICE float of(const PartLse& part) const {
    if constexpr (PARTS_HAVE_SUMS) return above(part) * (part.sum / sum);  // exactly 1 where others are empty
    return ex2(__fmaf_rn(part.reference - reference, LOG2_E, -log2_sum));
  }

 private:
  DEVICE float above(const PartLse& part) const { return ex2((part.reference - reference) * (LOG2_PARTS ? 1.0f : LOG2_E)); }
};
