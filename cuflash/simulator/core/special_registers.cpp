// See special_registers.h. Registers that change while a block runs (%clock) are instructions instead, in control.cpp.
#include "special_registers.h"

#include "cluster.h"

namespace sim {
namespace {

using Value = u32 (*)(const Cta&, const Warp&, u32 lane);

u32 thread(const Warp& warp, u32 lane) { return warp.id * LANES + lane; }

u32 cta_index(const Cta& cta) { return cta.block[0] + cta.launch.grid[0] * (cta.block[1] + cta.launch.grid[1] * cta.block[2]); }

struct SpecialRegister {
  const char* name;
  Value value;
};

const SpecialRegister REGISTERS[] = {
    {"%tid.x", [](const Cta& cta, const Warp& warp, u32 lane) { return thread(warp, lane) % cta.launch.block[0]; }},
    {"%tid.y", [](const Cta& cta, const Warp& warp, u32 lane) { return thread(warp, lane) / cta.launch.block[0] % cta.launch.block[1]; }},
    {"%tid.z", [](const Cta& cta, const Warp& warp, u32 lane) { return thread(warp, lane) / cta.launch.block[0] / cta.launch.block[1]; }},
    {"%ntid.x", [](const Cta& cta, const Warp&, u32) { return cta.launch.block[0]; }},
    {"%ntid.y", [](const Cta& cta, const Warp&, u32) { return cta.launch.block[1]; }},
    {"%ntid.z", [](const Cta& cta, const Warp&, u32) { return cta.launch.block[2]; }},
    {"%ctaid.x", [](const Cta& cta, const Warp&, u32) { return cta.block[0]; }},
    {"%ctaid.y", [](const Cta& cta, const Warp&, u32) { return cta.block[1]; }},
    {"%ctaid.z", [](const Cta& cta, const Warp&, u32) { return cta.block[2]; }},
    {"%nctaid.x", [](const Cta& cta, const Warp&, u32) { return cta.launch.grid[0]; }},
    {"%nctaid.y", [](const Cta& cta, const Warp&, u32) { return cta.launch.grid[1]; }},
    {"%nctaid.z", [](const Cta& cta, const Warp&, u32) { return cta.launch.grid[2]; }},
    {"%laneid", [](const Cta&, const Warp&, u32 lane) { return lane; }},
    {"%warpid", [](const Cta&, const Warp& warp, u32) { return warp.id; }},
    {"%nwarpid", [](const Cta& cta, const Warp&, u32) { return cta.num_warps; }},
    {"%smid", [](const Cta& cta, const Warp&, u32) { return cta_index(cta); }},
    {"%nsmid", [](const Cta& cta, const Warp&, u32) { return cta.launch.grid[0] * cta.launch.grid[1] * cta.launch.grid[2]; }},
    {"%gridid", [](const Cta&, const Warp&, u32) { return 1u; }},
    {"%lanemask_eq", [](const Cta&, const Warp&, u32 lane) { return 1u << lane; }},
    {"%lanemask_lt", [](const Cta&, const Warp&, u32 lane) { return (1u << lane) - 1; }},
    {"%lanemask_le", [](const Cta&, const Warp&, u32 lane) { return (1u << lane) | ((1u << lane) - 1); }},
    {"%lanemask_gt", [](const Cta&, const Warp&, u32 lane) { return ~((1u << lane) | ((1u << lane) - 1)); }},
    {"%lanemask_ge", [](const Cta&, const Warp&, u32 lane) { return ~((1u << lane) - 1); }},
    {"%dynamic_smem_size", [](const Cta& cta, const Warp&, u32) { return cta.launch.dynamic_shared_bytes; }},
    {"%total_smem_size", [](const Cta& cta, const Warp&, u32) { return cta.shared_end - cta.shared_begin; }},
    {"%clusterid.x", [](const Cta& cta, const Warp&, u32) { return cta.block[0] / cta.launch.cluster[0]; }},
    {"%nclusterid.x", [](const Cta& cta, const Warp&, u32) { return cta.launch.grid[0] / cta.launch.cluster[0]; }},
    {"%cluster_ctaid.x", [](const Cta& cta, const Warp&, u32) { return cta.block[0] % cta.launch.cluster[0]; }},
    {"%cluster_nctaid.x", [](const Cta& cta, const Warp&, u32) { return cta.launch.cluster[0]; }},
    {"%clusterid.y", [](const Cta& cta, const Warp&, u32) { return cta.block[1] / cta.launch.cluster[1]; }},
    {"%nclusterid.y", [](const Cta& cta, const Warp&, u32) { return cta.launch.grid[1] / cta.launch.cluster[1]; }},
    {"%cluster_ctaid.y", [](const Cta& cta, const Warp&, u32) { return cta.block[1] % cta.launch.cluster[1]; }},
    {"%cluster_nctaid.y", [](const Cta& cta, const Warp&, u32) { return cta.launch.cluster[1]; }},
    {"%clusterid.z", [](const Cta& cta, const Warp&, u32) { return cta.block[2] / cta.launch.cluster[2]; }},
    {"%nclusterid.z", [](const Cta& cta, const Warp&, u32) { return cta.launch.grid[2] / cta.launch.cluster[2]; }},
    {"%cluster_ctaid.z", [](const Cta& cta, const Warp&, u32) { return cta.block[2] % cta.launch.cluster[2]; }},
    {"%cluster_nctaid.z", [](const Cta& cta, const Warp&, u32) { return cta.launch.cluster[2]; }},
    {"%cluster_ctarank", [](const Cta& cta, const Warp&, u32) { return cta.rank; }},
    {"%cluster_nctarank", [](const Cta& cta, const Warp&, u32) { return cta.cluster->size; }},
};
constexpr u32 NUM_REGISTERS = sizeof REGISTERS / sizeof REGISTERS[0];

}  // namespace

const char* special_register_name(u32 number) { return number < NUM_REGISTERS ? REGISTERS[number].name : nullptr; }

void fill_special_register(const Cta& cta, Warp& warp, u32 number, u16 row) {
  u32* lanes = warp.row<u32>(row);
  for (u32 lane = 0; lane < LANES; ++lane) lanes[lane] = REGISTERS[number].value(cta, warp, lane);
}

}  // namespace sim
