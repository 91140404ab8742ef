// Before the backward kernels: what they need of every query row, in one pass over O and dO.
//
//     delta = sum over d of dO * O - grad_lse        reference = lse log2(e), +inf where no key was seen
//
// With an additive mask backward_row_sums_mma.cu replaces the reference.
//
// Before the fused kernel it also sets all turns to 0 (tile/query_sums.cuh).
//
// The gradient of LSE is P, so a gradient that flows in through LSE joins dS = P (dP - delta) as part of delta.
// Each row belongs to LANES neighbouring lanes that take 16-byte chunks of it in turn.
#include "arguments.cuh"
#include "ptx/warp.cuh"
#include "tile/load.cuh"
#include "tile/schedule.cuh"

using Element = Config::Element;

constexpr int NUM_THREADS = Config::NUM_WARPS * WARP_SIZE;
constexpr int CHUNK_ELEMENTS = 16 / int(sizeof(Element));
constexpr int CHUNKS = ceil_div(Config::HEAD_DIM_V, CHUNK_ELEMENTS);
constexpr int LANES = CHUNKS <= 1 ? 1 : CHUNKS <= 2 ? 2 : CHUNKS <= 4 ? 4 : CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32;
static_assert(Config::TILE_Q == NUM_THREADS / LANES, "rows of a block differ from the plan's");

DEVICE Chunk load_chunk(const Element* pointer, const TensorView& view, int valid) {
  if (is_vectorized(view) && valid == CHUNK_ELEMENTS) return *reinterpret_cast<const Chunk*>(pointer);
  return gather_chunk<Element>(pointer, view.stride_dim, valid);
}

template <typename T>
DEVICE float chunk_element(const Chunk& chunk, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(chunk.word[i]);
  } else {
    T element;
    element.bits = uint16(chunk.word[i / 2] >> (16 * (i % 2)));
    return to_float(element);
  }
}

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1) backward_delta(const __grid_constant__ BackwardArguments arguments) {
  const Geometry& geometry = arguments.geometry;
  if constexpr (Config::CLEARS_TURNS) {
    for (int turn = int(blockIdx.x) * NUM_THREADS + int(threadIdx.x); turn < arguments.num_turns; turn += int(gridDim.x) * NUM_THREADS)
      arguments.turns[turn] = 0;
  }
  const Work work = work_of_block(geometry.num_tiles, geometry.num_heads_q);
  const int query = work.tile * Config::TILE_Q + int(threadIdx.x) / LANES;
  const bool in_range = query < geometry.seqlen_q;

  float delta = 0.0f;
  if (in_range) {
    const Element* O_row = arguments.out.row_pointer<const Element>(work.batch, work.head) + query * arguments.out.stride_seqlen;
    const Element* dO_row = arguments.grad_out.row_pointer<const Element>(work.batch, work.head) + query * arguments.grad_out.stride_seqlen;
#pragma unroll 1
    for (int chunk = int(threadIdx.x) % LANES; chunk < CHUNKS; chunk += LANES) {
      const int column = chunk * CHUNK_ELEMENTS;
      const int valid = min(Config::HEAD_DIM_V - column, CHUNK_ELEMENTS);
      const Chunk O = load_chunk(O_row + column * arguments.out.stride_dim, arguments.out, valid);
      const Chunk dO = load_chunk(dO_row + column * arguments.grad_out.stride_dim, arguments.grad_out, valid);
#pragma unroll
      for (int i = 0; i < CHUNK_ELEMENTS; ++i) delta += chunk_element<Element>(O, i) * chunk_element<Element>(dO, i);
    }
  }
#pragma unroll
  for (int lane_mask = LANES / 2; lane_mask > 0; lane_mask /= 2) delta += shfl_xor(delta, lane_mask);

  if (in_range && threadIdx.x % LANES == 0) {
    const float lse = *arguments.lse.pointer(work.batch, work.head, query);
    if (arguments.grad_lse.data != nullptr) delta -= *arguments.grad_lse.pointer(work.batch, work.head, query);
    const int64 row = (int64(work.batch) * geometry.num_heads_q + work.head) * geometry.seqlen_q + query;
    arguments.row_statistics[row] = {lse == -infinity() ? infinity() : lse * LOG2_E, lse == -infinity() ? 0.0f : delta};
  }
}
