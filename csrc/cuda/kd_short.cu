#include "distill_launch.cuh"

namespace ban_fast::cuda {

void launch_short(const DistillTask<float>& task, const Launch& launch) {
  const std::int64_t classes = task.selection.classes;
  if (classes <= 16) {
    launch_lanes<float, 4, 4>(task, launch);
  } else if (classes <= 64) {
    launch_lanes<float, 16, 4>(task, launch);
  } else if (classes <= 128) {
    launch_lanes<float, 32, 4>(task, launch);
  } else {
    launch_block<float, kMostShort / kShortThreads>(task, launch);
  }
}

}  // namespace ban_fast::cuda
