// Stands in for csrc/cuda/device.cuh: the kernels as plain C++, a fiber for every thread of a cluster.
//
// A fiber runs until it waits for others: at a barrier, or where lanes exchange values. Which fiber goes on next is
// drawn at random, so that a barrier that is missing shows. Threads that wait where others never come, lanes that
// exchange with lanes not named, and accesses that are not aligned are errors; accesses out of bounds are found by the
// address sanitizer.
#pragma once
#define BAN_FAST_DEVICE_CUH

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#define BAN_FAST_KERNEL(threads, blocks) void
#define BAN_FAST_TASK(Task) const Task
#define BAN_FAST_DEVICE [[maybe_unused]] static inline
#define BAN_FAST_MEMBER inline
#define BAN_FAST_UNROLL
#define BAN_FAST_UNROLL_4

namespace emulator {

struct Place {
  int thread, threads, block, blocks, rank, cluster;
  char* shared;
};

const Place& here();
void sync_block();
void sync_cluster();
void sync_lanes(std::uint32_t lanes);
// Swaps `size` bytes with the lane whose number differs in these bits.
void exchange(std::uint32_t lanes, void* value, std::size_t size, int bits);
void* in_block(const void* place, int rank);
[[noreturn]] void fail(const std::string& what);

struct Grid {
  int blocks, threads, shared_bytes, cluster;
};
void run(const Grid& grid, const std::function<void()>& thread);

struct Limits {
  int shared_of_block, shared_of_multiprocessor, cluster;
};
extern Limits limits;

inline void copy(const void* from, void* to, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(from) % bytes != 0 || reinterpret_cast<std::uintptr_t>(to) % bytes != 0) {
    fail("a copy that is not aligned");
  }
  std::memcpy(to, from, bytes);
}

}  // namespace emulator

namespace ban_fast::cuda {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

inline float widen(Half x) {
  _Float16 value;
  std::memcpy(&value, &x, sizeof value);
  return float(value);
}
inline float widen(BFloat16 x) {
  const std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline void narrow(float x, Half& to) {
  const _Float16 value = static_cast<_Float16>(x);
  std::memcpy(&to, &value, sizeof to);
}
inline void narrow(float x, BFloat16& to) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to.bits = x != x ? 0x7fffu : std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }

namespace device {

inline int thread() { return emulator::here().thread; }
inline int threads() { return emulator::here().threads; }
inline int block() { return emulator::here().block; }
inline int blocks() { return emulator::here().blocks; }
inline char* shared_memory() { return emulator::here().shared; }

inline void sync_block() { emulator::sync_block(); }
inline void sync_lanes(std::uint32_t lanes) { emulator::sync_lanes(lanes); }
template <class T>
T exchange(std::uint32_t lanes, T value, int bits) {
  emulator::exchange(lanes, &value, sizeof value, bits);
  return value;
}

inline int cluster_blocks() { return emulator::here().cluster; }
inline int cluster_rank() { return emulator::here().rank; }
inline void sync_cluster() { emulator::sync_cluster(); }
template <class T>
T* in_block(T* place, int rank) {
  return static_cast<T*>(emulator::in_block(place, rank));
}

inline void copy16(const void* from, void* to) { emulator::copy(from, to, 16); }
inline void copy8(const void* from, void* to) { emulator::copy(from, to, 8); }
inline void copy4(const void* from, void* to) { emulator::copy(from, to, 4); }
inline void fence() {}
inline double load_shared_by_blocks(const double* from) { return *from; }
inline std::uint32_t count_up(std::uint32_t* counter) { return (*counter)++; }

class Guard {
 public:
  explicit Guard(int) {}
  ~Guard() {}
};

struct Limits {
  int shared_of_block, shared_of_multiprocessor, shared_reserved;
};
inline constexpr int kPortableCluster = 8;
inline Limits limits(int) {
  return {emulator::limits.shared_of_block, emulator::limits.shared_of_multiprocessor, 1024};
}
template <class Task>
int most_cluster(void (*)(Task), int) {
  return emulator::limits.cluster;
}

struct Grid {
  int blocks, threads;
  int shared_bytes = 0;
  int cluster = 1;
};

template <class Task>
int resident_clusters(void (*)(Task), const Grid&) {
  return 1;
}

template <class Task, class Argument>
void launch(void (*kernel)(Task), const Grid& grid, void*, const Argument& task) {
  emulator::run({grid.blocks, grid.threads, grid.shared_bytes, grid.cluster}, [&] { kernel(task); });
}

}  // namespace device
}  // namespace ban_fast::cuda
