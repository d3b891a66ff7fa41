// CWTM's rows: the teacher's confidence, then weighted cross-entropy with the labels.
#include <utility>

#include "sweeps.h"

namespace ban_fast::BAN_FAST_ISA {
namespace {

// exp(x) for x <= 80 as a term of a sum that is 1 at least: within 1.8e-7 + 3e-9 |x| of itself, 1 at 0, the floor's
// 2.5e-38 below the floor. NaN stays NaN. A quarter of exp_quotient's steps are spared: 2^(n/8) comes from a table, the
// polynomial is for |r| <= ln(2) / 16 (minimax, within 2.6e-8), and n ln(2) / 8 is taken away in one part.
BAN_FAST_HD Vec<float> exp_term(Vec<float> x) {
  if constexpr (!kFused) return exp_quotient(x, UnitTemperature<float>{});
  using F = Vec<float>;
  // The bits of 2^(j/8), less those that a shifted j has already put into the exponent.
  static constexpr std::uint32_t kEighths[16] = {
      0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
      0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
  constexpr float kRounding = 0x1.8p23f;  // rounds what is added to it to an integer
  constexpr float kFloor = -86.6f;        // below it the power would be subnormal
  const F y = larger(x, F(kFloor));
  const F shifted = madd(y, F(0x1.715476p+3f), F(kRounding));
  const F r = madd(shifted - F(kRounding), F(-0x1.62e43p-4f), y);
  const Words bits = bits_of(shifted);
  const F power = from_bits(look_up(kEighths, bits) + (bits << 20));
  return madd(power * r, poly(r, 1.0f, 0x1.00087cp-1f, 0x1.5556p-3f), power);
}
BAN_FAST_HD Vec<double> exp_term(Vec<double> x) { return exp_quotient(x, UnitTemperature<double>{}); }

// How far beyond its reference a sum may reach: less than kFar, since a block costs less than a row to take again.
template <class T>
inline constexpr T kNearby = T(2);

template <class T>
struct Total {
  T largest;
  double sum;
};

// A row's largest value m and its sum of exp(x - m), from one visit. The reference is the largest of the row's
// beginning until a later block goes far beyond it: that block is taken again, with its own largest, as a difference to
// what is far away would be rounded more than a term may be.
template <class T>
Total<T> row_total(const T* row, std::int64_t classes, const Upcoming next) {
  constexpr std::int64_t kBlock = kBlockVectors * Vec<T>::lanes;
  constexpr UnitTemperature<T> one;
  Vec<T> largest(-kInfinity<T>);
  const auto block_sum = [&](std::int64_t begin, std::int64_t end, T reference) BAN_FAST_LAMBDA {
    // While all are -inf, any reference does: their terms are multiplied by 0 when a finite one comes.
    const Vec<T> from(reference == -kInfinity<T> ? T(0) : reference);
    Vec<T> sum(T(0));
    for_vectors<T>(
        begin, end,
        [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA {
          const Vec<T> x = load_some<tail>(row + i, classes - i, -kInfinity<T>);
          next.prefetch(i);
          largest = larger(largest, x);
          sum = sum + exp_term(x - from);
        },
        []() BAN_FAST_LAMBDA {});
    return widened_sum(sum);
  };
  T reference = row_maximum(row, classes < kBlock ? classes : kBlock);
  Vec<double> sum(0.0);
  for (std::int64_t begin = 0; begin < classes; begin += kBlock) {
    const std::int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
    Vec<double> more = block_sum(begin, end, reference);
    if (any(Vec<T>(reference + kNearby<T>) < largest)) {
      const T before = reference;
      reference = largest_lane(largest);
      sum = sum * Vec<double>(double(exp_quotient(before - reference, one)));
      more = block_sum(begin, end, reference);
    }
    sum = sum + more;
  }
  Total<T> total{largest_lane(largest), lane_sum(sum)};
  total.sum *= double(exp_quotient(reference - total.largest, one));  // NaN where all are -inf
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
