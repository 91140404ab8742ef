// What Python hands to the core: a decoded kernel and one launch of it.
//
// Contract: plain data; the layouts of the `extern "C"` structs are mirrored in native.py.
#pragma once

#include <memory>
#include <vector>

#include "lanes.h"

namespace sim {

// One instruction. Operands are rows of 32 lanes: a register's row, or with the top bit set a row of the constant bank; predicates are
// numbers of 32-bit masks. `x` is whatever the instruction wants: an immediate, a jump target, the start of further operands in `extra`.
struct Record {
  u16 op;
  u16 guard;  // predicate number, top bit: negated; predicate 0 is always true
  u16 d, a, b, c;
  i32 x;
};
static_assert(sizeof(Record) == 16);

constexpr u16 CONSTANT = 0x8000;
constexpr u16 NEGATED = 0x8000;

// One register operand of a record, to be replaced by its row once rows are allocated.
struct Operand {
  u32 position;  // index into the records as 16-bit words, or with the top bit set into `extra`
  u32 record;
  u32 reg;  // virtual register * 2 + is_definition
};

extern "C" struct ProgramDescription {
  const Record* records;
  const u16* extra;
  const Operand* operands;
  const u8* widths;      // per virtual register: 1, 32 or 64 bits
  const u64* constants;  // value of each constant; bit i of `wide` says 64 bits
  const u8* wide;
  const u32* special;  // pairs: number of a special register, virtual register that holds it
  const u32* jumps;    // pairs: record, record it may continue at
  u32 num_records, num_extra, num_operands, num_registers, num_constants, num_special, num_jumps;
  u32 local_bytes, shared_begin;
};

struct alignas(64) Row {
  u8 bytes[ROW_BYTES];
};

// A record that may touch a register too early or too late for a wgmma: see wgmma_hazards.cpp.
struct WgmmaHazard {
  u32 record;
  u16 op;  // of the record, whose own says "wgmma.hazard"
  const char *check, *message;
  u32 other;  // the record that it collides with, or NO_RECORD
};

struct Program {
  std::vector<Record> records;  // and one behind them, which no kernel reaches
  std::vector<u16> extra;
  std::vector<Row> constants;  // each repeated over the lanes
  std::vector<std::pair<u32, u16>> special;
  std::vector<u16> poisoned_rows;  // rows that may be read before they are written
  u32 num_rows = 0, num_predicates = 1, local_bytes = 0, shared_begin = 0;
  std::vector<WgmmaHazard> wgmma_hazards;  // in the order of records
  bool uses_mbarriers = false, uses_wgmma = false;
};

// Throws InvalidProgram (validate.h) if the description does not make sense.
std::unique_ptr<Program> make_program(const ProgramDescription& description);

// Gives every virtual register a row (or a predicate number) by liveness and writes it into the records. `in_flight`: registers and records at
// which a wgmma uses them though no instruction names them. See allocate.cpp.
struct Flow;
void allocate_rows(const ProgramDescription& description, const Flow& flow, const std::vector<std::pair<u32, u32>>& in_flight, Program& program);

struct Buffer {
  u64 begin, end;
  u8* written;  // one per byte: not 0 once it was written; null when all of it is initialised
};

// Requests of warps for memory. `used`: wavefronts of shared memory or sectors of global memory; `ideal`: the fewest that would have done.
extern "C" struct Traffic {
  u64 requests, used, ideal;
};

// What a profiled launch counts of one record.
extern "C" struct RecordProfile {
  u64 issued, waits, matrix_flops;
  Traffic shared_reads, shared_writes, global_reads, global_writes;
};

// The same of one buffer: bytes that were asked for, those of a request that lanes share once, and 32-byte sectors that were moved.
extern "C" struct BufferProfile {
  u64 bytes_read, sectors_read, bytes_written, sectors_written;
};

enum class Schedule : i32 { EARLY = 0, LATE = 1, RANDOM = 2 };

extern "C" struct LaunchDescription {
  u32 grid[3], block[3], cluster[3];  // cluster: blocks that run together, 1 1 1 for none
  const u8* params;
  const Buffer* buffers;
  u32 param_bytes, num_buffers;
  u32 shared_end;  // first byte after dynamic shared memory
  u32 dynamic_shared_bytes;
  i32 threads;
  Schedule schedule;
  u64 seed;
  i32 checks;
  i32 isa_rules;  // with checks: report also what the PTX ISA demands but NVIDIA's own kernels leave out
  u64 max_instructions;            // that a warp may execute
  RecordProfile* record_profiles;  // one per record, added to; null for a launch that is not profiled
  BufferProfile* buffer_profiles;  // one per buffer
  i32 ends_on_interrupt;           // of a launch outside of the interpreter's main thread, see interrupt.h
};

extern "C" struct CounterValues {
  u64 warp_instructions, matrix_instructions, matrix_flops, barriers, async_copies, ctas;
};

// Where a group of lanes stands, for reports.
struct Place {
  u32 warp, lanes, record, rank;  // rank: of the block in its cluster
};

constexpr u32 NO_RECORD = ~0u, NO_WARP = ~0u;
constexpr u32 MAX_MBARRIERS = 64;  // of a block
constexpr int MAX_PLACES = 64;
constexpr int MESSAGE_BYTES = 2048;

extern "C" struct Report {
  const char* check;
  char message[MESSAGE_BYTES];
  u32 block[3];
  Place where;
  u64 address, bytes;  // of the lane named in the message, for global accesses
  u32 num_places;
  Place places[MAX_PLACES];
};

// Returns 0, or 1 and a filled report. Blocks run on several threads; the report is that of the failing block that was the first to start.
int launch(const Program& program, const LaunchDescription& description, CounterValues& counters, Report& report);

}  // namespace sim
