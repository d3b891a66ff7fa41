// Multiplying a stored gradient in place.
#include "sweeps.h"

namespace ban_fast::BAN_FAST_ISA {
namespace {

template <class T, class To>
void scale_rows_as(const ScaleJob& job, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    To* gradient = static_cast<To*>(job.gradient.data) + row * job.classes;
    const T factor = static_cast<const T*>(job.factors)[row * job.factor_stride] * T(job.scale);
    const Vec<T> by(factor);
    for_vectors<T>(
        0, job.classes,
        [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA {
          write_some<tail>(gradient + i, read_some<tail>(gradient + i, job.classes - i) * by, job.classes - i);
        },
        []() BAN_FAST_LAMBDA {});
  }
}

}  // namespace

void scale_rows(const ScaleJob& job, std::int64_t begin, std::int64_t end) {
  switch (job.gradient.dtype) {
    case DType::f64: return scale_rows_as<double, double>(job, begin, end);
    case DType::f32: return scale_rows_as<float, float>(job, begin, end);
    case DType::f16: return scale_rows_as<float, Half>(job, begin, end);
    case DType::bf16: return scale_rows_as<float, BFloat16>(job, begin, end);
  }
}

}  // namespace ban_fast::BAN_FAST_ISA
