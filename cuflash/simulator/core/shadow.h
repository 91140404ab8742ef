// What is known of every byte of a block's shared memory: who wrote it last and who has read it since. Finds races and uninitialised reads.
//
// Contract: every access is reported here when it is issued, in the order in which the simulator executes; asynchronous accesses too, under
// the agent that owns them (see clock.h), so that a race is found however the schedule happens to turn out. State is kept per 16 bytes; a cell
// is split into single bytes when something narrower touches it, and becomes whole again when it is overwritten as a whole.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "access.h"

namespace sim {

class Cta;

// An access by an asynchronous unit, which does not happen in the order of the lane that issued it.
struct AsyncAgent {
  u32 agent, clock;
  bool proxy;           // through the asynchronous proxy (bulk copies, wgmma): ordinary accesses before it must be fenced
  bool by_warp = false;  // a wgmma, issued by all lanes together: later reports name none
  bool isa_rule = false;  // only the PTX ISA says that it makes this access
};

class SharedShadow {
 public:
  explicit SharedShadow(Cta& cta);
  void reset();

  // `lanes` of a warp (of any block of the cluster) access `bytes` bytes at the shared addresses given. `values`: what a store writes, if known.
  void access(Warp& warp, const Record* in, Access access, u32 lanes, const u32* addresses, u32 bytes, const char* what,
              const StoredValues* values = nullptr);
  // The same for asynchronous units, on behalf of one lane, with any range of bytes.
  void access_async(Warp& warp, const Record* in, Access access, u32 lane, AsyncAgent by, u32 begin, u32 bytes, const char* what);

 private:
  static constexpr u32 CELL_BYTES = 16;
  static constexpr u32 MAX_READERS = 64;

  struct Cell {
    u64 write;    // stamp of the last write, or IS_SPLIT and an index into splits_
    u64 readers;  // who has read it since: bits are numbers of reader slots
  };
  // A read by lanes of one agent; the lane in the stamp is one of them.
  struct Read {
    Stamp stamp;
    u32 lanes;
  };
  struct PartialRead {
    Read read;
    u32 bytes;
  };
  struct Split {
    Stamp write[CELL_BYTES];
    Stamp plain[CELL_BYTES];  // the last write that is not strong, which strong accesses of others may race with
    std::vector<PartialRead> reads;
  };
  struct Visit;  // the access at hand

  static constexpr u64 IS_SPLIT = ~u64(0) << 39;  // no stamp has the highest clock
  static bool is_split(const Cell& cell) { return (cell.write & IS_SPLIT) == IS_SPLIT; }
  Split& split_of(const Cell& cell) { return splits_[cell.write & ~IS_SPLIT]; }
  Split& split(Cell& cell);
  void make_whole(Cell& cell);
  Knowledge& flag_at(u32 address);
  Read* reads_of(u32 agent, u32& slot);
  u32 read_cells(const Visit& visit, Stamp stamp, u32 lanes, const u32* addresses);
  void touch(Visit& visit, u32 begin, u32 bytes);
  void touch_whole(Visit& visit, u32 index);
  void touch_split(Visit& visit, u32 index, u32 bytes);
  std::string isa_rule_of(const Visit& visit, Stamp earlier, bool earlier_writes) const;
  [[noreturn]] void race(const Visit& visit, Stamp earlier, u32 earlier_lanes, bool earlier_writes, u32 address);
  [[noreturn]] void uninitialized(const Visit& visit, u32 address);

  Cta& cta_;
  u32 begin_;  // address of the first cell
  std::vector<Cell> cells_;
  std::vector<Split> splits_;
  std::vector<u32> free_splits_;
  std::vector<u8> slot_of_agent_;
  std::vector<std::unique_ptr<Read[]>> reads_;  // [slot][cell]: the last read
  u32 num_slots_ = 0;
  std::unordered_map<u32, Knowledge> flags_;  // by address: what those knew who wrote to it by strong accesses
};

}  // namespace sim
