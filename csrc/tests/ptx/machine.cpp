// machine.cpp -- memory, and a grid run block by block, warp by warp, thread by thread.
#include "machine.h"

#include <immintrin.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "grid.h"
#include "instructions.h"

namespace ptx {
namespace {

Entry*& first_entry() {
  static Entry* first = nullptr;
  return first;
}

[[noreturn]] void stop(const Entry& entry, const char* what) {
  std::fprintf(stderr, "ptx: %s: %s\n", entry.name, what);
  std::_Exit(1);
}

/// What shfl.sync.idx.b32 gives each lane (PTX ISA, "shfl.sync").
void shuffle(const Entry& entry, std::vector<Thread>& warp, uint32_t lanes) {
  const uint32_t all = lanes == 32 ? ~0u : (1u << lanes) - 1;
  for (uint32_t lane = 0; lane < lanes; ++lane) {
    Thread& t = warp[lane];
    if (t.shuffle.mask != all) stop(entry, "shfl of other lanes than all of the warp");
    if (t.stopped_at != warp[0].stopped_at) stop(entry, "lanes wait at different shfl");
    const uint32_t segment = t.shuffle.clamp >> 8 & 31, clamp = t.shuffle.clamp & 31;
    const uint32_t last = (lane & segment) | (clamp & ~segment);
    const uint32_t from = (lane & segment) | (t.shuffle.lane & 31 & ~segment);
    t.shuffled_pred = from <= last;
    const uint32_t source = t.shuffled_pred ? from : lane;
    if (source >= lanes) stop(entry, "shfl reads a lane that does not exist");
    t.shuffled = warp[source].shuffle.value;
  }
}

void run_warp(const Entry& entry, std::vector<Thread>& warp, uint32_t lanes) {
  for (;;) {
    uint32_t stopped = 0;
    for (uint32_t lane = 0; lane < lanes; ++lane) stopped += entry.run(warp[lane]) == kStopped;
    if (stopped == 0) return;
    // Lanes that have exited cannot take part: a GPU might hang.
    if (stopped != lanes) stop(entry, "some lanes exited where others wait at shfl");
    shuffle(entry, warp, lanes);
  }
}

Allocation& find(Thread& m, uint64_t address, uint32_t bytes) {
  auto* const at = reinterpret_cast<uint8_t*>(address);
  Allocation* found = m.last;
  if (found == nullptr || at < found->begin || at + bytes > found->end) {
    auto& all = machine().allocations;
    const auto next = all.upper_bound(at);  // the first that ends behind `at`
    if (next == all.end() || at < next->second.begin || at + bytes > next->second.end) {
      fault(m, "an access outside of all memory", address, bytes);
    }
    m.last = found = &next->second;
  }
  if (address % bytes != 0) fault(m, "a misaligned access", address, bytes);
  return *found;
}

constexpr uint32_t kMany = 0xffffffffu;

}  // namespace

Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

Registered::Registered(Entry* entry) {
  entry->next = first_entry();
  first_entry() = entry;
}

void choose_mutant(int mutant) {
  for (const Entry* e = first_entry(); e != nullptr; e = e->next) {
    if (e->mutant != mutant) continue;
    machine().mutant = mutant;
    machine().architecture = e->architecture;
    return;
  }
  std::fprintf(stderr, "ptx: there is no mutant %d\n", mutant);
  std::_Exit(1);
}

Entry* find_entry(const std::string& name) {
  const Machine& m = machine();
  Entry* found = nullptr;
  for (Entry* e = first_entry(); e != nullptr; e = e->next) {
    const bool wanted = e->mutant == 0 || e->mutant == m.mutant;
    if (e->architecture != m.architecture || e->name != name || !wanted) continue;
    if (found == nullptr || e->mutant != 0) found = e;
  }
  return found;
}

bool all_launched() {
  const Machine& m = machine();
  bool all = true;
  for (const Entry* e = first_entry(); e != nullptr; e = e->next) {
    if (e->architecture != m.architecture || e->mutant != m.mutant || e->launches != 0) continue;
    std::fprintf(stderr, "ptx: never launched: %s\n", e->name);
    all = false;
  }
  return all;
}

void fault(const Thread& m, const char* what, uint64_t address, uint64_t bytes) {
  std::fprintf(stderr, "ptx: %s: address %#llx, %llu bytes, block %u, thread %u of %s\n", what,
               static_cast<unsigned long long>(address), static_cast<unsigned long long>(bytes),
               m.ctaid_x, m.tid_x, m.kernel);
  std::_Exit(1);
}

const uint8_t* global_load(Thread& m, uint64_t address, uint32_t bytes) {
  Allocation& found = find(m, address, bytes);
  const auto* const at = reinterpret_cast<const uint8_t*>(address);
  for (size_t i = at - found.begin, end = i + bytes; i < end; ++i) {
    const uint32_t writer = found.writers[i];
    if (writer != 0 && writer != m.number) fault(m, "a race: read after write", address, bytes);
    uint32_t& reader = found.readers[i];
    reader = reader == 0 || reader == m.number ? m.number : kMany;
  }
  return at;
}

uint8_t* global_store(Thread& m, uint64_t address, uint32_t bytes) {
  Allocation& found = find(m, address, bytes);
  auto* const at = reinterpret_cast<uint8_t*>(address);
  for (size_t i = at - found.begin, end = i + bytes; i < end; ++i) {
    uint32_t& writer = found.writers[i];
    const uint32_t reader = found.readers[i];
    if (writer != 0 && writer != m.number) fault(m, "a race: two writes", address, bytes);
    if (reader != 0 && reader != m.number) fault(m, "a race: write after read", address, bytes);
    writer = m.number;
  }
  return at;
}

uint32_t float_of_half(uint16_t half) {
  return (half & 0x7fffu) > 0x7c00u ? 0x7fffffffu : bits_of(_cvtsh_ss(half));
}

uint16_t half_of_float(uint32_t bits) {
  return is_nan(bits) ? 0x7fffu : _cvtss_sh(number(bits), _MM_FROUND_TO_NEAREST_INT);
}

uint32_t approximate_rsqrt(Thread& m, uint32_t bits) {
  if (is_nan(bits)) return m.nan;
  if ((bits & 0x7f800000u) == 0) return 0x7f800000u | (bits & 0x80000000u);  // 0, or flushed to it
  if (bits >> 31) return m.nan;
  if (bits == 0x7f800000u) return 0;
  const double exact = 1 / std::sqrt(static_cast<double>(number(bits)));
  const uint32_t nearest = bits_of(static_cast<float>(exact));
  Machine& all = machine();
  if (!all.random_choices) return nearest;
  const double reach = exact * 0x1.125fbee250664p-23;  // 2^-22.9
  uint32_t low = nearest, high = nearest;
  while (exact - static_cast<double>(number(low - 1)) <= reach) --low;
  while (static_cast<double>(number(high + 1)) - exact <= reach) ++high;
  // The one radicand that the highest estimate leads astray; simd.h says why it does not matter.
  if (bits == 0x3efc114au) return nearest;
  return low + static_cast<uint32_t>(all.random() % (high - low + 1));
}

const char* run_grid(Entry& entry, uint32_t blocks, uint32_t threads, void* const* arguments) {
  if (blocks == 0 || blocks > 0x7fffffffu) return "invalid grid";
  if (threads == 0 || threads > entry.max_threads) return "invalid block";
  if (_mm_getcsr() & 0xe040) stop(entry, "the host flushes subnormals, or rounds otherwise");
  Machine& m = machine();
  std::vector<uint8_t> parameters;
  for (size_t i = 0; i < 2 && entry.parameters[i] != 0; ++i) {
    const auto* const from = static_cast<const uint8_t*>(arguments[i]);
    parameters.insert(parameters.end(), from, from + entry.parameters[i]);
  }
  for (auto& [end, a] : m.allocations) {
    const size_t size = static_cast<size_t>(a.end - a.begin) * sizeof(uint32_t);
    std::memset(a.writers, 0, size);
    std::memset(a.readers, 0, size);
  }
  uint32_t nan = 0x7fffffffu;  // what the ISA says
  if (m.random_choices) nan = 0x7f800001u | static_cast<uint32_t>(m.random() & 0x807fffffu);
  const uint32_t warps = (threads + 31) / 32;
  const uint64_t count = uint64_t{blocks} * warps;
  std::vector<Thread> warp(32);
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t at = m.random_choices ? count - 1 - i : i;  // backwards
    const uint32_t block = static_cast<uint32_t>(at / warps);
    const uint32_t first = static_cast<uint32_t>(at % warps) * 32;
    const uint32_t lanes = threads - first < 32 ? threads - first : 32;
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      Thread& t = warp[lane];
      t.kernel = entry.name;
      t.parameters = parameters.data();
      t.parameter_bytes = static_cast<uint32_t>(parameters.size());
      t.ctaid_x = block, t.ntid_x = threads, t.tid_x = first + lane;
      t.number = block * threads + first + lane + 1;
      t.nan = nan;
      t.stopped_at = 0;
      t.last = nullptr;
    }
    run_warp(entry, warp, lanes);
  }
  ++entry.launches;
  return nullptr;
}

}  // namespace ptx
