// CWTM's rows: the teacher's confidence, then weighted cross-entropy with the labels.
#include <utility>

#include "sweeps.h"

namespace ban_fast::BAN_FAST_ISA {
namespace {

template <class T>
struct Total {
  T largest;
  double sum;
};

// A row's largest value, and its sum of exp(x - reference).
template <class T>
Total<T> row_sum(const T* row, std::int64_t classes, T reference, const Upcoming next) {
  constexpr UnitTemperature<T> one;
  Vec<T> largest(-kInfinity<T>);
  LaneSum<T> sum;
  for_vectors<T>(
      0, classes,
      [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA {
        const Vec<T> x = load_some<tail>(row + i, classes - i, -kInfinity<T>);
        next.prefetch(i);
        largest = larger(largest, x);
        sum.add(exp_quotient(x - Vec<T>(reference), one));
      },
      [&]() BAN_FAST_LAMBDA { sum.end_block(); });
  return {largest_lane(largest), sum.value()};
}

// The same with reference the largest, for the most part from one visit: as in label_row, the largest of the row's
// beginning stands for it until a later one is far larger.
template <class T>
Total<T> row_total(const T* row, std::int64_t classes, const Upcoming next) {
  constexpr std::int64_t kBeginning = kBlockVectors * Vec<T>::lanes;
  constexpr UnitTemperature<T> one;
  const T first = row_maximum(row, classes < kBeginning ? classes : kBeginning);
  Total<T> total = row_sum(row, classes, first, next);
  if (!(total.largest - first <= kFar<T>)) return row_sum(row, classes, total.largest, next);
  if (first < total.largest) {
    total.sum *= double(exp_quotient(first - total.largest, one));
    if (total.sum < 1.0) total.sum = 1.0;  // the largest's own exp is 1, which rounding may have missed
  }
  return total;
}

template <class T>
void confidence_rows_as(const ConfidenceJob& job, std::int64_t begin, std::int64_t end) {
  const Selection& selection = job.selection;
  const std::int64_t classes = selection.classes;
  const ScratchRows<T> scratch(classes, 1);
  for (std::int64_t row = begin; row < end; ++row) {
    if (selection.ignored(row)) {
      job.log_confidence[row] = -kInfinity<double>;
      continue;
    }
    const T* t = fetch_row(job.teacher, selection.teacher_row(row), classes, scratch.row(0));
    const Upcoming next(job.teacher, selection.teacher_row(next_row(selection, row, end)));
    const Total<T> total = row_total(t, classes, next);
    const double of_label = job.by_label ? double(t[selection.labels[row]]) - double(total.largest) : 0.0;
    job.log_confidence[row] = of_label - log_of_sum(total.sum);
  }
}

// A row of the gradient that is computed, up to a factor, and not yet written: where it goes past the caches, its whole
// vectors can go while the next row is computed.
template <class T, class To>
class Due {
 public:
  Due() = default;
  Due(const T* values, T scale, To* row, std::int64_t classes, bool streamed)
      : values_(values), scale_(scale), row_(row), classes_(classes), streamed_(streamed) {
    if (!streamed) return;
    head_ = unaligned_head<T>(row);
    whole_ = classes > head_ ? (classes - head_) / Vec<T>::lanes * Vec<T>::lanes : 0;
  }

  // The vector that begins i elements after the first that may be streamed, if there is one.
  __attribute__((always_inline)) void stream(std::int64_t i) const {
    if (i < whole_) stream_whole(row_ + head_ + i, load(values_ + head_ + i) * Vec<T>(scale_));
  }

  // What stream leaves: everything of a row that stays in the caches, else the ends.
  void finish() const {
    if (!streamed_) return write(0, classes_);
    const std::int64_t end = head_ < classes_ ? head_ : classes_;
    write(0, end);
    write(end + whole_, classes_);
  }

 private:
  void write(std::int64_t begin, std::int64_t end) const {
    for_vectors<T>(
        begin, end,
        [&](std::int64_t i, auto tail)
            BAN_FAST_LAMBDA { write_some<tail>(row_ + i, load(values_ + i) * Vec<T>(scale_), end - i); },
        []() BAN_FAST_LAMBDA {});
  }

  const T* values_ = nullptr;
  T scale_ = T(0);
  To* row_ = nullptr;
  std::int64_t classes_ = 0, head_ = 0, whole_ = 0;
  bool streamed_ = false;
};

template <class T>
class Due<T, NoGradient> {
 public:
  Due() = default;
  Due(const T*, T, NoGradient*, std::int64_t, bool) {}
  void stream(std::int64_t) const {}
  void finish() const {}
};

template <class T, class To>
void weighted_label_rows_to(const WeightedLabelJob& job, To* gradient, std::int64_t begin, std::int64_t end) {
  const Selection& selection = job.selection;
  const std::int64_t classes = selection.classes;
  const ScratchRows<T> scratch(classes, 3);
  T *exp = scratch.row(1), *other = scratch.row(2);
  Due<T, To> due;
  for (std::int64_t row = begin; row < end; ++row) {
    if (selection.ignored(row)) {
      job.values[row] = 0.0;
      clear_row(job.gradient, row, classes);
      continue;
    }
    const T* z = fetch_row(job.student, row, classes, scratch.row(0));
    const Upcoming next(job.student, next_row(selection, row, end));
    const auto meanwhile = [&](std::int64_t i) BAN_FAST_LAMBDA {
      next.prefetch(i);
      due.stream(i);
    };
    const LabelRow label = label_row(z, classes, selection.labels[row], meanwhile, exp);
    due.finish();
    job.values[row] = label.loss;
    const T scale = T(job.weights[row] * job.scale / label.total);
    if constexpr (!std::is_same_v<To, NoGradient>) {
      due = {exp, scale, gradient + row * classes, classes, job.gradient.streamed};
      std::swap(exp, other);
      if (!job.gradient.streamed) due.finish(), due = {};
    }
  }
  for (std::int64_t i = 0; i < classes; i += Vec<T>::lanes) due.stream(i);
  due.finish();
  end_streaming();
}

template <class T>
void weighted_label_rows_as(const WeightedLabelJob& job, std::int64_t begin, std::int64_t end) {
  with_gradient_row<T>(job.gradient, 0, job.selection.classes, [&]<class To>(To* gradient) {
    weighted_label_rows_to<T>(job, gradient, begin, end);
  });
}

}  // namespace

void confidence_rows(const ConfidenceJob& job, std::int64_t begin, std::int64_t end) {
  if (job.acc_is_double) {
    confidence_rows_as<double>(job, begin, end);
  } else {
    confidence_rows_as<float>(job, begin, end);
  }
}

void weighted_label_rows(const WeightedLabelJob& job, std::int64_t begin, std::int64_t end) {
  if (is_double(job.student.dtype)) {
    weighted_label_rows_as<double>(job, begin, end);
  } else {
    weighted_label_rows_as<float>(job, begin, end);
  }
}

}  // namespace ban_fast::BAN_FAST_ISA
