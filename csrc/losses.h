// The C++ API of the losses on the CPU: plain addresses, sizes and strides; nothing is owned, nothing allocated for the
// caller.
//
// "acc" is the arithmetic: double where the student (for targets: the teacher) is double, else float.
#pragma once

#include <cstdint>

namespace ban_fast {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };
enum class Reduction : int { mean = 0, sum = 1, none = 2 };

inline constexpr bool is_double(DType dtype) { return dtype == DType::f64; }

// Logits [rows, C]; strides in elements.
struct Matrix {
  const void* data;
  DType dtype;
  std::int64_t rows, row_stride, column_stride;
};

// Which rows count, and which row of the teacher each reads.
struct Selection {
  std::int64_t rows, classes;
  const std::int64_t* labels;        // [rows], or null: all rows count
  const std::int64_t* teacher_rows;  // [rows], or null: row i reads row i
  std::int64_t ignore_index;

  bool ignored(std::int64_t row) const { return labels != nullptr && labels[row] == ignore_index; }
  std::int64_t teacher_row(std::int64_t row) const { return teacher_rows == nullptr ? row : teacher_rows[row]; }
};

// What keys DKPP's permutation.
struct PermutationKey {
  std::uint64_t seed, step;
  const std::int64_t* sample_ids;  // [rows], or null: 0, 1, 2, ...

  std::uint64_t id(std::int64_t row) const {
    return sample_ids == nullptr ? std::uint64_t(row) : std::uint64_t(sample_ids[row]);
  }
};

struct KDOptions {
  double temperature, kd_weight, label_weight;
  bool cross_entropy;  // the teacher's entropy stays in
  bool scale_t2;
  Reduction reduction;
};

// Where a loss writes. loss, kd and label are acc: one value each, or [rows] for Reduction::none; kd and label are null
// where nobody asks for the terms, and a label term without weight is not computed then.
struct LossResult {
  void* loss;
  void* kd;
  void* label;
  void* gradient;     // [rows, C] contiguous in the student's dtype; null: forward only
  float* grad_scale;  // f16 students: the power of two that `gradient` still wants; else null
};

// A label or teacher row out of range: the first offender. Nothing has been read through it, and nothing written.
struct Offence {
  enum class What : int { none = 0, label = 1, teacher_row = 2 };
  What what = What::none;
  std::int64_t row = 0;
};

// kd_weight * T^2 * KL(p_T || q_T) + label_weight * CE(q, labels); with a key, p is the teacher's row permuted by it
// (DKPP).
Offence kd(const Matrix& student, const Matrix& teacher, const Selection& selection, const PermutationKey* key,
           const KDOptions& options, const LossResult& result, int threads);

// sum_s w_s CE_s with w_s = c_s / sum_u c_u. c is `confidence` [M] (its stride in elements) where that is given;
// otherwise the largest probability of the teacher's row, or, `by_label`, its probability of the label. `normalizer`:
// stands for the sum.
Offence cwtm(const Matrix& student, const Matrix* teacher, const Matrix* confidence, const double* normalizer,
             bool by_label, const Selection& selection, const LossResult& result, int threads);

// The permuted distributions [rows, C], contiguous, acc.
Offence dkpp_targets(const Matrix& teacher, const Selection& selection, const PermutationKey& key, double temperature,
                     void* targets, int threads);

// sources[i, j]: the class whose value class j of row i takes; argmax[i] keeps its own.
void dkpp_permutation(const std::int64_t* argmax, std::int64_t rows, std::int64_t classes, const PermutationKey& key,
                      std::int64_t* sources, int threads);

// gradient [rows, C] *= factors[row * factor_stride] * scale, in acc with one rounding.
void scale_gradient(void* gradient, DType dtype, std::int64_t rows, std::int64_t classes, const void* factors,
                    std::int64_t factor_stride, double scale, int threads);

// The instruction set in use: "baseline", "avx2" or "avx512". BAN_FAST_ISA names one; std::invalid_argument where it is
// unknown or this processor has it not.
const char* instruction_set();

}  // namespace ban_fast
