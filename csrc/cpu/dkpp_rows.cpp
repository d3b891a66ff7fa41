// DKPP's targets and its permutation on their own; its loss is KD's (kd_rows.cpp).
#include "dkpp.h"

namespace ban_fast::BAN_FAST_ISA {
namespace {

template <class T>
void target_rows_as(const TargetsJob& job, std::int64_t begin, std::int64_t end) {
  const std::int64_t classes = job.selection.classes;
  const ScratchRows<T> scratch(classes, 1 + TargetRows<T>::scratch_rows(classes),
                               TargetRows<T>::scratch_words(classes));
  const Temperature<T> temperature(job.temperature);
  TargetRows<T> targets(job.teacher, job.selection, job.key, scratch.after(1));
  targets.visit(
      begin, end,
      [&](std::int64_t row, const T* target) {
        T* exp = scratch.row(0);
        const Vec<T> largest(row_maximum(target, classes));
        LaneSum<T> sum;
        for_vectors<T>(
            0, classes,
            [&](std::int64_t i, auto tail) BAN_FAST_LAMBDA {
              const Vec<T> x = load_some<tail>(target + i, classes - i, -kInfinity<T>);
              const Vec<T> e = exp_quotient(x - largest, temperature);
              sum.add(e);
              store(exp + i, e);
            },
            [&]() BAN_FAST_LAMBDA { sum.end_block(); });
        const Vec<T> scale(T(1 / sum.value()));
        write_row<T>(static_cast<T*>(job.targets) + row * classes, classes, false,
                     [&](std::int64_t i) BAN_FAST_LAMBDA { return load(exp + i) * scale; });
      },
      [] {});
}

}  // namespace

void target_rows(const TargetsJob& job, std::int64_t begin, std::int64_t end) {
  if (is_double(job.teacher.dtype)) {
    target_rows_as<double>(job, begin, end);
  } else {
    target_rows_as<float>(job, begin, end);
  }
}

void permutation_rows(const PermutationJob& job, std::int64_t begin, std::int64_t end) {
  const std::int64_t classes = job.classes;
  RowPermuter permuter(job.key, classes);
  const ScratchRows<float> scratch(0, 0, RowPermuter::pitch(classes));
  if (permuter.is_identity()) {
    for (std::int64_t k = begin * classes; k < end * classes; ++k) job.sources[k] = k % classes;
    return;
  }
  for (std::int64_t base = begin; base < end; base += RowPermuter::kRows) {
    const int count = int(end - base < RowPermuter::kRows ? end - base : RowPermuter::kRows);
    permuter.load_keys(base, count);
    for (int k = 0; k < count; ++k) {
      permuter.ranks(k, 1, scratch.words(), 0);
      const std::int64_t kept = job.argmax[base + k];
      std::int64_t* const to = job.sources + (base + k) * classes;
      for_sources(scratch.words(), classes, kept, [&](std::int64_t at, Words sources) {
        std::uint32_t from[Words::lanes];
        store(from, sources);
        const std::int64_t written = classes - at < Words::lanes ? classes - at : std::int64_t(Words::lanes);
        for (std::int64_t i = 0; i < written; ++i) to[at + i] = from[i];
      });
      to[kept] = kept;
    }
  }
}

}  // namespace ban_fast::BAN_FAST_ISA
