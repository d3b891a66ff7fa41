// What the row kernels take and which there are: one table for each instruction set, compiled from the same sources.
#pragma once

#include "../elementary.h"
#include "../losses.h"
#include "dense_rows.h"

namespace ban_fast {

// Where gradients go: [rows, C] contiguous; null data: nowhere.
struct Gradient {
  void* data;
  DType dtype;
  // Written past the cache, since it is larger than that: saves reading what is overwritten.
  bool streamed = false;
};

struct KDJob {
  Matrix student, teacher;
  Selection selection;
  const PermutationKey* key;  // null: plain KD
  double temperature;
  bool entropy;
  double kd_scale;     // d loss / d (the KD term's q - p), with the power of two that an f16 gradient is stored at
  double label_scale;  // the same for the label term
  Gradient gradient;
  double* kd_values;     // [rows] KL, or KL + H, at unit weight; 0 in ignored rows
  double* label_values;  // [rows] cross-entropy; null without labels
};

struct ConfidenceJob {
  Matrix teacher;
  Selection selection;
  bool acc_is_double;
  bool by_label;           // the label's probability, not the largest
  double* log_confidence;  // [rows] -inf in ignored rows
};

struct WeightedLabelJob {
  Matrix student;
  Selection selection;
  const double* weights;  // [rows]
  double scale;           // the power of two that an f16 gradient is stored at
  Gradient gradient;
  double* values;  // [rows] cross-entropy, 0 in ignored rows
};

struct TargetsJob {
  Matrix teacher;
  Selection selection;
  PermutationKey key;
  double temperature;
  void* targets;
};

struct PermutationJob {
  const std::int64_t* argmax;
  std::int64_t classes;
  PermutationKey key;
  std::int64_t* sources;
};

struct ScaleJob {
  Gradient gradient;
  std::int64_t classes;
  const void* factors;
  std::int64_t factor_stride;
  double scale;
};

// Each works on the rows [begin, end) of its job.
struct RowKernels {
  const char* name;
  void (*kd)(const KDJob& job, std::int64_t begin, std::int64_t end);
  void (*confidence)(const ConfidenceJob& job, std::int64_t begin, std::int64_t end);
  void (*weighted_label)(const WeightedLabelJob& job, std::int64_t begin, std::int64_t end);
  void (*targets)(const TargetsJob& job, std::int64_t begin, std::int64_t end);
  void (*permutation)(const PermutationJob& job, std::int64_t begin, std::int64_t end);
  void (*scale)(const ScaleJob& job, std::int64_t begin, std::int64_t end);
  DenseRowKernels dense;
};

namespace baseline {
extern const RowKernels row_kernels;
}
namespace avx2 {
extern const RowKernels row_kernels;
}
namespace avx512 {
extern const RowKernels row_kernels;
}

// The kernels of the instruction set that a file is compiled for.
namespace BAN_FAST_ISA {
void kd_rows(const KDJob& job, std::int64_t begin, std::int64_t end);
void confidence_rows(const ConfidenceJob& job, std::int64_t begin, std::int64_t end);
void weighted_label_rows(const WeightedLabelJob& job, std::int64_t begin, std::int64_t end);
void target_rows(const TargetsJob& job, std::int64_t begin, std::int64_t end);
void permutation_rows(const PermutationJob& job, std::int64_t begin, std::int64_t end);
void scale_rows(const ScaleJob& job, std::int64_t begin, std::int64_t end);
}  // namespace BAN_FAST_ISA

// The table to use: the best that this processor has, or the one that the environment variable BAN_FAST_ISA names.
const RowKernels& row_kernels();

}  // namespace ban_fast
