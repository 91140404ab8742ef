// What is known of every byte of global memory during a launch: which block wrote it, which have read it, and whether anybody ever wrote it.
// Finds races between blocks and reads of memory that nobody has initialised.
//
// Contract: one object for a launch, shared by its host threads. Blocks of a cluster count as one. Two blocks are ordered only by strong accesses
// (atomics, volatile, acquire, release) together with fences: who reads a flag, and then executes a fence, knows the blocks that wrote it
// after a fence, and those that they knew. State is kept per 16 bytes; cells whose bytes have different histories are kept as lists.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "access.h"

namespace sim {

class GlobalShadow {
 public:
  explicit GlobalShadow(const LaunchDescription& launch);
  ~GlobalShadow();
  GlobalShadow(const GlobalShadow&) = delete;

  // `lanes` access `bytes` bytes each at global addresses that lie in buffers; `guess` is the buffer that is tried first.
  void access(Warp& warp, const Record* in, Use use, u32 lanes, const u64* addresses, u32 guess);
  // A block executes a fence that is wider than itself.
  void fence(Cluster& cluster);

 private:
  static constexpr u32 CELL_BYTES = 16, MANY = 0xffffff, NUM_LOCKS = 256;

  // Who accessed bytes of a cell, in 64 bits. 0: nobody.
  struct Trace {
    u64 word;
    static Trace make(u32 block, bool strong, u32 record, u32 bytes) {
      return {u64(block + 1) << 40 | u64(strong) << 39 | u64(record & 0x3fffff) << 16 | bytes};
    }
    u32 block() const { return u32(word >> 40) - 1; }  // MANY - 1 for several
    bool several() const { return word >> 40 == MANY; }
    bool strong() const { return word >> 39 & 1; }
    u32 record() const { return u32(word >> 16) & 0x3fffff; }
    u32 bytes() const { return u32(word) & 0xffff; }
    Trace of_several() const { return {word | u64(MANY) << 40}; }
    Trace with_bytes(u32 bytes) const { return {word | bytes}; }
  };
  struct Cell {
    u64 write, read;
  };
  struct History {
    std::vector<Trace> writes, reads;
  };
  static constexpr u64 IN_LIST = ~u64(0);

  struct Shadow {  // of a buffer
    u64 begin, end, first_cell;
    Cell* cells;  // null: too large
    size_t mapped_bytes;
    u8* written;  // one per byte, or null: initialised
  };
  struct Visit {
    Warp& warp;
    const Record* in;
    Use use;
    u32 lane;
    u64 address;
    u32 block;
  };

  void touch(const Visit& visit, const Shadow& shadow, u64 cell, u32 bytes);
  void touch_list(const Visit& visit, u64 key, u32 bytes, Trace mine);
  bool ordered(const Visit& visit, Trace earlier) const;
  void check_written(const Visit& visit, const Shadow& shadow) const;
  void synchronize(const Visit& visit);
  [[noreturn]] void race(const Visit& visit, Trace earlier, bool earlier_writes) const;

  const LaunchDescription& launch_;
  std::vector<Shadow> shadows_;
  std::mutex locks_[NUM_LOCKS];
  std::mutex lists_lock_, flags_lock_;
  std::unordered_map<u64, History> lists_;                    // by address of the cell
  std::unordered_map<u64, std::vector<std::shared_ptr<const std::unordered_set<u32>>>> flags_;  // by address: blocks known to those who wrote it
};

}  // namespace sim
