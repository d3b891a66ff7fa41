// The losses over emulated kernels, for ctypes: 0, or -1 where emulated_error() says what went wrong.
#include "../../../../csrc/cuda/losses.h"

#include <string>

#include "device.cuh"

namespace emulator {
extern std::uint32_t seed;
}
void run_with_mistake(int mistake, int* result);

namespace {

std::string message;

template <class Call>
int guarded(Call call) {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return -1;
  }
}

}  // namespace

using namespace ban_fast;

extern "C" {

const char* emulated_error() { return message.c_str(); }

std::int64_t emulated_scratch() { return cuda::kScratch; }

void emulated_device(int shared_of_block, int shared_of_multiprocessor, int cluster, std::uint32_t seed) {
  emulator::limits = {shared_of_block, shared_of_multiprocessor, cluster};
  emulator::seed = seed;
}

int emulated_kd(const Matrix* student, const Matrix* teacher, const Selection* selection, const cuda::Key* key,
                const KDOptions* options, const LossResult* result, const cuda::Launch* launch) {
  return guarded([&] { cuda::kd(*student, *teacher, *selection, key, *options, *result, *launch); });
}

int emulated_cwtm(const Matrix* student, const Matrix* teacher, const Matrix* confidence, const void* normalizer,
                  bool by_label, const Selection* selection, const LossResult* result, const cuda::Launch* launch) {
  return guarded(
      [&] { cuda::cwtm(*student, teacher, confidence, normalizer, by_label, *selection, *result, *launch); });
}

int emulated_dkpp_targets(const Matrix* teacher, const Selection* selection, const cuda::Key* key, double temperature,
                          void* targets, const cuda::Launch* launch) {
  return guarded([&] { cuda::dkpp_targets(*teacher, *selection, *key, temperature, targets, *launch); });
}

int emulated_dkpp_permutation(const std::int64_t* argmax, std::int64_t rows, std::int64_t classes, const cuda::Key* key,
                              std::int64_t* sources, const cuda::Launch* launch) {
  return guarded([&] { cuda::dkpp_permutation(argmax, rows, classes, *key, sources, *launch); });
}

int emulated_scale_gradient(void* gradient, int dtype, std::int64_t rows, std::int64_t classes, const void* factors,
                            std::int64_t factor_stride, const void* scale, const cuda::Launch* launch) {
  return guarded([&] {
    cuda::scale_gradient(gradient, DType(dtype), rows, classes, factors, factor_stride, scale, *launch);
  });
}

int emulated_mistake(int mistake, int* result) {
  return guarded([&] { run_with_mistake(mistake, result); });
}

}  // extern "C"
