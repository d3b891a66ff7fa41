// 1x1 convolutions of normalised rows: batch norm and ReLU are made of a few rows at a time in the cache, on the way
// into the product, and again in backward. Nothing normalised is ever stored.
#include "pointwise.h"

#include "dense_rows.h"
#include "sweeps.h"

namespace ban_fast::BAN_FAST_ISA {
namespace {

using pointwise::kPanelVectors;
using pointwise::Panels;
using pointwise::vectors_of;

// How many rows are activated together, and added up from 0: the sums over channels go on from there in fp64
// (dense_passes.cpp's kMostRows), the weight's gradient within its piece of the rows in T.
inline constexpr std::int64_t kBlock = 64;
// A tile of a product is what the registers hold: 24 of 32 with AVX-512, 12 of 16 with AVX2, 8 of 16 elsewhere.
inline constexpr int kTileRows = kParts == 1 ? 8 : kParts == 2 ? 6 : 2;
inline constexpr int kTileVectors = kParts == 1 ? int(kPanelVectors) : 1;

// Pixels as rows of T.
template <class T>
BAN_FAST_HD T* row_of(const dense::Written& pixels, std::int64_t row) {
  return static_cast<T*>(pixels.data) + row * pixels.pitch;
}
template <class T>
BAN_FAST_HD const T* row_of(const dense::Read& pixels, std::int64_t row) {
  return static_cast<const T*>(pixels.data) + row * pixels.pitch;
}

// Rows of T in this thread's scratch, an odd number of vectors apart, so that those of a tile fall on different sets of
// the cache. The last tile of rows may read up to kTileRows beyond kBlock, that of a weight's gradient, whose rows are
// columns here, as many elements beyond a row.
template <class T>
class Block {
 public:
  static std::int64_t pitch_of(std::int64_t columns) {
    return (vectors_of(columns, Vec<T>::lanes) | 1) * Vec<T>::lanes;
  }
  static std::int64_t elements(std::int64_t columns) { return (kBlock + kTileRows + 1) * pitch_of(columns); }

  Block(T* memory, std::int64_t columns) : memory_(memory), pitch_(pitch_of(columns)) {}

  T* row(std::int64_t i) const { return memory_ + i * pitch_; }
  std::int64_t pitch() const { return pitch_; }

 private:
  T* memory_;
  std::int64_t pitch_;
};

inline constexpr std::integral_constant<std::int64_t, 1> kNext;

// The tile [kRows, kVectors] of left right: left's element (r, k) is at left[r * row + k * step], right's row k at
// right + k * pitch. Every sum is one fma after the other, in the order of k.
template <int kRows, int kVectors, class T, class Row, class Step>
BAN_FAST_HD void multiply(const T* left, Row row, Step step, const T* right, std::int64_t pitch, std::int64_t steps,
                          Vec<T> (&sum)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec<T>(T(0));
  }
  for (std::int64_t k = 0; k < steps; ++k) {
    Vec<T> b[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) b[v] = load(right + k * pitch + v * Vec<T>::lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> a(left[r * row + k * step]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) sum[r][v] = madd(a, b[v], sum[r][v]);
    }
  }
}

// Calls body(v, count) for the vectors [v, v + count) of `vectors`, never of two panels; count is a constant.
template <class Body>
BAN_FAST_HD void for_tiles(std::int64_t vectors, Body body) {
  for (std::int64_t v = 0; v < vectors; v += kTileVectors) {
    if constexpr (kTileVectors == 1) {
      body(v, std::integral_constant<int, 1>{});
    } else if (vectors - v >= 3) {
      body(v, std::integral_constant<int, 3>{});
    } else if (vectors - v == 2) {
      body(v, std::integral_constant<int, 2>{});
    } else {
      body(v, std::integral_constant<int, 1>{});
    }
  }
}

// Of a vector of columns that begins at i: read, or written, as far as the row goes.
template <class T>
BAN_FAST_HD Vec<T> load_columns(const T* row, std::int64_t i, std::int64_t columns) {
  return columns - i >= Vec<T>::lanes ? load(row + i) : load_first(row + i, int(columns - i), T(0));
}
template <class T>
BAN_FAST_HD void store_columns(T* row, std::int64_t i, std::int64_t columns, Vec<T> x) {
  if (columns - i >= Vec<T>::lanes) {
    store(row + i, x);
  } else {
    store_first(row + i, x, int(columns - i));
  }
}

// relu(x * scale + shift) of the rows [first, first + rows); 0 beyond the columns.
template <class T>
BAN_FAST_HD void activate_block(const dense::Read& x, const T* scales, const T* shifts, std::int64_t first,
                                std::int64_t rows, std::int64_t channels, const Block<T>& to) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const T* from = row_of<T>(x, first + r);
    for_vectors<T>(
        0, channels,
        [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA {
          const std::int64_t left = channels - i;
          const Vec<T> scale = load_some<tail>(scales + i, left, T(0)), shift = load_some<tail>(shifts + i, left, T(0));
          store(to.row(r) + i, larger(madd(load_some<tail>(from + i, left, T(0)), scale, shift), Vec<T>(T(0))));
        },
        []() BAN_FAST_LAMBDA {});
  }
}

template <class T>
void pointwise_as(const dense::Pointwise& job, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t lanes = Vec<T>::lanes;
  const std::int64_t channels = job.size.channels, outputs = job.outputs;
  const Panels<T> weight{static_cast<const T*>(job.weight), channels, vectors_of(outputs, lanes)};
  const std::size_t elements = std::size_t(Block<T>::elements(channels));
  const Block<T> activation(static_cast<T*>(thread_scratch(elements * sizeof(T))), channels);
  const T *scale = static_cast<const T*>(job.scale), *shift = static_cast<const T*>(job.shift);
  for (std::int64_t first = begin; first < end; first += kBlock) {
    const std::int64_t rows = end - first < kBlock ? end - first : kBlock;
    activate_block(job.x, scale, shift, first, rows, channels, activation);
    for_tiles(weight.vectors, [&](std::int64_t v, auto count) BAN_FAST_LAMBDA {
      for (std::int64_t r = 0; r < rows; r += kTileRows) {
        if (v == 0) {  // the next block's rows are on their way from memory during the product
          for (std::int64_t row = first + kBlock + r; row < first + kBlock + r + kTileRows && row < end; ++row) {
            for (std::int64_t i = 0; i < channels; i += lanes) prefetch(row_of<T>(job.x, row) + i);
          }
        }
        Vec<T> sum[kTileRows][decltype(count)::value];
        multiply(activation.row(r), activation.pitch(), kNext, weight.at(v), weight.pitch(v), channels, sum);
        for (int i = 0; i < kTileRows && r + i < rows; ++i) {
          T* to = row_of<T>(job.out, first + r + i);
          for (int u = 0; u < count; ++u) store_columns(to, (v + u) * lanes, outputs, sum[i][u]);
        }
      }
    });
  }
}

// A thread's work on PointwiseBackward, block by block.
template <class T>
class Backward {
 public:
  Backward(const dense::PointwiseBackward& job, double* part, T* weight_part)
      : job_(job),
        channels_(job.size.channels),
        outputs_(job.outputs),
        weight_{static_cast<const T*>(job.weight), outputs_, vectors_of(channels_, kLanes)},
        memory_(static_cast<T*>(thread_scratch(std::size_t(elements()) * sizeof(T)))),
        activation_(memory_, channels_),
        grad_(memory_ + Block<T>::elements(channels_), outputs_),
        sums_(grad_.row(0) + Block<T>::elements(outputs_)),
        part_(part),
        weight_part_(weight_part) {}

  void block(std::int64_t first, std::int64_t rows) const {
    activate_block(job_.x, vector(job_.scale), vector(job_.shift), first, rows, channels_, activation_);
    for (std::int64_t r = 0; r < rows; ++r) {
      const T* from = row_of<T>(job_.grad, first + r);
      for (std::int64_t i = 0; i < outputs_; i += kLanes) store(grad_.row(r) + i, load_columns(from, i, outputs_));
    }
    if (weight_part_ != nullptr) weight_gradient(rows);
    for_tiles(weight_.vectors, [&](std::int64_t v, auto count) BAN_FAST_LAMBDA { deposit(first, rows, v, count); });
    for (std::int64_t i = 0; i < channels_; ++i) {
      part_[i] += double(sums_[i]);
      part_[channels_ + i] += double(sums_[padded() + i]);
    }
  }

 private:
  static constexpr std::int64_t kLanes = Vec<T>::lanes;

  static const T* vector(const void* data) { return static_cast<const T*>(data); }
  std::int64_t padded() const { return vectors_of(channels_, kLanes) * kLanes; }
  std::int64_t elements() const {
    return Block<T>::elements(channels_) + Block<T>::elements(outputs_) + 2 * padded();
  }

  void weight_gradient(std::int64_t rows) const {
    const std::int64_t vectors = vectors_of(outputs_, kLanes), pitch = vectors_of(outputs_, 16) * 16;
    for_tiles(vectors, [&](std::int64_t v, auto count) BAN_FAST_LAMBDA {
      for (std::int64_t c = 0; c < channels_; c += kTileRows) {
        Vec<T> sum[kTileRows][decltype(count)::value];
        multiply(activation_.row(0) + c, kNext, activation_.pitch(), grad_.row(0) + v * kLanes, grad_.pitch(), rows,
                 sum);
        for (int i = 0; i < kTileRows && c + i < channels_; ++i) {
          T* to = weight_part_ + (c + i) * pitch + v * kLanes;
          for (int u = 0; u < count; ++u) store(to + u * kLanes, load(to + u * kLanes) + sum[i][u]);
        }
      }
    });
  }

  // Of the vectors [v, v + count) of channels.
  template <class Count>
  BAN_FAST_LAMBDA void deposit(std::int64_t first, std::int64_t rows, std::int64_t v, Count count) const {
    const Vec<T> zero(T(0));
    constexpr int kCount = Count::value;
    Vec<T> scale[kCount], mean[kCount], dz_sum[kCount], distance_sum[kCount];
    for (int u = 0; u < count; ++u) {
      scale[u] = load_columns(vector(job_.scale), (v + u) * kLanes, channels_);
      mean[u] = load_columns(vector(job_.mean), (v + u) * kLanes, channels_);
      dz_sum[u] = distance_sum[u] = zero;
    }
    for (std::int64_t r = 0; r < rows; r += kTileRows) {
      // On their way from memory during the product: what it is added to, and the next block's rows.
      for (int i = 0; i < kTileRows && r + i < rows; ++i) {
        for (int u = 0; u < kCount; ++u) {
          const std::int64_t c = (v + u) * kLanes, row = first + r + i;
          prefetch(row_of<T>(job_.into, row) + c);
          if (row + kBlock < job_.size.rows) prefetch(row_of<T>(job_.x, row + kBlock) + c);
        }
      }
      Vec<T> sum[kTileRows][kCount];
      multiply(grad_.row(r), grad_.pitch(), kNext, weight_.at(v), weight_.pitch(v), outputs_, sum);
      for (int i = 0; i < kTileRows && r + i < rows; ++i) {
        const T* x = row_of<T>(job_.x, first + r + i);
        T* into = row_of<T>(job_.into, first + r + i);
        for (int u = 0; u < count; ++u) {
          const std::int64_t c = (v + u) * kLanes;
          const Vec<T> dz = select(zero >= load(activation_.row(r + i) + c), zero, sum[i][u]);
          dz_sum[u] = dz_sum[u] + dz;
          distance_sum[u] = madd(dz, load_columns(x, c, channels_) - mean[u], distance_sum[u]);
          const Vec<T> before = job_.add ? load_columns(into, c, channels_) : zero;
          store_columns(into, c, channels_, job_.add ? madd(dz, scale[u], before) : dz * scale[u]);
        }
      }
    }
    for (int u = 0; u < count; ++u) {
      store(sums_ + (v + u) * kLanes, dz_sum[u]);
      store(sums_ + padded() + (v + u) * kLanes, distance_sum[u]);
    }
  }

  const dense::PointwiseBackward& job_;
  const std::int64_t channels_, outputs_;
  const Panels<T> weight_;
  T* const memory_;
  const Block<T> activation_, grad_;
  T* const sums_;
  double* const part_;
  T* const weight_part_;
};

template <class T>
void pointwise_backward_as(const dense::PointwiseBackward& job, std::int64_t begin, std::int64_t end, double* part,
                           void* weight_part) {
  const Backward<T> work(job, part, static_cast<T*>(weight_part));
  for (std::int64_t first = begin; first < end; first += kBlock) {
    work.block(first, end - first < kBlock ? end - first : kBlock);
  }
}

}  // namespace

void pointwise_rows(const dense::Pointwise& job, std::int64_t begin, std::int64_t end) {
  is_double(job.size.dtype) ? pointwise_as<double>(job, begin, end) : pointwise_as<float>(job, begin, end);
}

void pointwise_backward_rows(const dense::PointwiseBackward& job, std::int64_t begin, std::int64_t end, double* part,
                             void* weight_part) {
  is_double(job.size.dtype) ? pointwise_backward_as<double>(job, begin, end, part, weight_part)
                            : pointwise_backward_as<float>(job, begin, end, part, weight_part);
}

}  // namespace ban_fast::BAN_FAST_ISA
