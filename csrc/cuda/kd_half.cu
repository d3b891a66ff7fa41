#include "distill_launch.cuh"

namespace ban_fast::cuda {

bool try_shared_half(DistillTask<float>& task, const Launch& launch) { return try_shared<float, 8>(task, launch); }

}  // namespace ban_fast::cuda
