// All that the kernels know of CUDA's language and runtime. The tests compile the same kernels for the host, with their
// emulator in this file's place.
#ifndef BAN_FAST_DEVICE_CUH
#define BAN_FAST_DEVICE_CUH

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#define BAN_FAST_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define BAN_FAST_TASK(Task) const __grid_constant__ Task
#define BAN_FAST_DEVICE static __device__ __forceinline__
#define BAN_FAST_MEMBER __device__ __forceinline__
#define BAN_FAST_UNROLL _Pragma("unroll")
#define BAN_FAST_UNROLL_4 _Pragma("unroll 4")

namespace ban_fast::cuda {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

BAN_FAST_DEVICE float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
BAN_FAST_DEVICE float widen(BFloat16 x) { return __uint_as_float(std::uint32_t(x.bits) << 16); }
BAN_FAST_DEVICE float widen(float x) { return x; }
BAN_FAST_DEVICE double widen(double x) { return x; }
BAN_FAST_DEVICE void narrow(float x, Half& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }
BAN_FAST_DEVICE void narrow(float x, BFloat16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
BAN_FAST_DEVICE void narrow(float x, float& to) { to = x; }
BAN_FAST_DEVICE void narrow(double x, double& to) { to = x; }

namespace device {

// ---- Where a thread is -------------------------------------------------------------------------------------------

BAN_FAST_DEVICE int thread() { return int(threadIdx.x); }
BAN_FAST_DEVICE int threads() { return int(blockDim.x); }
BAN_FAST_DEVICE int block() { return int(blockIdx.x); }
BAN_FAST_DEVICE int blocks() { return int(gridDim.x); }

// The block's dynamic shared memory, aligned to 16 bytes.
BAN_FAST_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// ---- Warps and blocks --------------------------------------------------------------------------------------------

BAN_FAST_DEVICE void sync_block() { __syncthreads(); }
BAN_FAST_DEVICE void sync_lanes(std::uint32_t lanes) { __syncwarp(lanes); }

// The value of the lane whose number differs in these bits; all of `lanes` call it.
template <class T>
BAN_FAST_DEVICE T exchange(std::uint32_t lanes, T value, int bits) {
  return __shfl_xor_sync(lanes, value, bits);
}

// ---- Clusters: sm_90; elsewhere a block is its own ---------------------------------------------------------------

BAN_FAST_DEVICE int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
  return int(cooperative_groups::this_cluster().num_blocks());
#else
  return 1;
#endif
}
BAN_FAST_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return int(cooperative_groups::this_cluster().block_rank());
#else
  return 0;
#endif
}
BAN_FAST_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}
// What lies at this place of shared memory in another block of the cluster.
template <class T>
BAN_FAST_DEVICE T* in_block(T* place, [[maybe_unused]] int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(place, rank);
#else
  return place;
#endif
}

// ---- Memory ------------------------------------------------------------------------------------------------------

BAN_FAST_DEVICE void copy16(const void* from, void* to) {
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
}
BAN_FAST_DEVICE void copy8(const void* from, void* to) { *static_cast<uint2*>(to) = *static_cast<const uint2*>(from); }
BAN_FAST_DEVICE void copy4(const void* from, void* to) {
  *static_cast<std::uint32_t*>(to) = *static_cast<const std::uint32_t*>(from);
}

BAN_FAST_DEVICE void fence() { __threadfence(); }
// Past the first-level cache, whose lines may be older than what other blocks have written.
BAN_FAST_DEVICE double load_shared_by_blocks(const double* from) { return __ldcg(from); }
// Adds 1, and returns what was there.
BAN_FAST_DEVICE std::uint32_t count_up(std::uint32_t* counter) { return atomicAdd(counter, 1u); }

// ---- The host's side ---------------------------------------------------------------------------------------------

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // leave nothing behind for the next call
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// Makes a device the thread's current one for as long as this lives.
class Guard {
 public:
  explicit Guard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~Guard() {
    if (changed_) cudaSetDevice(before_);
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

struct Limits {
  int shared_of_block, shared_of_multiprocessor, shared_reserved;  // bytes; the last of each block's, by the system
};

inline constexpr int kPlainShared = 48 << 10;  // bytes that a block may have without asking
inline constexpr int kPortableCluster = 8;     // blocks that every device with clusters grants
inline constexpr int kMostCluster = 16;

inline Limits limits(int device) {
  return {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          attribute(cudaDevAttrReservedSharedMemoryPerBlock, device)};
}

// Blocks in a cluster of this kernel. 1 also where it was compiled for a device without clusters, whatever runs it.
template <class Task>
int most_cluster(void (*kernel)(Task), int device) {
  if (attribute(cudaDevAttrClusterLaunch, device) == 0) return 1;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90 ? kMostCluster : 1;
}

struct Grid {
  int blocks, threads;
  int shared_bytes = 0;
  int cluster = 1;
};

template <class Task>
cudaLaunchConfig_t configuration(void (*kernel)(Task), const Grid& grid, cudaLaunchAttribute& cluster) {
  if (grid.shared_bytes > kPlainShared) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes),
          "cudaFuncSetAttribute(shared memory)");
  }
  if (grid.cluster > kPortableCluster) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cudaFuncSetAttribute(cluster)");
  }
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid.blocks));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = std::size_t(grid.shared_bytes);
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return config;
}

// How many clusters like this the current device holds at a time; 0 where it cannot hold one.
template <class Task>
int resident_clusters(void (*kernel)(Task), const Grid& grid) {
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = configuration(kernel, grid, cluster);
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) {
    cudaGetLastError();  // a size that this device has not is answered by an error: it holds none
    return 0;
  }
  return count;
}

// Launches kernel(task) on a stream; returns before it has run.
template <class Task>
void launch(void (*kernel)(Task), const Grid& grid, void* stream, const Task& task) {
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config = configuration(kernel, grid, cluster);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, task), "launch");
}

}  // namespace device
}  // namespace ban_fast::cuda

#endif
