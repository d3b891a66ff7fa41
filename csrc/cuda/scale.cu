// Multiplying a stored gradient in place.
#include "logits.cuh"
#include "losses.h"
#include "plan.cuh"

namespace ban_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kPiece = 1 << 14;  // elements, where all have one factor: a whole number of 16-byte words
constexpr int kBlocks = 1024;             // few enough that all of them run at once: most only find a 1, and return

template <class T>
struct ScaleTask {
  void* gradient;
  DType dtype;
  std::int64_t elements, piece;  // a warp takes pieces: rows, where each has its factor
  const T* factors;
  std::int64_t factor_stride;
  const T* scale;
};

template <class T, int V>
BAN_FAST_KERNEL(kThreads, 4) scale_pieces(BAN_FAST_TASK(ScaleTask<T>) task) {
  const int warps = device::threads() / kWarp;
  const std::int64_t pieces = (task.elements + task.piece - 1) / task.piece;
  for (std::int64_t i = std::int64_t(device::block()) * warps + device::thread() / kWarp; i < pieces;
       i += std::int64_t(device::blocks()) * warps) {
    const T factor = task.factors[i * task.factor_stride] * (task.scale == nullptr ? T(1) : *task.scale);
    if (factor == T(1)) continue;
    const std::int64_t left = task.elements - i * task.piece;
    const GradientRow gradient(task.gradient, task.dtype, i, task.piece);
    const LogitRow row({task.gradient, task.dtype, 0, task.piece, 1}, i);
    const Tiling<V> tiling(int(left < task.piece ? left : task.piece), gradient);
    for (int tile = 0; tile < tiling.count; ++tile) {
      const Positions at = tiling.tile(tile);
      T x[V];
      read(row, at, x);
      BAN_FAST_UNROLL
      for (int v = 0; v < V; ++v) x[v] *= factor;
      gradient.write(at, x);
    }
  }
}

template <class T, int V>
void launch_scale(void* gradient, DType dtype, std::int64_t rows, std::int64_t classes, const void* factors,
                  std::int64_t factor_stride, const void* scale, void* stream) {
  const std::int64_t piece = factor_stride == 0 ? kPiece : classes, elements = rows * classes;
  const std::int64_t pieces = (elements + piece - 1) / piece;
  const int blocks = std::min(blocks_for(pieces, kThreads / kWarp), kBlocks);
  device::launch(scale_pieces<T, V>, {blocks, kThreads}, stream,
                 ScaleTask<T>{gradient, dtype, elements, piece, static_cast<const T*>(factors), factor_stride,
                              static_cast<const T*>(scale)});
}

}  // namespace

void scale_gradient(void* gradient, DType dtype, std::int64_t rows, std::int64_t classes, const void* factors,
                    std::int64_t factor_stride, const void* scale, const Launch& launch) {
  const device::Guard guard(launch.device);
  const auto launch_as = dtype == DType::f64 ? launch_scale<double, 2>
                         : dtype == DType::f32 ? launch_scale<float, 4>
                                               : launch_scale<float, 8>;
  launch_as(gradient, dtype, rows, classes, factors, factor_stride, scale, launch.stream);
}

}  // namespace ban_fast::cuda
