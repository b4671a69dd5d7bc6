// cuda_emulation_check.cpp -- what every thread of every grid does, done on the host.
//
// The bodies of the CUDA kernels run here for all blocks and threads, one after the other, and must
// leave the bytes that the CPU kernels leave. That proves which thread does what to which element;
// of the GPU's own instructions it proves what does not depend on one: how its conversions of NaN
// are kept from mattering, and that its square root is right whatever estimate it starts from.
#include <map>
#include <string>
#include <typeinfo>

#include "../cuda/dispatch.h"
#include "cuda_cases.h"
#include "fold_cases.h"
#include "sensitive_cases.h"

using namespace zo2ext;

namespace {

/// Runs the body of a plan for every thread.
class Emulation {
 public:
  void update_perturb(const UpdatePerturbArgs& args, const Memories&) {
    dispatch_update_perturb(args, *this);
  }
  void fold(const FoldArgs& args, const Memories&) { dispatch_fold(args, *this); }
  void noise(const NoiseArgs& args, const Memories&) { dispatch_noise(args, *this); }
  void pack(const PackArgs& args, const Memories&) { dispatch_pack(args, *this); }

  template <class Body, class Grid>
  void operator()(Body, Grid grid, int64_t numel) {
    constexpr uint32_t kShares[] = {0, 1, 3, 16};  // in steps; 0: as planned
    const uint32_t share = kShares[launches_++ % 4] * kWarpStep;
    if (share != 0) grid.division.share = share;
    const uint32_t count = blocks(numel, grid.division);
    for (uint32_t block = 0; block < count; ++block) {
      for (uint32_t thread = 0; thread < kThreads; ++thread) {
        Body::thread(grid, {block, thread, kThreads});
      }
    }
    ++launches_of_[typeid(Body).name()];
  }

  /// How many of the kernel bodies ran less than 20 times.
  int lacking() const {
    // 14 that update and perturb both ways, 4 that do anything, 4 of groups that share scales, 2
    // and 2 that fold, 6 for noise, 4 and 2 for packing.
    int lacking = 14 + 4 + 4 + 2 + 2 + 6 + 4 + 2 - static_cast<int>(launches_of_.size());
    for (const auto& [body, count] : launches_of_) lacking += count < 20;
    return lacking;
  }

 private:
  int launches_ = 0;
  std::map<std::string, int> launches_of_;
};

/// simd.h's square root on a GPU corrects an estimate of 1 / sqrt(x), which CUDA documents to be
/// within 2^-22.9 of it. Of all radicands that noise has, all estimates must lead to the right root
/// but for one: __fsqrt_rn, the same instructions, is right there too, by its documentation.
/// Returns how many do not.
int check_square_root() {
  int estimates = 0, wrong = 0, failures = 0;
  for (uint32_t i = 0; i < 1u << 23; ++i) {
    const float x = squared_radius(i << 9);
    if (to_bits(x) < 0x0d000000u || to_bits(x) > 0x7f7fffffu) ++failures;  // not the fast way
    const float right = square_root(x);
    const double exact = 1 / std::sqrt(static_cast<double>(x));
    for (uint32_t distance = 0; distance < 9; ++distance) {
      const float estimate = from_bits(to_bits(static_cast<float>(exact)) + distance - 4);
      if (std::fabs(estimate - exact) > exact * 0x1.125fbep-23) continue;  // 2^-22.9
      const float root = x * estimate;
      ++estimates;
      if (fused(fused(-root, root, x), estimate * 0.5f, root) != right) {
        ++wrong;
        if (to_bits(x) != 0x3efc114au) ++failures;
      }
    }
  }
  std::printf("square roots: %d estimates, %d leads to a wrong root\n", estimates, wrong);
  return failures;
}

}  // namespace

int main() {
  Emulation emulation;
  const int roots = check_square_root();
  const int cases = check_cases(3000, 600, emulation) + check_fold_cases(1500, emulation) +
                    check_sensitive_cases(1 << 13, emulation);
  const int lacking = emulation.lacking();
  std::printf("%d wrong square roots, %d disagreements, %d bodies that hardly ran\n", roots, cases,
              lacking);
  return roots + cases + lacking != 0;
}
