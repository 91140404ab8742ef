// What a profiled launch counts: for each record how often it was issued and waited and what memory traffic it caused, for each buffer who
// moved how much.
//
// Contract: a block of a launch that is not profiled has no Profile, and nothing is counted. Executions and waits are counted by the run loop in
// cluster.cpp, traffic where addresses are resolved (access.cpp), and by the instruction itself where its `Use` says so.
//
// The model of shared memory: 32 banks of 4 bytes; one wavefront gives or takes one word per bank. A request of up to 4 bytes per lane is served
// for the whole warp, of 8 bytes for each half, of 16 bytes for each quarter (ldmatrix: eight rows of 16 bytes). Lanes at the same word share it.
// The model of global memory: a request moves every 32-byte sector that it touches once. Device memory is aligned to 256 bytes, host memory to 16,
// so the first byte of a buffer counts as the start of a sector, but for what its address is above a multiple of 16.
#pragma once

#include <vector>

#include "access.h"

namespace sim {

class Profile {
 public:
  Profile(const Program& program, const LaunchDescription& launch);

  void issued(u32 record, u64 matrix_flops) { ++records_[record].issued, records_[record].matrix_flops += matrix_flops; }
  void waited(u32 record) { ++records_[record].waits; }
  // One request: `lanes` access `bytes` bytes each. Atomics count as writes.
  void shared(u32 record, Access access, u32 lanes, const u32* addresses, u32 bytes);
  void global(u32 record, Access access, u32 lanes, const u64* addresses, u32 bytes);
  // The same with a number of bytes for each lane.
  void global(u32 record, Access access, u32 lanes, const u64* addresses, const u32* bytes);
  // Adds everything to the arrays of the launch.
  void add_to(const LaunchDescription& launch) const;

 private:
  static constexpr u32 NO_BUFFER = ~0u;  // without checks, memory of nobody
  bool inside(u32 buffer, u64 address) const;
  u32 buffer_of(u64 address) const;

  const LaunchDescription& launch_;
  std::vector<RecordProfile> records_;
  std::vector<BufferProfile> buffers_;
};

}  // namespace sim
