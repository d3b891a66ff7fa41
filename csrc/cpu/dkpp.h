// DKPP's permutation for blocks of rows: 16 rows' keys at once, then 16 classes of a row at once.
#pragma once

#include "sweeps.h"

namespace ban_fast::BAN_FAST_ISA {

class RowPermuter {
 public:
  static constexpr int kRows = Words::lanes;

  RowPermuter(const PermutationKey& key, std::int64_t classes)
      : key_(key), call_(call_key(key.seed, key.step)), classes_(classes), shape_(std::uint32_t(classes - 1)) {}

  // With fewer than two outputs beside the argmax nothing moves.
  bool is_identity() const { return shape_.n < 2; }
  bool is_feistel() const { return shape_.n >= kFeistelFrom; }

  // Takes on the keys of rows [first, first + count), count <= kRows.
  void load_keys(std::int64_t first, int count) {
    std::uint32_t low[kRows] = {}, high[kRows] = {};
    for (int lane = 0; lane < count; ++lane) {
      const std::uint64_t id = key_.id(first + lane);
      low[lane] = std::uint32_t(id);
      high[lane] = std::uint32_t(id >> 32);
    }
    RowKey<Words> key{Words(call_.k0), Words(call_.k1)};
    key = absorb(key, load(low));
    key = absorb(key, load(high));
    if (is_feistel()) {
      for (int i = 0; i < shape_.rounds; ++i) store(keys_[i], round_key(key, std::uint32_t(i)));
      return;
    }
    const Words n(shape_.n);
    for (int i = 0; i < kSwapRounds; ++i) {
      store(offsets_[i], high_product(round_key(key, std::uint32_t(2 * i)), n));
      store(keys_[i], round_key(key, std::uint32_t(2 * i + 1)));
    }
  }

  // Calls emit(lane, i, sources) for the classes i .. i + 15 of the rows of `lanes` lanes from `first` on: what class i + k
  // takes its value from. argmax[lane] is the class that a row keeps. Sources beyond the last class are some class.
  template <class Emit>
  void sources(int first, int lanes, const std::int64_t* argmax, Emit emit) const {
    if (is_feistel()) {
      for (int lane = first; lane < first + lanes; ++lane) feistel_sources(lane, argmax[lane], emit);
    } else {
      swap_sources(first, lanes, argmax, emit);
    }
  }

 private:
  static constexpr int kWays = 4;  // permutations in flight: one alone would wait on itself for most of 24 rounds

  Words rank(std::int64_t i, std::int64_t kept) const {
    const Words at = lane_numbers<std::uint32_t>() + Words(std::uint32_t(i)), r = Words(std::uint32_t(kept));
    const Words x = select(r < at, at - Words(1u), at);
    return lesser(x, Words(shape_.n - 1));
  }

  Words source(Words rank, std::int64_t i, std::int64_t kept) const {
    const Words at = lane_numbers<std::uint32_t>() + Words(std::uint32_t(i)), r = Words(std::uint32_t(kept));
    return select(at == r, r, select(rank < r, rank, rank + Words(1u)));
  }

  template <class Emit>
  void swap_sources(int first, int lanes, const std::int64_t* argmax, Emit& emit) const {
    const int vectors = int((classes_ + Words::lanes - 1) / Words::lanes), tasks = lanes * vectors;
    const Words n(shape_.n);
    for (int task = 0; task < tasks; task += kWays) {
      int lane[kWays];
      std::int64_t at[kWays];
      Words x[kWays];
#pragma GCC unroll 4
      for (int way = 0; way < kWays; ++way) {
        const int mine = task + way < tasks ? task + way : tasks - 1;
        lane[way] = first + mine / vectors;
        at[way] = std::int64_t(mine % vectors) * Words::lanes;
        x[way] = rank(at[way], argmax[lane[way]]);
      }
      for (int i = 0; i < kSwapRounds; ++i) {
#pragma GCC unroll 4
        for (int way = 0; way < kWays; ++way) {
          x[way] = swap_or_not(x[way], Words(offsets_[i][lane[way]]), Words(keys_[i][lane[way]]), n);
        }
      }
#pragma GCC unroll 4
      for (int way = 0; way < kWays; ++way) emit(lane[way], at[way], source(x[way], at[way], argmax[lane[way]]));
    }
  }

  template <class Emit>
  void feistel_sources(int lane, std::int64_t kept, Emit& emit) const {
    std::uint32_t keys[kMostFeistelRounds];
    for (int i = 0; i < shape_.rounds; ++i) keys[i] = keys_[i][lane];
    const Words n(shape_.n), b(shape_.b);
    for (std::int64_t i = 0; i < classes_; i += Words::lanes) {
      FeistelPoint<Words> point = feistel(feistel_point(rank(i, kept), shape_), keys, shape_);
      Words x = point.l * b + point.r;
      for (auto beyond = x >= n; any(beyond); beyond = x >= n) {  // less than one in sqrt(n)
        const FeistelPoint<Words> next = feistel(point, keys, shape_);
        point = {select(beyond, next.l, point.l), select(beyond, next.r, point.r)};
        x = point.l * b + point.r;
      }
      emit(lane, i, source(x, i, kept));
    }
  }

  PermutationKey key_;
  RowKey<std::uint32_t> call_;
  std::int64_t classes_;
  FeistelShape shape_;
  alignas(64) std::uint32_t keys_[kSwapRounds][kRows];
  alignas(64) std::uint32_t offsets_[kSwapRounds][kRows];
};

// The class that a teacher's row keeps: the lowest index of its largest logit in fp32, whatever T is.
BAN_FAST_HD std::int64_t kept_class(const float* row, std::int64_t classes) {
  return row_peak(row, classes).index;
}
BAN_FAST_HD std::int64_t kept_class(const double* row, std::int64_t classes) {
  std::int64_t kept = 0;
  for (std::int64_t i = 1; i < classes; ++i) {
    if (float(row[kept]) < float(row[i])) kept = i;
  }
  return kept;
}

BAN_FAST_HD void gather_to(float* to, const float* from, Words index) { store(to, gather(from, index)); }
BAN_FAST_HD void gather_to(double* to, const double* from, Words index) {
  std::uint32_t at[Words::lanes];
  store(at, index);
  for (int lane = 0; lane < Words::lanes; ++lane) to[lane] = from[at[lane]];
}

// Calls use(row, target) for the rows [begin, end) that count: the teacher's row with every class but its argmax permuted.
// Targets last until end_block(), which comes after every at_once() rows at most.
template <class T>
class TargetRows {
 public:
  static int scratch_rows(std::int64_t classes) { return 2 * at_once(classes); }

  template <class Use, class EndBlock>
  static void visit(const Matrix& teacher, const Selection& selection, const PermutationKey& key,
                    const ScratchRows<T>& scratch, std::int64_t begin, std::int64_t end, Use use, EndBlock end_block) {
    RowPermuter permuter(key, selection.classes);
    const int block = at_once(selection.classes);
    for (std::int64_t base = begin; base < end; base += kKeys) {
      const int count = int(end - base < kKeys ? end - base : kKeys);
      if (!permuter.is_identity()) permuter.load_keys(base, count);
      for (int first = 0; first < count; first += block) {
        const int lanes = count - first < block ? count - first : block;
        permute(permuter, teacher, selection, scratch, base, first, lanes, use);
        end_block();
      }
    }
  }

 private:
  static constexpr int kKeys = RowPermuter::kRows;

  // Swap-or-not wants many rows in flight, and they are short.
  static int at_once(std::int64_t classes) { return classes <= std::int64_t(kFeistelFrom) ? kKeys : rows_at_once(classes); }

  template <class Use>
  static void permute(const RowPermuter& permuter, const Matrix& teacher, const Selection& selection,
                      const ScratchRows<T>& scratch, std::int64_t base, int first, int lanes, Use& use) {
    const std::int64_t classes = selection.classes;
    const T* rows[kKeys];
    std::int64_t argmax[kKeys];
    for (int lane = first; lane < first + lanes; ++lane) {
      const std::int64_t row = base + lane;
      T* buffer = scratch.row(2 * (lane - first));
      // An ignored row is not read: its target is of whatever the buffer holds, and not used.
      const bool ignored = selection.ignored(row);
      rows[lane] = ignored ? buffer : fetch_row(teacher, selection.teacher_row(row), classes, buffer);
      argmax[lane] = ignored ? 0 : kept_class(rows[lane], classes);
    }
    const bool moves = !permuter.is_identity();
    if (moves) {
      permuter.sources(first, lanes, argmax, [&](int lane, std::int64_t i, Words index) BAN_FAST_LAMBDA {
        gather_to(scratch.row(2 * (lane - first) + 1) + i, rows[lane], index);
      });
    }
    for (int lane = first; lane < first + lanes; ++lane) {
      if (!selection.ignored(base + lane)) use(base + lane, moves ? scratch.row(2 * (lane - first) + 1) : rows[lane]);
    }
  }
};

}  // namespace ban_fast::BAN_FAST_ISA
