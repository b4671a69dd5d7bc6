// grid.h -- the machine as the stand-in for the CUDA runtime sees it.
#pragma once

#include <map>
#include <random>
#include <string>
#include <vector>

#include "machine.h"

namespace ptx {

struct Machine {
  std::map<const uint8_t*, Allocation> allocations;  // by their ends
  uint32_t architecture = 80;
  int mutant = 0;               // which deliberate fault runs; 0: none
  bool random_choices = false;  // where the ISA leaves something open
  std::mt19937_64 random;
};
Machine& machine();

/// Runs a deliberate fault, on the architecture that has it.
void choose_mutant(int mutant);

/// The translation of a kernel for the architecture that runs, or its mutant; null: there is none.
Entry* find_entry(const std::string& name);

/// Runs a grid of one dimension. Null, or what is wrong with the launch.
const char* run_grid(Entry& entry, uint32_t blocks, uint32_t threads, void* const* arguments);

/// Whether all kernels ran, or the mutant did. Prints those that did not.
bool all_launched();

}  // namespace ptx
