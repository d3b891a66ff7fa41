// What the CUDA part of this build was made with.
#pragma once

namespace ban_fast::cuda {

// Version of the CUDA runtime linked in, as major * 1000 + minor * 10; 0 where the runtime does not answer.
int runtime_version();

// CUDA devices that this process can use; 0 without a driver or a device.
int device_count();

}  // namespace ban_fast::cuda
