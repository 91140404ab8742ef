// dQ as blocks with different keys add it up: float32 in global memory, in a fixed order.
//
// A block that has dS of a tile of queries and its own keys computes dS K and adds it to the tile's sum, when it is its turn. The turn of a tile
// counts the blocks that have added to it. The block of the first keys that any of the tile's queries see stores, and the others add in the order of
// their keys, so every sum is the same bit for bit on every run.
//
// Nobody waits for ever: a block waits for blocks of the same head with earlier keys only, all of which have started, since work is given out in the
// order in which blocks start (work_of_ticket), and the first of those that are not done waits for nobody. Turns are counted, not set, and a block
// goes on when its own predecessors may have added: offsets of packed sequences that make no sense give senseless sums, but no block that waits for
// ever.
//
//     turns [1 + slots]: how many blocks have started, then the turns, 0 before the kernel starts (backward_delta.cu)
//     query_sums [slots][TILE_Q / 16][D_TILES] accumulator tiles m16n8, each as it lies in registers: nothing but the kernels reads it
//
// backward_wgmma.cu computes Kᵀ dSᵀ: its tiles are those of dQᵀ (TRANSPOSED_SUMS), [slots][D_TILES / 2][TILE_Q / 8].
//
// Slots are [batch][head][tiles of TILE_Q queries], of packed sequences [head][tiles], where the tiles of a sequence start behind all that those
// before it can have.
#pragma once
#include "arguments.cuh"
#include "ptx/global.cuh"
#include "ptx/memory.cuh"
#include "ptx/warp.cuh"
#include "tile/constants.cuh"
#include "tile/sequence.cuh"

constexpr bool TRANSPOSED_SUMS = Config::TRANSPOSED_SUMS;
constexpr int SUM_COLUMN_TILES = TRANSPOSED_SUMS ? TILE_Q / 8 : D_TILES;  // side by side, of 8 queries or of 8 columns of the head
constexpr int FRAGMENT_FLOATS = 128;
constexpr int SLOT_FLOATS = TILE_Q / 16 * D_TILES * FRAGMENT_FLOATS;

// The slot of the first tile of (batch, head), or of (sequence, head), whose queries start at row start_q of the packed ones.
template <typename Arguments>
DEVICE int first_slot(const Arguments& arguments, int batch, int head, int start_q) {
  const int tiles = (arguments.geometry.seqlen_q + TILE_Q - 1) / TILE_Q;
  if constexpr (VARLEN) return head * (tiles + arguments.lengths.num_sequences) + start_q / TILE_Q + batch;
  return (batch * arguments.geometry.num_heads_q + head) * tiles;
}

// Where this lane's numbers of accumulator tile n of 16 rows, of dQ or of dQᵀ, are: four neighbours where they are added at once, else one for each
// quarter of the fragment, so that every access of a warp is to neighbours.
template <typename Arguments>
DEVICE float* query_sum(const Arguments& arguments, int slot, int row_tile, int n) {
  return arguments.query_sums + int64(slot) * SLOT_FLOATS + (row_tile * SUM_COLUMN_TILES + n) * FRAGMENT_FLOATS +
         lane_index() * (HAS_VECTOR_RED ? 4 : 1);
}

DEVICE void store_fragment(float* sum, const float (&c)[4]) {
#if HAS_VECTOR_RED
  *reinterpret_cast<float4*>(sum) = make_float4(c[0], c[1], c[2], c[3]);
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i * WARP_SIZE] = c[i];
#endif
}

DEVICE void add_fragment(float* sum, const float (&c)[4]) {
#if HAS_VECTOR_RED
  add_relaxed(sum, c);
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) add_relaxed(sum + i * WARP_SIZE, c[i]);
#endif
}

DEVICE void load_fragment(const float* sum, float (&c)[4]) {
#if HAS_VECTOR_RED
  const float4 four = *reinterpret_cast<const float4*>(sum);
  c[0] = four.x;
  c[1] = four.y;
  c[2] = four.z;
  c[3] = four.w;
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = sum[i * WARP_SIZE];
#endif
}

// The same numbers of accumulator tile n of 16 rows of dQ, from where those of dQᵀ lie.
template <typename Arguments>
DEVICE void load_transposed_fragment(const Arguments& arguments, int slot, int row_tile, int n, float (&c)[4]) {
  static_assert(!TRANSPOSED_SUMS || HAS_VECTOR_RED, "four neighbours of a fragment lie together");
  const float* sums = arguments.query_sums + int64(slot) * SLOT_FLOATS;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int query = 16 * row_tile + i / 2 * 8 + lane_index() / 4, column = 8 * n + lane_index() % 4 * 2 + i % 2;
    const int lane = column % 8 * 4 + query % 8 / 2, place = column % 16 / 8 * 2 + query % 2;  // that hold it
    c[i] = sums[(column / 16 * SUM_COLUMN_TILES + query / 8) * FRAGMENT_FLOATS + lane * 4 + place];
  }
}

// The number of this block among those that start. A barrier stands before the next use of `scratch`.
template <typename Arguments>
DEVICE int take_ticket(const Arguments& arguments, SmemAddress scratch) {
  if (threadIdx.x == 0) store_shared(scratch, uint32(fetch_add_relaxed(arguments.turns, 1)));
  __syncthreads();
  return int(__float_as_uint(load_shared_f32(scratch)));
}

// For a thread that does nothing else: waits until `place` blocks have added to a tile, and after that all that this block adds comes behind them.
DEVICE void wait_for_turn(const int* turn, int place) {
  while (load_relaxed(turn) < place) {
  }
  fence_gpu();
}

// When it knows that all of the block's additions to the tile are issued.
DEVICE void pass_turn_on(int* turn) {
  fence_gpu();
  add_relaxed(turn, 1);
}

// The part of one thread in the block's turns, where it computes, too. It looks for its turn early and comes back to it when the sum is wanted; it
// passes the turn on a step after the block has added, when the additions have long arrived.
class TurnTaker {
 public:
  DEVICE explicit TurnTaker(int* turns) : turns(turns + 1) {}

  DEVICE void look(int slot) {
    if (threadIdx.x == 0) seen = load_relaxed(turns + slot);
  }

  // Behind the look and a barrier at which all additions of the step before were issued.
  DEVICE void pass_on() {
    if (threadIdx.x != 0) return;
    fence_gpu();  // behind what the block has added and the look, before the turn is passed on and the block adds
    add_turn();
  }

  // Before the barrier behind which the block adds; `place` blocks add before it.
  DEVICE void take(int slot, int place) {
    if (threadIdx.x != 0) return;
    if (seen < place) {
      do {
        seen = load_relaxed(turns + slot);
      } while (seen < place);
      fence_gpu();  // behind the last look
    }
    added_to = slot;
  }

  // At the end, behind a barrier.
  DEVICE void finish() {
    if (threadIdx.x != 0 || added_to < 0) return;
    fence_gpu();
    add_turn();
  }

 private:
  int* turns;
  int seen = 0;
  int added_to = -1;  // what the block has added to last, whose turn it still holds

  DEVICE void add_turn() {
    if (added_to >= 0) add_relaxed(turns + added_to, 1);
  }
};
