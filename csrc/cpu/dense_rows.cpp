// A dense block's passes over memory, each a single one. Rows are taken some at a time, so that vectors over channels
// are read, and sums over rows written, once for all of them.
#include "dense_rows.h"

#include "sweeps.h"

namespace ban_fast::BAN_FAST_ISA {
namespace {

template <class E>
BAN_FAST_HD const E* row_of(const dense::Read& pixels, std::int64_t row) {
  return static_cast<const E*>(pixels.data) + row * pixels.pitch;
}
template <class E>
BAN_FAST_HD E* row_of(const dense::Written& pixels, std::int64_t row) {
  return static_cast<E*>(pixels.data) + row * pixels.pitch;
}

inline constexpr int kAtOnce = 4;
// On Zen 5 (fp32, 4096 rows of 216 channels out of buffers of 312) 1, 2 and 4 rows at once took 298, 352 and 918 us: it
// reads four things, and so many long streams are not prefetched. In bf16 they took 178, 164 and 143 us.
template <class E>
inline constexpr int kDepositAtOnce = sizeof(E) == 2 ? 4 : 1;

// Calls body(row, count, i, tail) for every vector of channels, from i on, of `count` rows from `row` on. Constants are
// tail, and count: kRows or 1.
template <class T, int kRows, class Body>
BAN_FAST_HD void for_tiles(std::int64_t begin, std::int64_t end, std::int64_t channels, Body body) {
  constexpr std::integral_constant<int, kRows> several;
  constexpr std::integral_constant<int, 1> one;
  std::int64_t row = begin;
  for (; row + several <= end; row += several) {
    for_vectors<T>(
        0, channels, [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA { body(row, several, i, tail); },
        []() BAN_FAST_LAMBDA {});
  }
  for (; row < end; ++row) {
    for_vectors<T>(
        0, channels, [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA { body(row, one, i, tail); },
        []() BAN_FAST_LAMBDA {});
  }
}

// `rows` vectors over channels, 0.
template <class T>
class Sums {
 public:
  Sums(std::int64_t channels, int rows) : rows_(channels, rows) {
    for (int row = 0; row < rows; ++row) {
      for (std::int64_t i = 0; i < channels; i += Vec<T>::lanes) store(rows_.row(row) + i, Vec<T>(T(0)));
    }
  }

  T* operator[](int row) const { return rows_.row(row); }
  BAN_FAST_LAMBDA void add(int row, std::int64_t i, Vec<T> x) const {
    T* sum = (*this)[row] + i;
    store(sum, load(sum) + x);
  }

 private:
  ScratchRows<T> rows_;
};

template <class T, class E>
void activate_as(const dense::Activate& job, std::int64_t begin, std::int64_t end) {
  const std::int64_t channels = job.size.channels;
  const T *scales = static_cast<const T*>(job.scale), *shifts = static_cast<const T*>(job.shift);
  for_tiles<T, kAtOnce>(begin, end, channels, [&](auto row, auto count, auto i, auto tail) BAN_FAST_LAMBDA {
    const std::int64_t left = channels - i;
    const Vec<T> scale = load_some<tail>(scales + i, left, T(0)), shift = load_some<tail>(shifts + i, left, T(0));
    for (int r = 0; r < count; ++r) {
      const Vec<T> z = madd(read_some<tail>(row_of<E>(job.x, row + r) + i, left), scale, shift);
      write_some<tail>(row_of<E>(job.out, row + r) + i, larger(z, Vec<T>(T(0))), left);
    }
  });
}

// Distances are from the mean of the first sixteenth of the rows. Being a sixteenth, it is at most sqrt(15) standard
// deviations from the mean of all, so that taking its square off again costs four bits at most.
template <class T, class E>
void moments_as(const dense::Moments& job, std::int64_t begin, std::int64_t end, double* part) {
  const std::int64_t channels = job.size.channels, rows = end - begin, first = (rows + 15) / 16;
  const Sums<T> sums(channels, 3);
  const auto pixels = [&](std::int64_t row, std::int64_t i, auto tail) BAN_FAST_LAMBDA {
    return read_some<tail>(row_of<E>(job.x, row) + i, channels - i);
  };
  for_tiles<T, kAtOnce>(begin, begin + first, channels, [&](auto row, auto count, auto i, auto tail) BAN_FAST_LAMBDA {
    Vec<T> sum = pixels(row, i, tail);
    for (int r = 1; r < count; ++r) sum = sum + pixels(row + r, i, tail);
    sums.add(0, i, sum);
  });
  T* origin = sums[0];
  for (std::int64_t i = 0; i < channels; ++i) origin[i] /= T(first);
  for_tiles<T, kAtOnce>(begin, end, channels, [&](auto row, auto count, auto i, auto tail) BAN_FAST_LAMBDA {
    Vec<T> sum(T(0)), squares(T(0));
    for (int r = 0; r < count; ++r) {
      const Vec<T> distance = pixels(row + r, i, tail) - load(origin + i);
      sum = sum + distance;
      squares = madd(distance, distance, squares);
    }
    sums.add(1, i, sum);
    sums.add(2, i, squares);
  });
  for (std::int64_t i = 0; i < channels; ++i) {
    const double off = double(sums[1][i]) / double(rows);
    part[i] = double(origin[i]) + off;
    part[channels + i] = larger(double(sums[2][i]) - off * double(sums[1][i]), 0.0);
  }
}

template <class T, class E, bool kAdd>
void deposit_as(const dense::Deposit& job, std::int64_t begin, std::int64_t end, double* part) {
  const std::int64_t channels = job.size.channels;
  const T *scales = static_cast<const T*>(job.scale), *means = static_cast<const T*>(job.mean);
  const Sums<T> sums(channels, 2);
  for_tiles<T, kDepositAtOnce<E>>(begin, end, channels, [&](auto row, auto count, auto i, auto tail) BAN_FAST_LAMBDA {
    const std::int64_t left = channels - i;
    const Vec<T> scale = load_some<tail>(scales + i, left, T(0)), mean = load_some<tail>(means + i, left, T(0));
    const Vec<T> zero(T(0));
    Vec<T> dz_sum = zero, distance_sum = zero;
    for (int r = 0; r < count; ++r) {
      const auto stopped = zero >= read_some<tail>(row_of<E>(job.activation, row + r) + i, left);
      const Vec<T> dz = select(stopped, zero, read_some<tail>(row_of<E>(job.grad, row + r) + i, left));
      dz_sum = dz_sum + dz;
      distance_sum = madd(dz, read_some<tail>(row_of<E>(job.x, row + r) + i, left) - mean, distance_sum);
      T* into = row_of<T>(job.into, row + r) + i;
      if constexpr (kAdd) {
        write_some<tail>(into, madd(dz, scale, read_some<tail>(into, left)), left);
      } else {
        write_some<tail>(into, dz * scale, left);
      }
    }
    sums.add(0, i, dz_sum);
    sums.add(1, i, distance_sum);
  });
  for (std::int64_t i = 0; i < channels; ++i) {
    part[i] = double(sums[0][i]);
    part[channels + i] = double(sums[1][i]);
  }
}

template <class T, class E>
void correct_as(const dense::Correct& job, std::int64_t begin, std::int64_t end) {
  const std::int64_t channels = job.size.channels;
  const T *means = static_cast<const T*>(job.mean), *ps = static_cast<const T*>(job.p);
  const T* qs = static_cast<const T*>(job.q);
  for_tiles<T, kAtOnce>(begin, end, channels, [&](auto row, auto count, auto i, auto tail) BAN_FAST_LAMBDA {
    const std::int64_t left = channels - i;
    const Vec<T> mean = load_some<tail>(means + i, left, T(0)), p = load_some<tail>(ps + i, left, T(0));
    const Vec<T> q = load_some<tail>(qs + i, left, T(0));
    for (int r = 0; r < count; ++r) {
      const Vec<T> distance = mean - read_some<tail>(row_of<E>(job.x, row + r) + i, left);
      const Vec<T> grad = read_some<tail>(row_of<T>(job.grad, row + r) + i, left);
      write_some<tail>(row_of<E>(job.out, row + r) + i, madd(distance, q, grad) - p, left);
    }
  });
}

// Calls body with a value of the features' element type, and one of acc.
template <class Body>
void of_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::f64: return body(double{}, double{});
    case DType::f32: return body(float{}, float{});
    case DType::f16: return body(float{}, Half{});
    case DType::bf16: return body(float{}, BFloat16{});
  }
}

}  // namespace

void dense_activate_rows(const dense::Activate& job, std::int64_t begin, std::int64_t end) {
  of_type(job.size.dtype,
          [&](auto acc, auto element) { activate_as<decltype(acc), decltype(element)>(job, begin, end); });
}

void dense_moments_rows(const dense::Moments& job, std::int64_t begin, std::int64_t end, double* part) {
  of_type(job.size.dtype,
          [&](auto acc, auto element) { moments_as<decltype(acc), decltype(element)>(job, begin, end, part); });
}

void dense_deposit_rows(const dense::Deposit& job, std::int64_t begin, std::int64_t end, double* part) {
  of_type(job.size.dtype, [&](auto acc, auto element) {
    using T = decltype(acc);
    using E = decltype(element);
    job.add ? deposit_as<T, E, true>(job, begin, end, part) : deposit_as<T, E, false>(job, begin, end, part);
  });
}

void dense_correct_rows(const dense::Correct& job, std::int64_t begin, std::int64_t end) {
  of_type(job.size.dtype,
          [&](auto acc, auto element) { correct_as<decltype(acc), decltype(element)>(job, begin, end); });
}

}  // namespace ban_fast::BAN_FAST_ISA
