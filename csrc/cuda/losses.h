// The C++ API of the losses on CUDA devices: addresses of the device's memory, sizes, strides and a stream. Nothing is
// owned, allocated or waited for, and all of it can be captured in a CUDA graph. A CUDA error is a std::runtime_error.
//
// Labels and teacher rows out of range cannot be reported without waiting: such a row's loss is NaN and its gradient 0,
// and nothing is read through them.
#pragma once

#include "../losses.h"

namespace ban_fast::cuda {

// Blocks of a launch: each leaves a sum of its rows, and the last one adds those up.
inline constexpr int kMostBlocks = 4096;
// Blocks that count kept rows, or add up confidences, before the loss's launch.
inline constexpr int kMostCounters = 128;

// Doubles of scratch that every call needs.
inline constexpr std::int64_t kScratch = 2 * (kMostBlocks + kMostCounters);

struct Launch {
  int device;
  void* stream;
  double* scratch;         // [kScratch]; for cwtm from the teacher [kScratch + rows]
  std::uint32_t* counter;  // 0; it is so again after the launch, which nothing else may share it with meanwhile
};

// What keys DKPP's permutation.
struct Key {
  std::uint64_t seed, step;
  const std::int64_t* step_at;     // where the step is, or null: it is `step`
  const std::int64_t* sample_ids;  // [rows], or null: 0, 1, 2, ...
};

// These do as their namesakes of losses.h. rows >= 1, classes >= 1 and below 2^31.

void kd(const Matrix& student, const Matrix& teacher, const Selection& selection, const Key* key,
        const KDOptions& options, const LossResult& result, const Launch& launch);

// normalizer: where it is, an acc, or null.
void cwtm(const Matrix& student, const Matrix* teacher, const Matrix* confidence, const void* normalizer, bool by_label,
          const Selection& selection, const LossResult& result, const Launch& launch);

void dkpp_targets(const Matrix& teacher, const Selection& selection, const Key& key, double temperature, void* targets,
                  const Launch& launch);

void dkpp_permutation(const std::int64_t* argmax, std::int64_t rows, std::int64_t classes, const Key& key,
                      std::int64_t* sources, const Launch& launch);

// gradient [rows, C] *= factors[row * factor_stride] * scale in acc with one rounding; `factors` and `scale`, which may
// be null, are acc. Where the product is 1 the gradient is not even read.
void scale_gradient(void* gradient, DType dtype, std::int64_t rows, std::int64_t classes, const void* factors,
                    std::int64_t factor_stride, const void* scale, const Launch& launch);

}  // namespace ban_fast::cuda
