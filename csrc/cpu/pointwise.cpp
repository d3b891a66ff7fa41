// 1x1 convolutions of normalised rows: the weight in panels, threads, and what pieces of the rows add up to.
#include "cpu/pointwise.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/rows.h"
#include "cpu/threads.h"
#include "dense.h"

namespace ban_fast::dense {
namespace {

using pointwise::kLanes;
using pointwise::kPanelVectors;
using pointwise::vectors_of;

// Rows that a thread takes at a time: enough to read the weight for.
constexpr std::int64_t kRows = 256;
// Of weight gradients, one for each piece of the rows.
constexpr std::int64_t kMostBytes = 64 << 20;
constexpr std::int64_t kMostPieces = 64;
// Of the pieces' values, by a thread.
constexpr std::int64_t kAddedAtOnce = 1 << 13;

std::int64_t round_up(std::int64_t count, std::int64_t to) { return vectors_of(count, to) * to; }

// `matrix` [steps, columns], its element (k, n) at k * step + n * column, as pointwise::Panels says.
template <class T>
std::vector<T> panels(const T* matrix, std::int64_t steps, std::int64_t columns, std::int64_t step,
                      std::int64_t column) {
  const std::int64_t width = kPanelVectors * kLanes<T>, padded = round_up(columns, kLanes<T>);
  std::vector<T> packed(std::size_t(steps * padded));
  T* to = packed.data();
  for (std::int64_t first = 0; first < columns; first += width) {
    const std::int64_t pitch = std::min(width, padded - first), count = std::min(width, columns - first);
    for (std::int64_t k = 0; k < steps; ++k, to += pitch) {
      const T* from = matrix + k * step + first * column;
      for (std::int64_t n = 0; n < count; ++n) to[n] = from[n * column];
    }
  }
  return packed;
}

template <class T>
void pointwise_as(Pointwise job, int threads) {
  const std::int64_t channels = job.size.channels;
  const std::vector<T> weight = panels(static_cast<const T*>(job.weight), channels, job.outputs, 1, channels);
  job.weight = weight.data();
  parallel_for(
      job.size.rows, kRows, threads,
      [](void* opaque, std::int64_t begin, std::int64_t end) {
        row_kernels().dense.pointwise(*static_cast<const Pointwise*>(opaque), begin, end);
      },
      &job);
}

// The rows in pieces, whichever thread takes which: each with its share of the sums and of the weight's gradient.
template <class T>
class Pieces {
 public:
  Pieces(const PointwiseBackward& job, int threads)
      : job_(job),
        threads_(threads),
        channels_(job.size.channels),
        pitch_(round_up(job.outputs, 16)),
        rows_(rows_of_a_piece()),
        count_(vectors_of(job.size.rows, rows_)),
        sums_(new double[std::size_t(count_ * 2 * channels_)]),
        weights_(job.weight_grad == nullptr ? nullptr : new T[std::size_t(count_ * weight_elements())]) {
    parallel_for(
        count_, 1, threads,
        [](void* opaque, std::int64_t begin, std::int64_t end) {
          Pieces& self = *static_cast<Pieces*>(opaque);
          for (std::int64_t piece = begin; piece < end; ++piece) self.run(piece);
        },
        this);
  }

  void deliver() const {
    add_up(sums_.get(), 2 * channels_, [&](std::int64_t i, double value) {
      T* to = static_cast<T*>(i < channels_ ? job_.dz_sum : job_.distance_sum) + i % channels_;
      *to = T(double(*to) + value);
    });
    if (weights_ == nullptr) return;
    add_up(weights_.get(), weight_elements(), [&](std::int64_t i, double value) {
      const std::int64_t c = i / pitch_, n = i % pitch_;
      if (n >= job_.outputs) return;
      T* to = static_cast<T*>(job_.weight_grad) + n * channels_ + c;
      *to = T(double(*to) + value);
    });
  }

 private:
  std::int64_t weight_elements() const { return channels_ * pitch_; }

  std::int64_t rows_of_a_piece() const {
    const std::int64_t bytes = std::max<std::int64_t>(1, weight_elements() * std::int64_t(sizeof(T)));
    const std::int64_t most = std::clamp<std::int64_t>(kMostBytes / bytes, 1, kMostPieces);
    return std::max(kRows, round_up(vectors_of(job_.size.rows, most), kRows));
  }

  void run(std::int64_t piece) {
    const std::int64_t begin = piece * rows_, end = std::min(begin + rows_, job_.size.rows);
    double* sums = sums_.get() + piece * 2 * channels_;
    T* weight = weights_ == nullptr ? nullptr : weights_.get() + piece * weight_elements();
    std::fill_n(sums, 2 * channels_, 0.0);
    if (weight != nullptr) std::fill_n(weight, weight_elements(), T(0));
    row_kernels().dense.pointwise_backward(job_, begin, end, sums, weight);
  }

  // use(i, the sum of the pieces' values number i) for all `size` of a piece's values.
  template <class V, class Use>
  void add_up(const V* values, std::int64_t size, Use use) const {
    struct Context {
      const Pieces& self;
      const V* values;
      std::int64_t size;
      Use& use;
    } context{*this, values, size, use};
    parallel_for(
        size, kAddedAtOnce, threads_,
        [](void* opaque, std::int64_t begin, std::int64_t end) {
          const Context& of = *static_cast<Context*>(opaque);
          std::vector<double> total(std::size_t(end - begin), 0.0);
          for (std::int64_t piece = 0; piece < of.self.count_; ++piece) {
            const V* from = of.values + piece * of.size;
            for (std::int64_t i = begin; i < end; ++i) total[std::size_t(i - begin)] += double(from[i]);
          }
          for (std::int64_t i = begin; i < end; ++i) of.use(i, total[std::size_t(i - begin)]);
        },
        &context);
  }

  const PointwiseBackward& job_;
  const int threads_;
  const std::int64_t channels_, pitch_, rows_, count_;
  const std::unique_ptr<double[]> sums_;
  const std::unique_ptr<T[]> weights_;  // zeroed by who works on them: one thread alone would wait for their pages
};

template <class T>
void pointwise_backward_as(PointwiseBackward job, int threads) {
  const std::int64_t channels = job.size.channels;
  const std::vector<T> weight = panels(static_cast<const T*>(job.weight), job.outputs, channels, channels, 1);
  job.weight = weight.data();
  Pieces<T>(job, threads).deliver();
}

}  // namespace

void pointwise(const Pointwise& job, int threads) {
  is_double(job.size.dtype) ? pointwise_as<double>(job, threads) : pointwise_as<float>(job, threads);
}

void pointwise_backward(const PointwiseBackward& job, int threads) {
  is_double(job.size.dtype) ? pointwise_backward_as<double>(job, threads) : pointwise_backward_as<float>(job, threads);
}

}  // namespace ban_fast::dense
