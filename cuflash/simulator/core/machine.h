// The state of a running block: warps, groups of converged lanes, barriers, shared memory; and what handlers may do with it.
//
// Contract: a handler executes one record for the active lanes of a warp and returns the record to continue with, or nullptr after it
// called `block` (this group cannot go on yet: the record is executed again later), `regroup` (groups changed) or `leave`.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <memory>
#include <string>
#include <vector>

#include "clock.h"
#include "program.h"

namespace sim {

class Cluster;
class Cta;
class Profile;
class SharedShadow;
struct Warp;
using Handler = const Record* (*)(Warp&, const Record*);

// A check that fired: thrown by handlers, turned into a Report by launch.cpp.
struct Failure {
  const char* check;
  std::string message;
  Place where;
  u64 address = 0, bytes = 0;
  std::vector<Place> places;
};

// xorshift64*: one per cluster, so that its schedule does not depend on the number of threads.
struct Random {
  u64 state;
  explicit Random(u64 seed) : state(seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull) { next(), next(); }
  u32 next() {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return u32((state * 0x2545f4914f6cdd1dull) >> 32);
  }
  u32 below(u32 limit) { return u32((u64(next()) * limit) >> 32); }
};

// Lanes of a warp that are at the same record.
struct Group {
  u32 record;
  u32 lanes;
  u32 ticket;    // nonzero: arrived at a barrier, waiting for this generation of it
  bool partial;  // waits for other lanes of its warp
  bool waiting = false;  // could not go on when it was last tried
};

enum class Event : u8 { NONE, BLOCKED, REGROUP, POLLED };

// An asynchronous engine: it owns work that instructions have issued and does it later. One per kind of work and cluster.
struct Engine {
  virtual ~Engine() = default;
  virtual void reset() = 0;
  // Completes one piece of outstanding work, chosen by `random`; false when there is none that may complete on its own.
  virtual bool step(Random& random) = 0;
  // Throws a Failure when lanes leave the kernel with work that nothing waited for.
  virtual void check_exit(Warp& warp, const Record* in, u32 lanes) = 0;
  // Appends "; …" for what somebody waits for, when nobody can go on.
  virtual void describe_stall(std::string&) const {}
};

struct Warp {
  u8* registers;
  const u8* constants;
  u32* predicates;
  const u16* extra;
  Cta* cta;
  u8* local;         // [lane][local_bytes]
  u8* local_written;  // the same, 1 for bytes that were written; with checks only
  u32 id;            // in its block
  u32 index;         // in its cluster
  u32 active;        // lanes of the running group
  u32 live;          // lanes that have not exited
  u32 present;       // lanes that ever existed
  u32 running;       // index of the running group
  u32 num_groups;
  Event event;
  bool polling;      // has looked in vain for something to happen, and not found it since
  u64 executed;      // records executed
  u64 uncounted;     // of these, records that are no instructions
  u64 clock;
  u32 carry;         // per lane, of add.cc and its kin
  Group groups[LANES];
  WarpKnowledge knowledge;  // valid with checks only

  template <class T> SIM_INLINE T* row(u16 operand) const {
    const u8* bank = operand & CONSTANT ? constants : registers;
    return (T*)(bank + size_t(operand & 0x7fff) * ROW_BYTES);
  }
  // Active lanes whose guard is true.
  SIM_INLINE u32 mask(const Record* in) const {
    const u32 guard = predicates[in->guard & 0x7fff];
    return active & (in->guard & NEGATED ? ~guard : guard);
  }
  SIM_INLINE void set_predicate(u32 number, u32 lanes, u32 value) { predicates[number] = (predicates[number] & ~lanes) | (value & lanes); }
  SIM_INLINE const Record* block() {
    event = Event::BLOCKED;
    return nullptr;
  }
  SIM_INLINE const Record* regroup() {
    event = Event::REGROUP;
    return nullptr;
  }
  // Goes on at `next`, but not before others had their turn: this warp looks for something that has not happened yet.
  const Record* poll_again(const Record* next);
  // For instructions that all of `needed` must execute together: true when they are here. When not, return `wait_for_lanes`.
  SIM_INLINE bool together(u32 mask, u32 needed) const { return SIM_LIKELY((needed & ~mask) == 0); }
  const Record* wait_for_lanes(const Record* in, u32 needed);
  // The common case: every lane of the warp.
  SIM_INLINE bool whole(u32 mask) const { return SIM_LIKELY(mask == ALL_LANES); }

  [[noreturn]] void fail(const Record* in, const char* check, u32 lanes, const char* format, ...) const __attribute__((format(printf, 5, 6)));
};

// One of the 16 named barriers of a block.
struct Barrier {
  u32 arrived;     // threads
  u32 expected;    // threads; 0 while nobody waits
  u32 generation;  // completed phases
  u32 votes_any, votes_all, count;
  u32 result_any[2], result_all[2], result_count[2];  // of the last two generations, for bar.red
  Knowledge arriving, completed[2];                   // of those that arrived, and of the last two generations
};

struct MatrixScratch;

class Cta {
 public:
  Cta(Cluster& cluster, u32 rank);
  ~Cta();
  void reset(u32 x, u32 y, u32 z);
  void describe_stall(std::string& text) const;

  Cluster* cluster;
  const Program& program;
  const LaunchDescription& launch;
  u32 rank;  // in the cluster
  u32 block[3];
  u32 num_threads, num_warps;
  std::vector<Warp> warps;
  Barrier barriers[16];
  u8* shared;                       // indexed by shared address
  u32 shared_begin, shared_end;     // addresses that a kernel may touch
  bool checks;
  CounterValues counters{};
  std::vector<u8> last_buffer;      // per record: the buffer that it touched last, a guess for the bounds check
  std::unique_ptr<MatrixScratch> matrix;
  std::unique_ptr<SharedShadow> shadow;  // null without checks
  Profile* profile;                      // of the cluster; null if the launch is not profiled

  u32 record_index(const Record* in) const { return u32(in - program.records.data()); }
  bool exited() const {
    return std::all_of(warps.begin(), warps.end(), [](const Warp& warp) { return warp.num_groups == 0; });
  }
  // Whether the block ends when these lanes of the warp exit.
  bool ends_with(const Warp& leaving, u32 lanes) const {
    return leaving.live == lanes &&
           std::all_of(warps.begin(), warps.end(), [&](const Warp& warp) { return &warp == &leaving || warp.num_groups == 0; });
  }

 private:
  std::unique_ptr<u8[]> memory_;
};

// A row of results goes into register `d`, for the lanes of `mask`.
template <class T> SIM_INLINE void commit(Warp& warp, u16 d, u32 mask, const T* values) {
  T* target = warp.row<T>(d);
  if (SIM_LIKELY(mask == ALL_LANES)) {
    memcpy(target, values, LANES * sizeof(T));
    return;
  }
  for (int lane = 0; lane < LANES; ++lane) target[lane] = mask >> lane & 1 ? values[lane] : target[lane];
}

}  // namespace sim
