// The losses over their rows: checks, scales, threads, and sums in the order of rows.
#include "losses.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/rows.h"
#include "cpu/threads.h"

namespace ban_fast {
namespace {

// Below this many elements waking a thread costs more than it saves.
constexpr std::int64_t kPiece = 1 << 15;
// Pieces a thread, so that one that is held up elsewhere does not keep the others waiting.
constexpr std::int64_t kPieces = 8;

template <class Job>
void run(void (*kernel)(const Job&, std::int64_t, std::int64_t), const Job& job, std::int64_t rows,
         std::int64_t classes, int threads) {
  struct Context {
    void (*kernel)(const Job&, std::int64_t, std::int64_t);
    const Job& job;
  } context{kernel, job};
  const std::int64_t least = kPiece / std::max<std::int64_t>(1, classes);
  const std::int64_t chunk = std::max<std::int64_t>({1, least, rows / (kPieces * std::max(1, threads))});
  parallel_for(
      rows, chunk, threads,
      [](void* opaque, std::int64_t begin, std::int64_t end) {
        const Context& self = *static_cast<Context*>(opaque);
        self.kernel(self.job, begin, end);
      },
      &context);
}

// A gradient that no cache holds is written past it.
Gradient gradient_of(const LossResult& result, DType dtype, const Selection& selection) {
  constexpr std::int64_t kCache = 16 << 20;
  const std::int64_t row_bytes = selection.classes * (dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2);
  return {result.gradient, dtype, row_bytes * selection.rows >= kCache};
}

struct Checked {
  Offence offence;
  std::int64_t kept = 0;
};

// Rows that count, and whether every index in them may be used. Nothing of an ignored row is looked at.
Checked check(const Selection& selection, std::int64_t teacher_rows) {
  Checked checked;
  checked.kept = selection.rows;
  if (selection.labels != nullptr) {
    for (std::int64_t row = 0; row < selection.rows; ++row) {
      const std::int64_t label = selection.labels[row];
      if (label == selection.ignore_index) {
        --checked.kept;
      } else if (label < 0 || label >= selection.classes) {
        checked.offence = {Offence::What::label, row};
        return checked;
      }
    }
  }
  if (selection.teacher_rows != nullptr) {
    for (std::int64_t row = 0; row < selection.rows; ++row) {
      const std::int64_t from = selection.teacher_rows[row];
      if ((from < 0 || from >= teacher_rows) && !selection.ignored(row)) {
        checked.offence = {Offence::What::teacher_row, row};
        return checked;
      }
    }
  }
  return checked;
}

// The largest power of two that keeps |gradient| <= bound within fp16, for f16 gradients; else 1. Its inverse goes to
// the caller.
double storage_scale(const LossResult& result, DType dtype, double bound) {
  if (dtype != DType::f16 || result.grad_scale == nullptr) return 1.0;
  double scale = 1.0;
  if (bound > 0.0 && std::isfinite(bound)) {
    const double largest = 65504.0 * (1.0 - 0x1p-11);  // rounding on the way cannot carry it beyond 65504
    scale = std::ldexp(1.0, std::clamp(int(std::floor(std::log2(largest / bound))), -126, 126));
  }
  *result.grad_scale = float(1.0 / scale);
  return scale;
}

void put(void* to, bool as_double, std::int64_t i, double value) {
  if (as_double) {
    static_cast<double*>(to)[i] = value;
  } else {
    static_cast<float*>(to)[i] = float(value);
  }
}

double weighted(double weight, double value) { return weight == 0.0 ? 0.0 : weight * value; }

}  // namespace

Offence kd(const Matrix& student, const Matrix& teacher, const Selection& selection, const PermutationKey* key,
           const KDOptions& options, const LossResult& result, int threads) {
  const Checked checked = check(selection, teacher.rows);
  if (checked.offence.what != Offence::What::none) return checked.offence;

  const bool is_mean = options.reduction == Reduction::mean;
  const double each = is_mean ? 1.0 / double(std::max<std::int64_t>(1, checked.kept)) : 1.0;
  const double temperature = options.temperature;
  const double kd_scale = options.kd_weight * (options.scale_t2 ? temperature : 1.0 / temperature) * each;
  const double label_scale = selection.labels == nullptr ? 0.0 : options.label_weight * each;
  const double storage = storage_scale(result, student.dtype, std::abs(kd_scale) + std::abs(label_scale));

  const std::size_t rows = std::size_t(selection.rows);
  const bool need_terms = result.kd != nullptr;
  const bool with_label = selection.labels != nullptr && (need_terms || options.label_weight != 0.0);
  std::vector<double> values(with_label ? 2 * rows : rows);
  double* const kd_values = values.data();
  double* const label_values = with_label ? kd_values + rows : nullptr;
  const KDJob job{student,
                  teacher,
                  selection,
                  key,
                  temperature,
                  options.cross_entropy,
                  kd_scale * storage,
                  label_scale * storage,
                  gradient_of(result, student.dtype, selection),
                  kd_values,
                  label_values};
  run(row_kernels().kd, job, selection.rows, selection.classes, threads);

  const bool acc_is_double = is_double(student.dtype);
  const double t2 = options.scale_t2 ? temperature * temperature : 1.0;
  const auto write = [&](std::int64_t i, double kd_value, double label_value) {
    put(result.loss, acc_is_double, i,
        weighted(options.kd_weight, kd_value) + weighted(options.label_weight, label_value));
    if (!need_terms) return;
    put(result.kd, acc_is_double, i, kd_value);
    put(result.label, acc_is_double, i, label_value);
  };
  double kd_sum = 0.0, label_sum = 0.0;
  for (std::int64_t row = 0; row < selection.rows; ++row) {
    const double kd_value = t2 * kd_values[row], label_value = label_values == nullptr ? 0.0 : label_values[row];
    if (options.reduction == Reduction::none) {
      write(row, kd_value, label_value);
    } else {
      kd_sum += kd_value;
      label_sum += label_value;
    }
  }
  if (options.reduction != Reduction::none) write(0, kd_sum * each, label_sum * each);
  return {};
}

namespace {

// w_s of every row, 0 where ignored, into `weights`, which holds log c_s (or c_s where `given`) for the rows that
// count.
void weigh(std::vector<double>& weights, const Selection& selection, bool given, const double* normalizer) {
  double largest = -std::numeric_limits<double>::infinity(), sum = 0.0;
  if (given || normalizer != nullptr) {
    largest = 0.0;
  } else {
    for (double log_c : weights) largest = std::max(largest, log_c);
  }
  for (std::size_t row = 0; row < weights.size(); ++row) {
    if (selection.ignored(std::int64_t(row))) {
      weights[row] = 0.0;
      continue;
    }
    if (!given) weights[row] = std::exp(weights[row] - largest);
    sum += weights[row];
  }
  if (normalizer != nullptr) sum = *normalizer;
  for (std::size_t row = 0; row < weights.size(); ++row) {
    if (!selection.ignored(std::int64_t(row))) weights[row] /= sum;
  }
}

}  // namespace

Offence cwtm(const Matrix& student, const Matrix* teacher, const Matrix* confidence, const double* normalizer,
             bool by_label, const Selection& selection, const LossResult& result, int threads) {
  const Checked checked = check(selection, confidence != nullptr ? confidence->rows : teacher->rows);
  if (checked.offence.what != Offence::What::none) return checked.offence;

  const std::size_t rows = std::size_t(selection.rows);
  std::vector<double> weights(rows), values(rows);
  if (confidence != nullptr) {
    const float* c = static_cast<const float*>(confidence->data);
    for (std::size_t row = 0; row < rows; ++row) {
      if (selection.ignored(std::int64_t(row))) continue;
      weights[row] = double(c[selection.teacher_row(std::int64_t(row)) * confidence->row_stride]);
    }
  } else {
    const ConfidenceJob job{*teacher, selection, is_double(student.dtype), by_label, weights.data()};
    run(row_kernels().confidence, job, selection.rows, selection.classes, threads);
  }
  weigh(weights, selection, confidence != nullptr, normalizer);

  double bound = 0.0;
  for (double weight : weights) bound = std::max(bound, std::abs(weight));
  const double storage = storage_scale(result, student.dtype, bound);
  const WeightedLabelJob job{
      student, selection, weights.data(), storage, gradient_of(result, student.dtype, selection), values.data()};
  run(row_kernels().weighted_label, job, selection.rows, selection.classes, threads);

  double loss = 0.0;
  for (std::size_t row = 0; row < rows; ++row) loss += weighted(weights[row], values[row]);
  const bool acc_is_double = is_double(student.dtype);
  put(result.loss, acc_is_double, 0, loss);
  if (result.kd == nullptr) return {};
  put(result.kd, acc_is_double, 0, 0.0);
  put(result.label, acc_is_double, 0, loss);
  return {};
}

Offence dkpp_targets(const Matrix& teacher, const Selection& selection, const PermutationKey& key, double temperature,
                     void* targets, int threads) {
  const Checked checked = check(selection, teacher.rows);
  if (checked.offence.what != Offence::What::none) return checked.offence;
  const TargetsJob job{teacher, selection, key, temperature, targets};
  run(row_kernels().targets, job, selection.rows, selection.classes, threads);
  return {};
}

void dkpp_permutation(const std::int64_t* argmax, std::int64_t rows, std::int64_t classes, const PermutationKey& key,
                      std::int64_t* sources, int threads) {
  const PermutationJob job{argmax, classes, key, sources};
  run(row_kernels().permutation, job, rows, classes, threads);
}

void scale_gradient(void* gradient, DType dtype, std::int64_t rows, std::int64_t classes, const void* factors,
                    std::int64_t factor_stride, double scale, int threads) {
  const ScaleJob job{{gradient, dtype}, classes, factors, factor_stride, scale};
  run(row_kernels().scale, job, rows, classes, threads);
}

}  // namespace ban_fast
