// The generated Config under the names that the attention kernels use. Included after `struct Config`.
#pragma once
#include "tile/operand.cuh"
#include "tile/smem_tile.cuh"

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

using TileQ = SmemTile<Mma::SmemElement, TILE_Q, HEAD_DIM>;
using TileK = SmemTile<Mma::SmemElement, TILE_KV, HEAD_DIM>;
using TileV = SmemTile<Mma::SmemElement, TILE_KV, HEAD_DIM_V>;
using TileO = SmemTile<Mma::SmemElement, TILE_Q, HEAD_DIM_V>;  // O and dO

constexpr int D_TILES = TileQ::COLUMNS / 8;  // accumulator tiles across the head dimension of Q and K
constexpr int DV_TILES = TileO::COLUMNS / 8;  // and of V and O

static_assert(TILE_Q % 16 == 0, "tile_q must be a multiple of 16");
static_assert(TILE_KV % 16 == 0, "tile_kv must be a multiple of 16");
static_assert(HAS_CP_ASYNC || NUM_STAGES == 1, "num_stages must be 1 without cp.async");
