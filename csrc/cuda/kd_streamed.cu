#include "distill_launch.cuh"

namespace ban_fast::cuda {

void launch_streamed_single(const DistillTask<float>& task, const Launch& launch) {
  launch_streamed<float, 4>(task, launch);
}

}  // namespace ban_fast::cuda
