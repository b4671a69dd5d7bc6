// threads.h -- the parallel loop of programs that run without torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace zo2ext {

/// Threads of `parallel_for`: at first, one a processor.
inline int& num_threads() {
  static int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return threads;
}

/// Even ranges of [0, count), one a thread; a `ParallelFor` of kernels.h.
inline void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t threads = std::min<int64_t>(num_threads(), count);
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) {
    others.emplace_back(body, count * i / threads, count * (i + 1) / threads);
  }
  if (threads > 0) body(0, count / threads);
  for (std::thread& thread : others) thread.join();
}

}  // namespace zo2ext
