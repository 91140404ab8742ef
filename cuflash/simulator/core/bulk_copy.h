// Bulk copies: the engine that moves what cp.async.bulk, its tensor and reducing forms, st.async and red.async have issued.
//
// Contract: whoever issues a copy checks its addresses and reports its accesses to the race detector first, in the name of the mbarrier that it
// completes on (`Mbarriers::agent`) or of the warp's bulk copies (`group_agent`), and then hands it to `start`. The bytes are read and written
// later: schedule EARLY at once, LATE when nobody can go on without them, RANDOM at any moment between.
#pragma once

#include "mbarrier.h"
#include "reduction.h"

namespace sim {

// Contiguous bytes of a copy.
struct Piece {
  u8* to;
  const u8* from;
  u32 bytes;
};

constexpr u32 NO_RANK = ~0u;

struct BulkCopy {
  Place place;         // of the lane that issued it
  u32 warp, lane;      // in the cluster
  Mbarrier* barrier;   // that it completes on; null when it belongs to a bulk group
  u32 bytes;           // that it brings the mbarrier
  Reduction reduction;  // null for a plain copy
  u32 source_rank;     // of the block whose shared memory it reads, or NO_RANK
  std::vector<Piece> pieces;
  std::vector<u8> values;  // of st.async, red.async, and of a copy of a bulk group whose source was read
  // Copies of bulk groups only:
  u32 clock;         // of the warp's bulk copies
  u32 group;         // number of the commit that closed it, or OPEN
  bool read;         // the source was read
  bool read_waited;  // the lane waited for that
};

class BulkCopies final : public Engine {
 public:
  explicit BulkCopies(Cluster& cluster);

  void reset() override;
  bool step(Random& random) override;
  void check_exit(Warp& warp, const Record* in, u32 lanes) override;

  void start(BulkCopy&& copy);
  AsyncAgent group_agent(const Warp& warp);  // with the clock of a new copy
  void commit(const Warp& warp, u32 lanes);
  // Until at most `allowed` of the newest groups of every lane are left, or, with `read_only`, have a source that is still read.
  void wait(Warp& warp, u32 lanes, u32 allowed, bool read_only);

 private:
  void read_source(BulkCopy& copy);
  void finish(BulkCopy& copy);

  Cluster& cluster_;
  Schedule schedule_;
  std::vector<BulkCopy> copies_;              // outstanding, oldest first
  std::vector<std::array<u32, LANES>> commits_;  // of each warp and lane
};

// A copy into shared memory of one block: its destination, and the mbarrier that it completes on.
struct Destination {
  Cta* cta;
  u32 to, mbarrier;  // addresses in that block
};

// The blocks that a copy goes to: that of the addresses, or with `multicast` all of a mask, at the same addresses in each of them.
std::vector<Destination> find_destinations(Warp& warp, const Record* in, u32 lane, u32 to, u32 mbarrier, bool multicast, u32 mask, const char* what);

BulkCopy make_bulk_copy(Warp& warp, const Record* in, u32 lane);

// A checked range of global memory.
u8* global_range(Warp& warp, const Record* in, u32 lane, u64 address, Use use);
u64 global_address(const Warp& warp, const u16* operand, u32 lane);

// In field c of the records of copies.
constexpr u16 MULTICAST = 1;
constexpr u32 OPERATION_SHIFT = 4, ELEMENT_SHIFT = 8, NO_OPERATION = 15;
SIM_INLINE u32 operation_of(const Record* in) { return in->c >> OPERATION_SHIFT & 15u; }

}  // namespace sim
