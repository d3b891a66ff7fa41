// The passes of a dense block over some of their rows, compiled once for each instruction set.
#pragma once

#include "../dense.h"
#include "../elementary.h"

namespace ban_fast {

// Each works on the rows [begin, end) of its job, one at least.
struct DenseRowKernels {
  void (*activate)(const dense::Activate& job, std::int64_t begin, std::int64_t end);
  // `part`: [2, channels], mean and sum of squared distances from it.
  void (*moments)(const dense::Moments& job, std::int64_t begin, std::int64_t end, double* part);
  // `part`: [2, channels], what these rows add to dz_sum and distance_sum.
  void (*deposit)(const dense::Deposit& job, std::int64_t begin, std::int64_t end, double* part);
  void (*correct)(const dense::Correct& job, std::int64_t begin, std::int64_t end);
  // job.weight in panels (pointwise.h) of [channels, outputs].
  void (*pointwise)(const dense::Pointwise& job, std::int64_t begin, std::int64_t end);
  // job.weight in panels of [outputs, channels]. `part`: as deposit's, 0 before; `weight_part`: what these rows add to
  // weight_grad, as [channels, outputs] with outputs up to a multiple of 16, 0 before; null where nobody asks.
  void (*pointwise_backward)(const dense::PointwiseBackward& job, std::int64_t begin, std::int64_t end, double* part,
                             void* weight_part);
};

namespace BAN_FAST_ISA {
void dense_activate_rows(const dense::Activate& job, std::int64_t begin, std::int64_t end);
void dense_moments_rows(const dense::Moments& job, std::int64_t begin, std::int64_t end, double* part);
void dense_deposit_rows(const dense::Deposit& job, std::int64_t begin, std::int64_t end, double* part);
void dense_correct_rows(const dense::Correct& job, std::int64_t begin, std::int64_t end);
void pointwise_rows(const dense::Pointwise& job, std::int64_t begin, std::int64_t end);
void pointwise_backward_rows(const dense::PointwiseBackward& job, std::int64_t begin, std::int64_t end, double* part,
                             void* weight_part);
}

}  // namespace ban_fast
