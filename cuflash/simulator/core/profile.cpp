// See profile.h.
#include "profile.h"

#include <algorithm>

namespace sim {
namespace {

constexpr u32 BANKS = 32, BANK_BYTES = 4, WAVEFRONT_BYTES = BANKS * BANK_BYTES, SECTOR_BYTES = 32;

// Wavefronts for `lanes`, which together access at most WAVEFRONT_BYTES: the largest number of different words in one bank.
u32 wavefronts(u32 lanes, const u32* addresses, u32 bytes) {
  u32 words[BANKS][BANKS], count[BANKS] = {};
  u32 most = 0;
  for_lanes(lanes, [&](int lane) {
    for (u32 word = addresses[lane] / BANK_BYTES; word <= (addresses[lane] + bytes - 1) / BANK_BYTES; ++word) {
      const u32 bank = word % BANKS;
      if (std::find(words[bank], words[bank] + count[bank], word) != words[bank] + count[bank]) continue;
      words[bank][count[bank]++] = word;
      most = std::max(most, count[bank]);
    }
  });
  return most;
}

void add(Traffic& sum, const Traffic& part) { sum.requests += part.requests, sum.used += part.used, sum.ideal += part.ideal; }

}  // namespace

Profile::Profile(const Program& program, const LaunchDescription& launch)
    : launch_(launch), records_(program.records.size() - 1), buffers_(launch.num_buffers) {}

void Profile::shared(u32 record, Access access, u32 lanes, const u32* addresses, u32 bytes) {
  if (lanes == 0) return;
  Traffic& traffic = writes(access) ? records_[record].shared_writes : records_[record].shared_reads;
  const u32 together = bytes <= BANK_BYTES ? LANES : WAVEFRONT_BYTES / bytes;
  const u32 group = together == LANES ? ALL_LANES : (1u << together) - 1;
  for (u32 first = 0; first < LANES; first += together) {
    const u32 here = lanes & group << first;
    if (here == 0) continue;
    traffic.used += wavefronts(here, addresses, bytes);
    ++traffic.ideal;
  }
  ++traffic.requests;
}

void Profile::global(u32 record, Access access, u32 lanes, const u64* addresses, u32 bytes) {
  u32 same[LANES];
  std::fill_n(same, LANES, bytes);
  global(record, access, lanes, addresses, same);
}

void Profile::global(u32 record, Access access, u32 lanes, const u64* addresses, const u32* bytes) {
  if (lanes == 0) return;
  struct Range {
    u64 begin, end;
  } ranges[LANES];
  u32 count = 0;
  for_lanes(lanes, [&](int lane) { ranges[count++] = {addresses[lane], addresses[lane] + bytes[lane]}; });
  std::sort(ranges, ranges + count, [](const Range& a, const Range& b) { return a.begin < b.begin; });
  const bool write = writes(access);
  u64 distinct = 0, sectors = 0, next_byte = 0, next_sector = 0;  // what lies below was counted
  u32 buffer = NO_BUFFER;
  for (u32 i = 0; i < count; ++i) {
    const u64 begin = std::max(ranges[i].begin, next_byte), end = ranges[i].end;
    if (begin >= end) continue;
    if (!inside(buffer, begin)) buffer = buffer_of(begin), next_sector = 0;
    const u64 origin = buffer == NO_BUFFER ? 0 : launch_.buffers[buffer].begin & ~u64(15);
    const u64 first_sector = std::max((begin - origin) / SECTOR_BYTES, next_sector), end_sector = (end - origin + SECTOR_BYTES - 1) / SECTOR_BYTES;
    next_byte = end, next_sector = end_sector;
    distinct += end - begin;
    sectors += end_sector - first_sector;
    if (buffer == NO_BUFFER) continue;
    BufferProfile& moved = buffers_[buffer];
    (write ? moved.bytes_written : moved.bytes_read) += end - begin;
    (write ? moved.sectors_written : moved.sectors_read) += end_sector - first_sector;
  }
  Traffic& traffic = write ? records_[record].global_writes : records_[record].global_reads;
  ++traffic.requests;
  traffic.used += sectors;
  traffic.ideal += (distinct + SECTOR_BYTES - 1) / SECTOR_BYTES;
}

bool Profile::inside(u32 buffer, u64 address) const {
  return buffer != NO_BUFFER && address >= launch_.buffers[buffer].begin && address < launch_.buffers[buffer].end;
}

u32 Profile::buffer_of(u64 address) const {
  for (u32 i = 0; i < launch_.num_buffers; ++i) {
    if (inside(i, address)) return i;
  }
  return NO_BUFFER;
}

void Profile::add_to(const LaunchDescription& launch) const {
  for (size_t i = 0; i < records_.size(); ++i) {
    RecordProfile& sum = launch.record_profiles[i];
    const RecordProfile& part = records_[i];
    sum.issued += part.issued, sum.waits += part.waits, sum.matrix_flops += part.matrix_flops;
    add(sum.shared_reads, part.shared_reads), add(sum.shared_writes, part.shared_writes);
    add(sum.global_reads, part.global_reads), add(sum.global_writes, part.global_writes);
  }
  for (size_t i = 0; i < buffers_.size(); ++i) {
    BufferProfile& sum = launch.buffer_profiles[i];
    const BufferProfile& part = buffers_[i];
    sum.bytes_read += part.bytes_read, sum.bytes_written += part.bytes_written;
    sum.sectors_read += part.sectors_read, sum.sectors_written += part.sectors_written;
  }
}

}  // namespace sim
