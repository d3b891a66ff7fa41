#include "cpu/team.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>

namespace ban_fast {
namespace {

// What compilers turn `#pragma omp parallel` into: GNU's runtime, and LLVM's and Intel's under the same name.
using Parallel = void (*)(void (*work)(void*), void* context, unsigned threads, unsigned flags);

std::atomic<bool> forked{false};
// As this module is loaded: a process may use torch's threads, and fork, before it uses ours.
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Parallel find() {
  // By way of torch's library, since a process may hold several runtimes. This module has no OpenMP of its own: it would
  // be another team of threads, and a team spins for milliseconds after its work, on the cores that the other then needs.
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return nullptr;
  return reinterpret_cast<Parallel>(dlsym(torch, "GOMP_parallel"));
}

}  // namespace

bool run_on_torch_threads(int threads, void (*work)(void*), void* context) {
  static const Parallel parallel = find();
  if (parallel == nullptr || forked.load(std::memory_order_relaxed)) return false;
  parallel(work, context, unsigned(threads), 0);
  return true;
}

}  // namespace ban_fast
