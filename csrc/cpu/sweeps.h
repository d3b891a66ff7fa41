// Passes over one row that several losses share. A row is classes >= 1 values of the arithmetic type T with unit
// stride.
#pragma once

#include <type_traits>

#include "../row_math.h"
#include "convert.h"
#include "rows.h"
#include "scratch.h"
#include "vec.h"

#define BAN_FAST_LAMBDA __attribute__((always_inline))

namespace ban_fast::BAN_FAST_ISA {

template <class T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();

// How many rows a kernel takes through its stages side by side: one short row alone would mostly wait for its own sums.
inline constexpr int kMostRowsAtOnce = 8;
BAN_FAST_HD int rows_at_once(std::int64_t classes) {
  constexpr std::int64_t kElements = 1024;  // a few buffers of so many stay in the first-level cache
  const std::int64_t rows = kElements / ((classes + 15) / 16 * 16);
  return rows < 1 ? 1 : rows > kMostRowsAtOnce ? kMostRowsAtOnce : int(rows);
}

// Scratch of one thread: rows of T, each with room for a vector beyond its last, and 32-bit words. Long rows are kept
// some cache lines apart, so that those of 2^n classes do not all fall on the same lines of the cache.
template <class T>
class ScratchRows {
 public:
  ScratchRows(std::int64_t classes, int rows, std::int64_t words = 0)
      : pitch_((classes + 15) / 16 * 16 + (classes < 1024 ? 16 : std::int64_t(5 * 64 / sizeof(T)))) {
    const std::size_t row_bytes = std::size_t(pitch_) * std::size_t(rows) * sizeof(T);
    first_ = static_cast<T*>(thread_scratch(row_bytes + std::size_t(words) * sizeof(std::uint32_t)));
    words_ = reinterpret_cast<std::uint32_t*>(first_ + pitch_ * rows);
  }

  T* row(int i) const { return first_ + i * pitch_; }
  std::uint32_t* words() const { return words_; }

  // The rows from number `rows` on.
  ScratchRows after(int rows) const {
    ScratchRows rest = *this;
    rest.first_ = row(rows);
    return rest;
  }

 private:
  std::int64_t pitch_;
  T* first_;
  std::uint32_t* words_;
};

BAN_FAST_HD std::int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// The row of a matrix that comes next: work on this one hides the way of its lines from memory to the cache.
class Upcoming {
 public:
  Upcoming() = default;
  Upcoming(const Matrix& matrix, std::int64_t row)
      : element_(element_size(matrix.dtype)),
        row_(static_cast<const char*>(matrix.data) + row * matrix.row_stride * element_) {}

  // The line of element i, if the row is contiguous; if not, some line.
  __attribute__((always_inline)) void prefetch(std::int64_t i) const { BAN_FAST_ISA::prefetch(row_ + i * element_); }

 private:
  std::int64_t element_;
  const char* row_;
};

// The row after `row` in [0, end), where that counts; else `row` itself.
BAN_FAST_HD std::int64_t next_row(const Selection& selection, std::int64_t row, std::int64_t end) {
  return row + 1 < end && !selection.ignored(row + 1) ? row + 1 : row;
}

// A sum of many terms: lanes add up a block of vectors in T, blocks go on in double, so that no fp32 sum has many
// terms.
template <class T>
struct LaneSum {
  Vec<T> block{T(0)};
  Vec<double> total{0.0};

  __attribute__((always_inline)) void add(Vec<T> x) { block = block + x; }
  __attribute__((always_inline)) void add_product(Vec<T> x, Vec<T> y) { block = madd(x, y, block); }
  __attribute__((always_inline)) void end_block() {
    total = total + widened_sum(block);
    block = Vec<T>(T(0));
  }
  __attribute__((always_inline)) double value() const { return lane_sum(total); }
};

inline constexpr int kBlockVectors = 16;

// Calls body(i, tail) for the vectors of [begin, end), tail a constant: whether the vector is the last and cut short.
// end_block() comes after every kBlockVectors or so, and at the end.
template <class T, class Body, class EndBlock>
BAN_FAST_HD void for_vectors(std::int64_t begin, std::int64_t end, Body body, EndBlock end_block) {
  constexpr std::int64_t lanes = Vec<T>::lanes;
  const std::int64_t whole = begin + (end - begin) / lanes * lanes;
  std::int64_t i = begin;
  while (whole - i > kBlockVectors * lanes) {
    const std::int64_t stop = i + kBlockVectors * lanes;
    for (; i < stop; i += lanes) body(i, std::false_type{});
    end_block();
  }
  for (; i < whole; i += lanes) body(i, std::false_type{});
  if (whole < end) body(whole, std::true_type{});
  end_block();
}

template <class T>
BAN_FAST_HD typename Vec<T>::Mask first_lanes(std::int64_t count) {
  return lane_numbers<IntOf<T>>() < Vec<IntOf<T>>(IntOf<T>(count));
}

// The largest of the row's elements [begin, end) that fall on each lane.
template <class T>
BAN_FAST_HD Vec<T> lane_maxima(const T* row, std::int64_t begin, std::int64_t end) {
  Vec<T> largest(-kInfinity<T>);
  for_vectors<T>(
      begin, end,
      [&](std::int64_t i, auto tail)
          BAN_FAST_LAMBDA { largest = larger(largest, load_some<tail>(row + i, end - i, -kInfinity<T>)); },
      []() BAN_FAST_LAMBDA {});
  return largest;
}

template <class T>
BAN_FAST_HD T row_maximum(const T* row, std::int64_t classes) {
  return largest_lane(lane_maxima(row, 0, classes));
}

template <class T>
struct Peak {
  T value;
  std::int64_t index;
};

// The same of a short row, without a branch that depends on where it is: a wrong guess would cost as much as the row.
template <class T>
BAN_FAST_HD Peak<T> short_row_peak(const T* row, std::int64_t classes) {
  using Int = IntOf<T>;
  Vec<T> largest(-kInfinity<T>);
  Vec<Int> where = lane_numbers<Int>();
  for_vectors<T>(
      0, classes,
      [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA {
        const Vec<T> x = load_some<tail>(row + i, classes - i, -kInfinity<T>);
        const auto is_larger = largest < x;
        largest = select(is_larger, x, largest);
        where = select(is_larger, lane_numbers<Int>() + Vec<Int>(Int(i)), where);
      },
      []() BAN_FAST_LAMBDA {});
  const T value = largest_lane(largest);
  return {value, smallest_of(largest == Vec<T>(value), where)};
}

// The row's largest value and its lowest index (0 in a row of NaN).
template <class T>
BAN_FAST_HD Peak<T> row_peak(const T* row, std::int64_t classes) {
  constexpr std::int64_t lanes = Vec<T>::lanes;
  if (classes <= kBlockVectors * lanes) return short_row_peak(row, classes);
  Peak<T> peak{-kInfinity<T>, 0};
  Vec<T> block(-kInfinity<T>);
  std::int64_t block_begin = 0, peak_block = 0;
  for_vectors<T>(
      0, classes,
      [&](std::int64_t i, auto tail)
          BAN_FAST_LAMBDA { block = larger(block, load_some<tail>(row + i, classes - i, -kInfinity<T>)); },
      [&]() BAN_FAST_LAMBDA {
        if (any(Vec<T>(peak.value) < block)) {
          peak.value = largest_lane(block);
          peak_block = block_begin;
        }
        block_begin += kBlockVectors * lanes;
        block = Vec<T>(-kInfinity<T>);
      });
  for (std::int64_t i = peak_block; i < classes; i += lanes) {
    const bool whole = i + lanes <= classes;
    const Vec<T> x = whole ? load(row + i) : load_first(row + i, int(classes - i), -kInfinity<T>);
    const int lane = first_set(x == Vec<T>(peak.value));
    if (lane < lanes && i + lane < classes) {
      peak.index = i + lane;
      break;
    }
  }
  return peak;
}

// ---- The label term --------------------------------------------------------------------------------------------

template <class T>
struct LabelSums {
  double others;  // of exp(z - reference), without the label's
  T largest;
};

// Fills the row's exp, at the label with minus the sum of the others. kKnown: the reference is the largest.
template <bool kKnown, class T, class Meanwhile>
BAN_FAST_HD LabelSums<T> label_sums(const T* z, std::int64_t classes, std::int64_t label, T reference,
                                    const Meanwhile& meanwhile, T* exp) {
  constexpr std::int64_t lanes = Vec<T>::lanes;
  constexpr UnitTemperature<T> one;
  LaneSum<T> rest;
  Vec<T> largest(-kInfinity<T>);
  const auto body = [&](std::int64_t i, std::int64_t count, auto whole) BAN_FAST_LAMBDA {
    const Vec<T> x = load_some<!whole>(z + i, count, -kInfinity<T>);
    meanwhile(i);
    if constexpr (!kKnown) largest = larger(largest, x);
    Vec<T> e = exp_quotient(x - Vec<T>(reference), one);
    if constexpr (!whole) {
      const auto counted = first_lanes<T>(count) & ~(lane_numbers<IntOf<T>>() == Vec<IntOf<T>>(IntOf<T>(label - i)));
      e = select(counted, e, Vec<T>(T(0)));
    }
    store(exp + i, e);
    rest.add(e);
  };
  const auto sweep = [&](std::int64_t begin, std::int64_t end) BAN_FAST_LAMBDA {
    for_vectors<T>(
        begin, end,
        [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA { body(i, classes - i, std::bool_constant<!tail>{}); },
        [&]() BAN_FAST_LAMBDA { rest.end_block(); });
  };
  const std::int64_t before = label / lanes * lanes;
  const std::int64_t after = before + lanes < classes ? before + lanes : classes;
  sweep(0, before);
  body(before, after - before, std::false_type{});
  sweep(after, classes);
  const double others = rest.value();
  exp[label] = T(-others);
  return {others, kKnown ? reference : largest_lane(largest)};
}

// exp(z - m) of a row into `exp`, but minus the sum of the others at the label: times 1 / total it is d CE / dz.
struct LabelRow {
  double loss, total;
};

// How far beyond its reference a row may reach. Differences of up to 8 are rounded by 2.4e-7 at most in fp32.
template <class T>
inline constexpr T kFar = T(8);

// m is the largest of the row's beginning: the row is then read once. Where a later one is far larger, m is that.
// meanwhile(i) is called for each vector, or twice: other traffic with memory, which the arithmetic hides.
template <class T, class Meanwhile>
BAN_FAST_HD LabelRow label_row(const T* z, std::int64_t classes, std::int64_t label, const Meanwhile& meanwhile,
                               T* exp) {
  constexpr std::int64_t kBeginning = kBlockVectors * Vec<T>::lanes;
  constexpr UnitTemperature<T> one;
  const bool is_short = classes <= kBeginning;
  const T first = row_maximum(z, is_short ? classes : kBeginning);
  LabelSums<T> sums = is_short ? label_sums<true>(z, classes, label, first, meanwhile, exp)
                               : label_sums<false>(z, classes, label, first, meanwhile, exp);
  double scale = 1.0;  // to exp(z - largest)
  if (!(sums.largest - first <= kFar<T>)) {
    sums = label_sums<true>(z, classes, label, sums.largest, meanwhile, exp);
  } else if (first < sums.largest) {
    scale = double(exp_quotient(first - sums.largest, one));
  }
  const T gap = sums.largest - z[label];
  const double others = sums.others * scale, exp_label = double(exp_quotient(-gap, one));
  return {label_loss(others, exp_label, double(gap)), (others + exp_label) / scale};
}

// ---- Writing a gradient ----------------------------------------------------------------------------------------

template <bool kTail, class T, class To>
BAN_FAST_HD void put(To* to, Vec<T> x, std::int64_t left, bool streamed) {
  if (!kTail && streamed) {
    stream_whole(to, x);
  } else {
    write_some<kTail>(to, x, left);
  }
}

// How many elements of a row come before the first at which a vector may be streamed.
template <class T, class To>
BAN_FAST_HD std::int64_t unaligned_head(const To* row) {
  constexpr std::uintptr_t kLine = Vec<T>::lanes * sizeof(To);
  return std::int64_t((kLine - reinterpret_cast<std::uintptr_t>(row) % kLine) % kLine / sizeof(To));
}

// row[i] = value(i) for a gradient's row; value gives the vector from any i on, of which all lanes are computed and the
// row's are written.
template <class T, class To, class Value>
BAN_FAST_HD void write_row(To* row, std::int64_t classes, bool streamed, Value value) {
  std::int64_t head = streamed ? unaligned_head<T>(row) : 0;
  head = head < classes ? head : classes;
  if (head > 0) write_some<true>(row, value(0), head);
  for_vectors<T>(
      head, classes,
      [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA { put<tail>(row + i, value(i), classes - i, streamed); },
      []() BAN_FAST_LAMBDA {});
}

BAN_FAST_HD void clear_row(const Gradient& gradient, std::int64_t row, std::int64_t classes) {
  const std::int64_t bytes = classes * element_size(gradient.dtype);
  if (gradient.data != nullptr) std::memset(static_cast<char*>(gradient.data) + row * bytes, 0, std::size_t(bytes));
}

struct NoGradient {};

// Calls use(pointer to the gradient's row in its own type), one of those that go with T, or NoGradient's null.
template <class T, class Use>
BAN_FAST_HD void with_gradient_row(const Gradient& gradient, std::int64_t row, std::int64_t classes, Use use) {
  const std::int64_t offset = row * classes;
  if (gradient.data == nullptr) {
    use(static_cast<NoGradient*>(nullptr));
  } else if constexpr (std::is_same_v<T, double>) {
    use(static_cast<double*>(gradient.data) + offset);
  } else if (gradient.dtype == DType::f32) {
    use(static_cast<float*>(gradient.data) + offset);
  } else if (gradient.dtype == DType::f16) {
    use(static_cast<Half*>(gradient.data) + offset);
  } else {
    use(static_cast<BFloat16*>(gradient.data) + offset);
  }
}

}  // namespace ban_fast::BAN_FAST_ISA
