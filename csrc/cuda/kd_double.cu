#include "distill_launch.cuh"

namespace ban_fast::cuda {

void launch_double(const DistillTask<double>& task, const Launch& launch) {
  const std::int64_t classes = task.selection.classes;
  if (classes <= 16) {
    launch_lanes<double, 4, 4>(task, launch);
  } else if (classes <= 128) {
    launch_lanes<double, 32, 4>(task, launch);
  } else {
    launch_streamed<double, 2>(task, launch);
  }
}

}  // namespace ban_fast::cuda
