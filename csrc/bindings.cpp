// The only file that knows Python: addresses and sizes in, nothing owned.
#include <pybind11/pybind11.h>

#include <string>

#ifdef BAN_FAST_WITH_CUDA
#include "cuda/info.h"
#endif

namespace py = pybind11;

namespace {

py::dict cuda_info() {
  py::dict info;
#ifdef BAN_FAST_WITH_CUDA
  info["built"] = true;
  info["runtime_version"] = ban_fast::cuda::runtime_version();
  info["architectures"] = std::string(BAN_FAST_CUDA_ARCHS);
  info["devices"] = ban_fast::cuda::device_count();
#else
  info["built"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of ban_fast over plain addresses; see ban_fast/backends/native.py.";
  m.def("cuda_info", &cuda_info,
        "What the CUDA part was built with: {built, runtime_version, architectures, devices}; {built: False} without it.");
}
