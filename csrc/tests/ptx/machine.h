// machine.h -- what translated kernels see of the machine that runs them: a thread and its memory.
//
// translate.py turns each PTX instruction into one statement, and instructions.h says what it does.
// Registers hold bits. Kept free of the standard library's containers: it is compiled with 100,000
// statements.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ptx {

enum Outcome { kExited, kStopped };

/// What a lane brings to shfl.sync.
struct Shuffle {
  uint32_t value, lane, clamp, mask;
};

/// Memory of the "GPU". Per byte the thread that wrote or read it in this launch, counted from 1.
struct Allocation {
  uint8_t *begin, *end;
  uint32_t *writers, *readers;
};

struct Thread {
  const char* kernel;
  const uint8_t* parameters;
  uint32_t parameter_bytes;
  uint32_t ctaid_x, ntid_x, tid_x;
  uint32_t number;  // in the grid, counted from 1
  uint32_t nan;     // the NaN that arithmetic makes
  int stopped_at;   // number of the shfl.sync where it waits; 0: at the beginning
  Shuffle shuffle;
  uint32_t shuffled;
  bool shuffled_pred;
  Allocation* last;  // the allocation of its last access
  uint64_t saved[256];
};

/// A translated kernel.
struct Entry {
  uint32_t architecture;  // 75: of compute_75
  const char* name;
  Outcome (*run)(Thread&);
  uint32_t parameters[2];  // bytes of each
  uint32_t max_threads;
  int mutant;  // which deliberate fault it has; 0: none
  uint64_t launches;
  Entry* next;
};

/// Adds a kernel to those that launches are looked up in.
struct Registered {
  explicit Registered(Entry* entry);
};

[[noreturn]] void fault(const Thread& thread, const char* what, uint64_t address, uint64_t bytes);

/// Memory at a global address: inside of one allocation, and aligned to the whole access. No byte
/// that one thread of a launch writes may be read or written by another.
const uint8_t* global_load(Thread& thread, uint64_t address, uint32_t bytes);
uint8_t* global_store(Thread& thread, uint64_t address, uint32_t bytes);

/// float16 to float32 and back. NaN as PTX makes it: canonical.
uint32_t float_of_half(uint16_t half);
uint16_t half_of_float(uint32_t bits);

/// An approximation of 1 / sqrt(x), of the kind that the environment chose.
uint32_t approximate_rsqrt(Thread& thread, uint32_t bits);

}  // namespace ptx
