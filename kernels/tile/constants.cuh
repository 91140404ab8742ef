// The generated Config under the names that the attention kernels use. Included after `struct Config`.
#pragma once
#include "tile/operand.cuh"
#include "tile/smem_tile.cuh"
#include "tile/softmax.cuh"

using Element = Config::Element;
using Mma = SelectMma<Element, Config::CAPABILITY, Config::ALLOW_TF32>::type;

constexpr bool CAUSAL = Config::CAUSAL;
constexpr int HEAD_DIM = Config::HEAD_DIM;      // of Q and K
constexpr int HEAD_DIM_V = Config::HEAD_DIM_V;  // of V and O
constexpr int TILE_Q = Config::TILE_Q;
constexpr int TILE_KV = Config::TILE_KV;
constexpr int NUM_WARPS = Config::NUM_WARPS;
constexpr int NUM_STAGES = Config::NUM_STAGES;
constexpr int NUM_THREADS = NUM_WARPS * WARP_SIZE;

// A wide head is cut into slices, each with a group of warps of its own, and slices into pieces (tile/slices.cuh). A narrow head is one of both.
constexpr int HEAD_SLICES = Config::HEAD_SLICES;
constexpr int SLICE_PIECES = Config::SLICE_PIECES;
constexpr int ROW_WARPS = NUM_WARPS / HEAD_SLICES;  // warps that share out the rows of a block
constexpr int SLICE_THREADS = ROW_WARPS * WARP_SIZE;

constexpr int PROBABILITY_SHIFT = SHIFT_OF<Element>;  // probabilities are multiplied by 2^PROBABILITY_SHIFT until O is normalised

constexpr int piece_of(int head_dim) { return HEAD_SLICES == 1 ? head_dim : round_up(ceil_div(head_dim, HEAD_SLICES * SLICE_PIECES), 16); }

using TileQ = SmemTile<Mma::SmemElement, TILE_Q, piece_of(HEAD_DIM)>;
using TileK = SmemTile<Mma::SmemElement, TILE_KV, piece_of(HEAD_DIM)>;
using TileV = SmemTile<Mma::SmemElement, TILE_KV, piece_of(HEAD_DIM_V)>;
using TileO = SmemTile<Mma::SmemElement, TILE_Q, piece_of(HEAD_DIM_V)>;  // O and dO

constexpr int D_TILES = SLICE_PIECES * TileQ::COLUMNS / 8;   // a group's accumulator tiles across the head dimension of Q and K
constexpr int DV_TILES = SLICE_PIECES * TileO::COLUMNS / 8;  // and of V and O

static_assert(TILE_Q % 16 == 0, "tile_q must be a multiple of 16");
static_assert(TILE_KV % 16 == 0, "tile_kv must be a multiple of 16");
static_assert(HAS_CP_ASYNC || NUM_STAGES == 1, "num_stages must be 1 without cp.async");
static_assert(NUM_WARPS % HEAD_SLICES == 0, "num_warps must be a multiple of the slices of a wide head");
static_assert(SLICE_PIECES == 1 || (HEAD_SLICES > 1 && NUM_STAGES == 1), "num_stages must be 1 where a wide head passes in pieces");
