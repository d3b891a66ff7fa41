// Which instruction set's kernels this process uses.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/rows.h"

namespace ban_fast {
namespace {

struct Candidate {
  const RowKernels* kernels;
  bool supported;
};

// Best first. `supported` asks for everything that the files are compiled with (CMakeLists.txt).
const RowKernels& choose() {
#if defined(__x86_64__)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Candidate candidates[] = {
      {&avx512::row_kernels, has_avx512}, {&avx2::row_kernels, has_avx2}, {&baseline::row_kernels, true}};
#else
  const Candidate candidates[] = {{&baseline::row_kernels, true}};
#endif
  const char* wanted = std::getenv("BAN_FAST_ISA");
  std::string usable;
  for (const Candidate& candidate : candidates) {
    if (!candidate.supported) continue;
    if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == candidate.kernels->name)
      return *candidate.kernels;
    usable = candidate.kernels->name + (usable.empty() ? "" : ", " + usable);
  }
  throw std::invalid_argument("BAN_FAST_ISA is '" + std::string(wanted) + "'; this machine has: " + usable);
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& chosen = choose();
  return chosen;
}

const char* instruction_set() { return row_kernels().name; }

}  // namespace ban_fast
