// How many blocks a launch has, and how rows are held in the shared memory of one block or of a cluster.
#pragma once

#include <algorithm>

#include "losses.h"
#include "row_sources.cuh"

namespace ban_fast::cuda {

inline int element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Blocks that take so many rows at a time.
inline int blocks_for(std::int64_t rows, int rows_at_once) {
  return int(std::min<std::int64_t>((rows + rows_at_once - 1) / rows_at_once, kMostBlocks));
}

// Threads, whole warps, that have a row in their registers.
inline int threads_for(std::int64_t classes, int each) {
  return int((classes + kWarp * each - 1) / (kWarp * each)) * kWarp;
}

struct RowBytes {
  std::int64_t classes;
  int neighbours;                    // classes a lane takes at a time
  int student_bytes, teacher_bytes;  // of an element; the teacher's 0 where there is none
  bool permuted;                     // the teacher's row twice: as it is, and permuted
};

struct SharedGrid {
  bool fits;
  device::Grid grid;
  SharedPlan plan;
};

inline constexpr int kSharedThreads = 256;

inline SharedGrid shared_grid(const RowBytes& row, std::int64_t rows, int cluster) {
  const std::int64_t tile = kWarp * row.neighbours, tiles = (row.classes + tile - 1) / tile + 1;
  const int warps = cluster * kSharedThreads / kWarp, tiles_per_warp = int((tiles + warps - 1) / warps);
  const std::int64_t element = row.student_bytes + row.teacher_bytes * (row.permuted ? 2 : 1);
  const std::int64_t bytes =
      std::int64_t(sizeof(Mailbox)) + tiles_per_warp * kSharedThreads * row.neighbours * element;
  const int blocks = int(std::min<std::int64_t>(rows, kMostBlocks / cluster)) * cluster;
  return {bytes < (1 << 30),
          {blocks, kSharedThreads, int(std::min<std::int64_t>(bytes, 1 << 30)), cluster},
          {tiles_per_warp, row.student_bytes, row.teacher_bytes, row.permuted}};
}

// The fewest blocks that hold a row, two of them on a multiprocessor, so that one can read while the other computes; or
// else one. Clusters of more than eight blocks are a device's to grant.
template <class Task>
SharedGrid plan_shared(const RowBytes& row, std::int64_t rows, int device, void (*kernel)(Task)) {
  const device::Limits limits = device::limits(device);
  const int most_cluster = device::most_cluster(kernel, device);
  const int half = std::min(limits.shared_of_multiprocessor / 2 - limits.shared_reserved, limits.shared_of_block);
  for (const int most : {half, limits.shared_of_block}) {
    for (int cluster = 1; cluster <= most_cluster; cluster *= 2) {
      const SharedGrid grid = shared_grid(row, rows, cluster);
      if (!grid.fits || grid.grid.shared_bytes > most) continue;
      if (cluster <= device::kPortableCluster || device::resident_clusters(kernel, grid.grid) > 0) return grid;
    }
  }
  return {};
}

}  // namespace ban_fast::cuda
