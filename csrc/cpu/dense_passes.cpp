// A dense block's passes over their rows: threads, and sums in the order of rows.
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/rows.h"
#include "cpu/threads.h"
#include "dense.h"

namespace ban_fast::dense {
namespace {

// Elements that a thread takes at a time: fewer, and waking a thread costs more than it saves.
constexpr std::int64_t kPiece = 1 << 15;
// Most rows that are summed in fp32 before fp64 takes over: at 512 sums were seven times as far off as torch's.
constexpr std::int64_t kMostRows = 64;

std::int64_t rows_at_least(const Size& size) {
  return std::max<std::int64_t>(1, kPiece / std::max<std::int64_t>(1, size.channels));
}

template <class Job>
void run(void (*kernel)(const Job&, std::int64_t, std::int64_t), const Job& job, int threads) {
  struct Context {
    void (*kernel)(const Job&, std::int64_t, std::int64_t);
    const Job& job;
  } context{kernel, job};
  parallel_for(
      job.size.rows, rows_at_least(job.size), threads,
      [](void* opaque, std::int64_t begin, std::int64_t end) {
        const Context& self = *static_cast<Context*>(opaque);
        self.kernel(self.job, begin, end);
      },
      &context);
}

// What a kernel makes of fixed pieces of the rows, whichever thread takes which.
class Parts {
 public:
  template <class Job>
  Parts(void (*kernel)(const Job&, std::int64_t, std::int64_t, double*), const Job& job, int threads)
      : size_(job.size),
        rows_(std::min(kMostRows, rows_at_least(job.size))),
        count_((size_.rows + rows_ - 1) / rows_),
        values_(std::size_t(count_ * 2 * size_.channels)) {
    struct Context {
      void (*kernel)(const Job&, std::int64_t, std::int64_t, double*);
      const Job& job;
      Parts& parts;
    } context{kernel, job, *this};
    parallel_for(
        count_, std::max<std::int64_t>(1, rows_at_least(size_) / rows_), threads,
        [](void* opaque, std::int64_t begin, std::int64_t end) {
          const Context& self = *static_cast<Context*>(opaque);
          for (std::int64_t part = begin; part < end; ++part) {
            const std::int64_t first = self.parts.first_row(part);
            self.kernel(self.job, first, first + self.parts.rows(part), self.parts.values(part));
          }
        },
        &context);
  }

  std::int64_t count() const { return count_; }
  std::int64_t first_row(std::int64_t part) const { return part * rows_; }
  std::int64_t rows(std::int64_t part) const { return std::min(rows_, size_.rows - first_row(part)); }
  double* values(std::int64_t part) { return values_.data() + part * 2 * size_.channels; }

 private:
  Size size_;
  std::int64_t rows_, count_;
  std::vector<double> values_;
};

// to = values, or += them, in acc.
void deliver(const Size& size, const double* values, void* to, bool add) {
  const auto each = [&](auto* acc) {
    using T = std::remove_pointer_t<decltype(acc)>;
    for (std::int64_t i = 0; i < size.channels; ++i) acc[i] = T(add ? double(acc[i]) + values[i] : values[i]);
  };
  is_double(size.dtype) ? each(static_cast<double*>(to)) : each(static_cast<float*>(to));
}

}  // namespace

void activate(const Activate& job, int threads) { run(row_kernels().dense.activate, job, threads); }

void correct(const Correct& job, int threads) { run(row_kernels().dense.correct, job, threads); }

// Chan, Golub and LeVeque: distances between the parts' means are squared, never the means themselves.
void moments(const Moments& job, int threads) {
  const std::int64_t channels = job.size.channels;
  std::vector<double> merged(std::size_t(2 * channels));
  double *mean = merged.data(), *distances = mean + channels;
  if (job.size.rows == 0) std::fill(mean, distances, std::numeric_limits<double>::quiet_NaN());
  Parts parts(row_kernels().dense.moments, job, threads);
  for (std::int64_t part = 0; part < parts.count(); ++part) {
    const double before = double(parts.first_row(part)), rows = double(parts.rows(part));
    const double share = rows / (before + rows);
    const double* values = parts.values(part);
    for (std::int64_t i = 0; i < channels; ++i) {
      const double step = values[i] - mean[i];
      mean[i] += step * share;
      distances[i] += values[channels + i] + step * step * before * share;
    }
  }
  deliver(job.size, mean, job.mean, false);
  deliver(job.size, distances, job.distances, false);
}

void deposit(const Deposit& job, int threads) {
  const std::int64_t channels = job.size.channels;
  std::vector<double> sums(std::size_t(2 * channels));
  Parts parts(row_kernels().dense.deposit, job, threads);
  for (std::int64_t part = 0; part < parts.count(); ++part) {
    const double* values = parts.values(part);
    for (std::int64_t i = 0; i < 2 * channels; ++i) sums[std::size_t(i)] += values[i];
  }
  deliver(job.size, sums.data(), job.dz_sum, true);
  deliver(job.size, sums.data() + channels, job.distance_sum, true);
}

}  // namespace ban_fast::dense
