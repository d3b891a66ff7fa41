#include "distill_launch.cuh"

namespace ban_fast::cuda {

bool try_shared_single(DistillTask<float>& task, const Launch& launch) { return try_shared<float, 4>(task, launch); }

}  // namespace ban_fast::cuda
