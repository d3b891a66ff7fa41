#include "cuda/info.h"

#include <cuda_runtime_api.h>

namespace ban_fast::cuda {

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // a missing driver is an answer here, not an error to leave behind for the next call
    return 0;
  }
  return count;
}

}  // namespace ban_fast::cuda
