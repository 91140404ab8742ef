// See mbarrier.h. The instructions of the mbarrier family.
//
// Contract: field c holds flags, d the result; `extra` at x: the address (see access.h), then the operands. Arrivals release what their lanes know,
// waits that succeed acquire it. A try_wait blocks its group; in the random schedule it may also answer "not yet", as on a GPU.
#include "mbarrier.h"

#include <cstdio>

#include "cluster.h"
#include "table.h"

namespace sim {
namespace {

constexpr u32 MAX_COUNT = (1u << 20) - 1;  // of arrivals, and of bytes
constexpr u64 WORD = 0x6d62617200000000ull;  // in shared memory, plus the slot

constexpr u16 NO_STATE = 1, RELAXED = 2, NO_COMPLETE = 4;  // in field c

[[noreturn]] __attribute__((format(printf, 4, 5))) void fail(const char* check, const Place& at, const Place* cause, const char* format, ...) {
  char text[MESSAGE_BYTES];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Failure failure{check, text, at, 0, 0, {}};
  if (cause) failure.places.push_back(*cause);
  throw failure;
}

// What mbarrier.arrive returns: the pending count before it, which mbarrier it was, and its phase.
u64 pack_state(const Mbarrier& barrier) { return u64(barrier.phase) << 40 | u64(barrier.address / 8) << 20 | barrier.pending; }
u32 phase_of_state(u64 state) { return u32(state >> 40); }
u32 address_of_state(u64 state) { return u32(state >> 20 & MAX_COUNT) * 8; }

}  // namespace

Place place_of(const Warp& warp, const Record* in, u32 lanes) { return {warp.id, lanes, warp.cta->record_index(in), warp.cta->rank}; }

Mbarriers::Mbarriers(Cluster& cluster) : cluster_(cluster) {
  if (cluster.program.uses_mbarriers) barriers_.resize(cluster.size);
}

void Mbarriers::reset() {
  for (auto& of_block : barriers_) {
    for (Mbarrier& barrier : of_block) barrier.valid = false;
  }
  waiters_.clear();
  false_answers_ = MAX_FALSE_ANSWERS;
}

std::string Mbarriers::name(const Mbarrier& barrier) const {
  std::string text = "the mbarrier at byte " + std::to_string(barrier.address - cluster_.ctas[barrier.rank]->shared_begin) + " of shared memory";
  if (cluster_.size > 1) text += " of block " + std::to_string(barrier.rank);
  return text;
}

void Mbarriers::init(const Place& at, Cta& cta, u32 address, u32 arrivals) {
  if (arrivals == 0 || arrivals > MAX_COUNT)
    fail("mbarrier", at, nullptr, "an mbarrier that expects %u arrivals; 1 to %u are possible", arrivals, MAX_COUNT);
  auto& barriers = barriers_[cta.rank];
  u32 slot = MAX_MBARRIERS;
  for (u32 i = MAX_MBARRIERS; i-- > 0;) {
    const bool again = barriers[i].valid && barriers[i].address == address;
    if (again && cta.checks) fail("mbarrier", at, &barriers[i].init, "%s is initialised again before mbarrier.inval", name(barriers[i]).c_str());
    if (!barriers[i].valid || again) slot = i;
    if (again) break;
  }
  if (slot == MAX_MBARRIERS) fail("unsupported", at, nullptr, "a block with more than %u mbarriers", MAX_MBARRIERS);
  Mbarrier& barrier = barriers[slot];
  barrier.valid = true;
  barrier.rank = cta.rank, barrier.slot = slot, barrier.address = address;
  barrier.arrivals = barrier.pending = arrivals;
  barrier.phase = barrier.carried = barrier.waited = 0;
  barrier.announced = barrier.issued = barrier.arrived = 0;
  barrier.carries = false;
  barrier.waits.clear();
  barrier.init = barrier.last_arrival = at;
  barrier.init_fence = {};
  if (cta.checks) barrier.arriving.reset(cluster_.num_agents()), barrier.completed.reset(cluster_.num_agents());
  const u64 word = WORD | slot;
  memcpy(cta.shared + address, &word, sizeof word);
}

Mbarrier& Mbarriers::find(const Place& at, const Cta& cta, u32 address, const char* what) {
  u64 word;
  memcpy(&word, cta.shared + address, sizeof word);
  const u64 slot = word ^ WORD;
  if (SIM_LIKELY(slot < MAX_MBARRIERS && !barriers_.empty())) {
    Mbarrier& barrier = barriers_[cta.rank][slot];
    if (barrier.valid && barrier.address == address) return barrier;
  }
  if (!barriers_.empty()) {
    for (const Mbarrier& barrier : barriers_[cta.rank]) {
      if (barrier.valid && barrier.address == address) fail("mbarrier", at, &barrier.init, "%s: %s was overwritten", what, name(barrier).c_str());
    }
  }
  fail("mbarrier", at, nullptr, "%s: at byte %u of shared memory there is no mbarrier; nobody has initialised it, or it is no longer valid", what,
       address - cta.shared_begin);
}

void Mbarriers::invalidate(const Place& at, Mbarrier& barrier) {
  if (barrier.issued != barrier.arrived)
    fail("mbarrier", at, &barrier.last_copy, "%s becomes invalid while copies that complete on it are under way", name(barrier).c_str());
  barrier.valid = false;
  memset(cluster_.ctas[barrier.rank]->shared + barrier.address, 0xff, sizeof(u64));
}

// Once all arrivals are there, nobody can be sure to announce anything in time.
void Mbarriers::check_announced(const Place& at, const Mbarrier& barrier) const {
  if (barrier.pending != 0 || barrier.issued <= barrier.announced) return;
  fail("mbarrier", at, &barrier.last_copy, "phase %u of %s has all arrivals and expects %lld bytes, but copies of %lld bytes were issued in it",
       barrier.phase, name(barrier).c_str(), (long long)barrier.announced, (long long)barrier.issued);
}

void Mbarriers::note_wait(Warp& warp, const Place& at, Mbarrier& barrier) {
  const u32 clock = warp.knowledge.count_wait();
  for (Mbarrier::Wait& wait : barrier.waits) {
    if (wait.warp != &warp) continue;
    wait.clock = clock, wait.place = at;
    return;
  }
  barrier.waits.push_back({&warp, clock, at});
}

// This phase ends: everybody who waited for the one before must be known to have done so.
void Mbarriers::check_waits(Mbarrier& barrier) const {
  for (const Mbarrier::Wait& wait : barrier.waits) {
    if (barrier.arriving.known.at(cluster_.wait_agent(wait.warp->cta->rank, wait.warp->id)) >= wait.clock) continue;
    const std::string phase =
        barrier.phase == 0 ? "which only an mbarrier without completed phases lets pass" : "for phase " + std::to_string(barrier.phase - 1);
    fail("late-wait", wait.place, &barrier.last_arrival,
         "nothing orders this wait of warp %u, %s of %s, before the end of phase %u: a warp that comes only then sees the old parity again and waits "
         "for ever",
         wait.warp->id, phase.c_str(), name(barrier).c_str(), barrier.phase);
  }
  barrier.waits.clear();
}

void Mbarriers::complete_phase_if_due(Mbarrier& barrier) {
  false_answers_ = MAX_FALSE_ANSWERS;
  if (barrier.pending != 0 || barrier.announced != barrier.arrived) return;
  if (cluster_.launch.checks) {
    check_waits(barrier);
    const u32 agent = cluster_.mbarrier_agent(barrier.rank, barrier.slot);
    barrier.arriving.known.raise(agent, cluster_.tick(agent));
    barrier.completed = barrier.arriving;
  }
  ++barrier.phase;
  if (barrier.carries) barrier.carried = barrier.phase;
  barrier.carries = false;
  barrier.pending = barrier.arrivals;
  barrier.announced = barrier.issued = barrier.arrived = 0;
}

void Mbarriers::expect(const Place& at, Mbarrier& barrier, u32 bytes) {
  const i64 count = barrier.announced - barrier.arrived + bytes;
  if (bytes > MAX_COUNT || count > i64(MAX_COUNT)) {
    fail("mbarrier", at, nullptr, "%s expects %lld more bytes, at most %u are possible", name(barrier).c_str(), (long long)count, MAX_COUNT);
  }
  barrier.announced += bytes;
}

void Mbarriers::arrive(const Place& at, Mbarrier& barrier, u32 count) {
  if (count == 0 || count > barrier.pending) {
    fail("mbarrier", at, &barrier.init, "%u arrivals at %s, whose phase %u lacks %u of %u", count, name(barrier).c_str(), barrier.phase,
         barrier.pending, barrier.arrivals);
  }
  barrier.pending -= count;
  barrier.last_arrival = at;
  check_announced(at, barrier);
  complete_phase_if_due(barrier);
}

void Mbarriers::expect_arrival(const Place& at, Mbarrier& barrier) {
  if (barrier.pending == MAX_COUNT) fail("mbarrier", at, nullptr, "%s expects more than %u arrivals", name(barrier).c_str(), MAX_COUNT);
  ++barrier.pending;
}

void Mbarriers::carry(const Place& at, Mbarrier& barrier) {
  barrier.last_copy = at;
  barrier.carries = true;
}

AsyncAgent Mbarriers::agent(const Mbarrier& barrier, bool proxy) const {
  const u32 agent = cluster_.mbarrier_agent(barrier.rank, barrier.slot);
  return {agent, cluster_.latest(agent) + 1, proxy};
}

Mbarrier& Mbarriers::issue(Warp& warp, const Record* in, u32 lane, Cta& target, u32 address, u32 bytes, bool proxy) {
  const Place at = place_of(warp, in, 1u << lane);
  resolve_range(warp, in, lane, target, address, {Access::NONE, 8, 8, "mbarrier of a copy"});
  Mbarrier& barrier = find(at, target, address, "a copy that completes on an mbarrier");
  if (target.shadow) {
    const bool fenced = !cluster_.launch.isa_rules || (barrier.init_fence && warp.knowledge.knows(barrier.init_fence, lane));
    target.shadow->access_async(warp, in, Access::READ, lane, agent(barrier, proxy && !fenced), address, 8, "mbarrier of a copy");
    release_waits(warp, barrier);
  }
  issue(at, barrier, bytes);
  return barrier;
}

void Mbarriers::release_waits(const Warp& warp, Mbarrier& barrier) const {
  const u32 first = cluster_.wait_agent(0, 0);
  std::vector<u32> waits;
  warp.knowledge.release_waits(first, waits);
  for (u32 i = 0; i < waits.size(); ++i) barrier.arriving.known.raise(first + i, waits[i]);
}

void Mbarriers::issue(const Place& at, Mbarrier& barrier, u32 bytes) {
  barrier.issued += bytes;
  carry(at, barrier);
  check_announced(at, barrier);
  if (barrier.issued - barrier.announced > i64(MAX_COUNT)) {
    fail("mbarrier", at, nullptr, "copies bring %s %lld bytes more than were announced, at most %u are possible", name(barrier).c_str(),
         (long long)(barrier.issued - barrier.announced), MAX_COUNT);
  }
}

void Mbarriers::complete(Mbarrier& barrier, u32 bytes) {
  barrier.arrived += bytes;
  complete_phase_if_due(barrier);
}

bool Mbarriers::gives_up() {
  if (cluster_.launch.schedule != Schedule::RANDOM || false_answers_ == 0 || cluster_.random.below(8) != 0) return false;
  --false_answers_;
  return true;
}

void Mbarriers::fence_inits(Warp& warp, const Record* in, u32 lanes) {
  if (barriers_.empty() || !warp.cta->checks) return;
  warp.knowledge.touch(lanes);
  for (Mbarrier& barrier : barriers_[warp.cta->rank]) {
    if (!barrier.valid || barrier.init.warp != warp.id || (barrier.init.lanes & lanes) == 0 || barrier.init_fence) continue;
    const u32 lane = u32(__builtin_ctz(barrier.init.lanes));
    barrier.init_fence = Stamp::make(warp.knowledge.agent(OWN_ACCESSES), warp.knowledge.now(), lane, warp.cta->record_index(in));
  }
}

void Mbarriers::blocked(const Warp& warp, const Place& at, const Mbarrier& barrier) {
  passed(warp, at);
  waiters_.push_back({warp.index, at, &barrier});
}

void Mbarriers::passed(const Warp& warp, const Place& at) {
  const auto same = [&](const Waiter& waiter) { return waiter.warp == warp.index && (waiter.place.lanes & at.lanes) != 0; };
  waiters_.erase(std::remove_if(waiters_.begin(), waiters_.end(), same), waiters_.end());
}

void Mbarriers::check_exit(Warp& warp, const Record* in, u32 lanes) {
  const Cta& cta = *warp.cta;
  if (barriers_.empty() || !cta.checks || !cta.ends_with(warp, lanes)) return;
  for (const Mbarrier& barrier : barriers_[cta.rank]) {
    if (!barrier.valid) continue;
    const Place at = place_of(warp, in, lanes);
    if (barrier.announced != barrier.arrived || barrier.issued != barrier.arrived) {
      fail("leftover", at, barrier.issued ? &barrier.last_copy : nullptr,
           "the block ends, but phase %u of %s still expects %lld bytes, and %lld bytes of copies are under way", barrier.phase,
           name(barrier).c_str(), (long long)(barrier.announced - barrier.arrived), (long long)(barrier.issued - barrier.arrived));
    }
    if (barrier.carries || barrier.carried > barrier.waited) {
      fail("leftover", at, &barrier.last_copy, "the block ends, but nobody waited for the copies of phase %u of %s",
           barrier.carries ? barrier.phase : barrier.carried - 1, name(barrier).c_str());
    }
  }
}

void Mbarriers::describe_stall(std::string& text) const {
  std::vector<const Mbarrier*> seen;
  for (const Waiter& waiter : waiters_) {
    const Mbarrier& barrier = *waiter.barrier;
    if (std::find(seen.begin(), seen.end(), &barrier) != seen.end()) continue;
    seen.push_back(&barrier);
    char line[256];
    const i64 bytes = barrier.announced - barrier.arrived;
    snprintf(line, sizeof line, "; %s, waited for by warp %u, is in phase %u, which lacks %u of %u arrivals", name(barrier).c_str(),
             waiter.place.warp, barrier.phase, barrier.pending, barrier.arrivals);
    text += line;
    if (bytes == 0) continue;
    if (bytes > 0) snprintf(line, sizeof line, " and %lld of %lld bytes", (long long)bytes, (long long)barrier.announced);
    else snprintf(line, sizeof line, " and got %lld bytes more than were announced", (long long)-bytes);
    text += line;
  }
}

void report_word_access(Warp& warp, const Record* in, Access access, Cta& target, u32 address, u32 lanes, const char* what) {
  if (!target.shadow) return;
  u32 addresses[LANES];
  std::fill(addresses, addresses + LANES, address);
  target.shadow->access(warp, in, access, lanes, addresses, 8, what);
}

namespace {

Mbarriers& mbarriers_of(const Warp& warp) { return *warp.cta->cluster->mbarriers; }

// Operand `number` after the address.
template <class T> const T* operand_row(const Warp& warp, const Record* in, u32 number) {
  return warp.row<T>(warp.extra[in->x + i32(ADDRESS_WORDS + number)]);
}

const Record* init(Warp& warp, const Record* in) {
  const u32* arrivals = operand_row<u32>(warp, in, 0);
  for_mbarrier_addresses(warp, in, "mbarrier.init", [&](Cta& cta, u32 address, u32 lanes) {
    mbarriers_of(warp).init(place_of(warp, in, lanes), cta, address, arrivals[__builtin_ctz(lanes)]);
    report_word_access(warp, in, Access::WRITE, cta, address, lanes, "mbarrier.init");
  });
  return in + 1;
}

const Record* invalidate(Warp& warp, const Record* in) {
  for_mbarrier_addresses(warp, in, "mbarrier.inval", [&](Cta& cta, u32 address, u32 lanes) {
    Mbarriers& mbarriers = mbarriers_of(warp);
    const Place at = place_of(warp, in, lanes);
    Mbarrier& barrier = mbarriers.find(at, cta, address, "mbarrier.inval");
    report_word_access(warp, in, Access::WRITE, cta, address, lanes, "mbarrier.inval");
    mbarriers.invalidate(at, barrier);
  });
  return in + 1;
}

const Record* expect(Warp& warp, const Record* in) {
  const u32* bytes = operand_row<u32>(warp, in, 0);
  for_barriers(warp, in, "mbarrier.expect_tx", [&](Mbarrier& barrier, u32 lanes) {
    for_lanes(lanes, [&](int lane) { mbarriers_of(warp).expect(place_of(warp, in, 1u << lane), barrier, bytes[lane]); });
  });
  return in + 1;
}

// complete_tx: as if a copy brought these bytes.
const Record* complete(Warp& warp, const Record* in) {
  const u32* bytes = operand_row<u32>(warp, in, 0);
  for_barriers(warp, in, "mbarrier.complete_tx", [&](Mbarrier& barrier, u32 lanes) {
    if (warp.cta->checks) mbarriers_of(warp).release_waits(warp, barrier);
    for_lanes(lanes, [&](int lane) {
      mbarriers_of(warp).issue(place_of(warp, in, 1u << lane), barrier, bytes[lane]);
      mbarriers_of(warp).complete(barrier, bytes[lane]);
    });
  });
  return in + 1;
}

// Operands: count of arrivals, bytes to expect. d: the state.
template <bool DROP> const Record* arrive(Warp& warp, const Record* in) {
  const char* const what = DROP ? "mbarrier.arrive_drop" : "mbarrier.arrive";
  const u32 mask = warp.mask(in);
  const u32* counts = operand_row<u32>(warp, in, 0);
  const u32* bytes = operand_row<u32>(warp, in, 1);
  Mbarriers& mbarriers = mbarriers_of(warp);
  alignas(64) u64 states[LANES];
  for_barriers(warp, in, what, [&](Mbarrier& barrier, u32 lanes) {
    // What lanes know travels with the phase in which they arrive: as many lanes at a time as this phase still lacks.
    while (lanes != 0) {
      u32 together = 0, sum = 0;
      for_lanes(lanes, [&](int lane) {
        if (sum >= barrier.pending) return;
        sum += counts[lane];
        together |= 1u << lane;
      });
      if (together == 0) together = lanes;
      if (warp.cta->checks && !(in->c & RELAXED)) warp.knowledge.release(together, barrier.arriving);
      for_lanes(together, [&](int lane) {
        const Place at = place_of(warp, in, 1u << lane);
        states[lane] = pack_state(barrier);
        if ((in->c & NO_COMPLETE) && counts[lane] == barrier.pending) {
          warp.fail(in, "mbarrier", 1u << lane, "%s.noComplete completes phase %u", what, barrier.phase);
        }
        if (bytes[lane]) mbarriers.expect(at, barrier, bytes[lane]);
        if (DROP) mbarriers.drop(barrier, counts[lane]);
        mbarriers.arrive(at, barrier, counts[lane]);
      });
      lanes &= ~together;
    }
  });
  if (!(in->c & NO_STATE)) commit(warp, in->d, mask, states);
  return in + 1;
}

// Operand: the state or the parity of a phase. d: a predicate, whether that phase has completed.
template <bool PARITY, bool BLOCKING> const Record* wait(Warp& warp, const Record* in) {
  const char* const what = BLOCKING ? "mbarrier.try_wait" : "mbarrier.test_wait";
  const u32 mask = warp.mask(in);
  if (mask == 0) return in + 1;
  Mbarriers& mbarriers = mbarriers_of(warp);
  mbarriers.passed(warp, place_of(warp, in, mask));
  u32 done = 0;
  for_barriers(warp, in, what, [&](Mbarrier& barrier, u32 lanes) {
    if (barrier.rank != warp.cta->rank)
      warp.fail(in, "mbarrier", lanes, "%s on an mbarrier of block %u; only its own block can wait for it", what, barrier.rank);
    u32 passed = 0;
    if constexpr (PARITY) {
      const u32* parity = operand_row<u32>(warp, in, 0);
      for_lanes(lanes, [&](int lane) { passed |= u32((parity[lane] & 1) != (barrier.phase & 1)) << lane; });
    } else {
      const u64* states = operand_row<u64>(warp, in, 0);
      for_lanes(lanes, [&](int lane) {
        const u32 phase = phase_of_state(states[lane]);
        if (address_of_state(states[lane]) != barrier.address || phase > barrier.phase || phase + 1 < barrier.phase) {
          warp.fail(in, "mbarrier", 1u << lane,
                    "%s for phase %u of the mbarrier at 0x%x (lane %d), but the one at 0x%x is in phase %u; "
                    "a state is good for its own mbarrier until the phase after it completes",
                    what, phase, address_of_state(states[lane]), lane, barrier.address, barrier.phase);
        }
        passed |= u32(phase < barrier.phase) << lane;
      });
    }
    if (passed != lanes) mbarriers.blocked(warp, place_of(warp, in, lanes & ~passed), barrier);
    if (passed == 0) return;
    done |= passed;
    barrier.waited = barrier.phase;
    if (warp.cta->checks) mbarriers.note_wait(warp, place_of(warp, in, passed), barrier);
    if (warp.cta->checks && !(in->c & RELAXED)) warp.knowledge.acquire(passed, warp.live, barrier.completed);
  });
  if (BLOCKING && done == 0 && !mbarriers.gives_up()) return warp.block();
  warp.set_predicate(in->d, mask, done);
  if (done == 0) return warp.poll_again(in + 1);
  warp.polling = false;
  return in + 1;
}

// pending_count: a = state.
struct PendingCount {
  u32 operator()(u64 state) const { return u32(state & MAX_COUNT); }
};

const Record* fence_inits(Warp& warp, const Record* in) {
  mbarriers_of(warp).fence_inits(warp, in, warp.mask(in));
  return in + 1;
}

}  // namespace

void register_mbarrier(Table& table) {
  table.family(Class::CONTROL);
  table.add("mbarrier.init", "", init);
  table.add("mbarrier.inval", "", invalidate);
  table.add("mbarrier.expect_tx", "", expect);
  table.add("mbarrier.complete_tx", "", complete);
  table.add("mbarrier.arrive", "", arrive<false>);
  table.add("mbarrier.arrive_drop", "", arrive<true>);
  table.add("mbarrier.test_wait", "", wait<false, false>);
  table.add("mbarrier.test_wait.parity", "", wait<true, false>);
  table.add("mbarrier.try_wait", "", wait<false, true>);
  table.add("mbarrier.try_wait.parity", "", wait<true, true>);
  table.add("mbarrier.pending_count.b64", "d32 a64", each<u32, u64>(PendingCount{}));
  table.add("fence.mbarrier_init", "", fence_inits);
}

}  // namespace sim
