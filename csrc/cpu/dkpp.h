// DKPP's permutation for blocks of rows: 16 rows' keys at once, then many outputs of a row at once.
#pragma once

#include "sweeps.h"
#include "words.h"

namespace ban_fast::BAN_FAST_ISA {

class RowPermuter {
 public:
  static constexpr int kRows = Words::lanes;

  RowPermuter(const PermutationKey& key, std::int64_t classes)
      : key_(key), call_(call_key(key.seed, key.step)), shape_(std::uint32_t(classes - 1)) {
    std::uint8_t quotient[Bytes::lanes], remainder[Bytes::lanes];
    for (std::uint32_t lane = 0; lane < Bytes::lanes; ++lane) {
      quotient[lane] = std::uint8_t(lane / shape_.b);
      remainder[lane] = std::uint8_t(lane % shape_.b);
    }
    lane_quotient_ = load(quotient);
    lane_remainder_ = load(remainder);
  }

  // With fewer than two outputs beside the argmax nothing moves.
  bool is_identity() const { return shape_.n < 2; }

  // Room for a row's ranks: ranks() writes whole vectors, and for_sources() reads one from anywhere.
  static std::int64_t pitch(std::int64_t classes) { return (classes / Bytes::lanes + 3) * Bytes::lanes; }

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

  // The permutation of 0 .. n - 1 in the rows of `lanes` lanes from `first` on: row k's to ranks + k * pitch.
  void ranks(int first, int lanes, std::uint32_t* ranks, std::int64_t pitch) const {
    if (!is_feistel()) return swap_ranks(first, lanes, ranks, pitch);
    for (int k = 0; k < lanes; ++k) {
      std::uint32_t keys[kMostFeistelRounds];
      for (int i = 0; i < shape_.rounds; ++i) keys[i] = keys_[i][first + k];
      if (shape_.b <= kMostByte / 2) {
        feistel_byte_ranks<false>(keys, ranks + k * pitch);
      } else if (shape_.b <= kMostByte) {
        feistel_byte_ranks<true>(keys, ranks + k * pitch);
      } else {
        feistel_ranks(keys, ranks + k * pitch);
      }
    }
  }

 private:
  static constexpr int kWays = 4;  // vectors in flight: one alone would wait on itself for most of its rounds
  static constexpr std::uint32_t kMostByte = 255, kByteWays = 2;

  bool is_feistel() const { return shape_.n >= kFeistelFrom; }

  void swap_ranks(int first, int lanes, std::uint32_t* ranks, std::int64_t pitch) const {
    const int vectors = int((shape_.n + Words::lanes - 1) / Words::lanes), tasks = lanes * vectors;
    const Words n(shape_.n), lane_number = lane_numbers<std::uint32_t>();
    for (int task = 0; task < tasks; task += kWays) {
      int row[kWays], at[kWays];
      Words x[kWays];
#pragma GCC unroll 4
      for (int way = 0; way < kWays; ++way) {
        const int mine = task + way < tasks ? task + way : tasks - 1;
        row[way] = mine / vectors;
        at[way] = mine % vectors * Words::lanes;
        x[way] = lesser(lane_number + Words(std::uint32_t(at[way])), n - Words(1u));
      }
      for (int i = 0; i < kSwapRounds; ++i) {
#pragma GCC unroll 4
        for (int way = 0; way < kWays; ++way) {
          x[way] = swap_or_not(x[way], Words(offsets_[i][first + row[way]]), Words(keys_[i][first + row[way]]), n);
        }
      }
#pragma GCC unroll 4
      for (int way = 0; way < kWays; ++way) store(ranks + row[way] * pitch + at[way], x[way]);
    }
  }

  // Both halves of a point fit in bytes: a round's function is a table of its b values, and 64 points look it up at
  // once. kWide: two of them may add up to more than a byte holds.
  template <bool kWide>
  void feistel_byte_ranks(const std::uint32_t* keys, std::uint32_t* ranks) const {
    ByteTable tables[kMostFeistelRounds];
    const Words lane_number = lane_numbers<std::uint32_t>();
    for (int i = 0; i < shape_.rounds; ++i) {
      const std::uint32_t inputs = i % 2 == 0 ? shape_.b : shape_.a, outputs = i % 2 == 0 ? shape_.a : shape_.b;
      for (std::uint32_t at = 0; at < inputs; at += Words::lanes) {
        tables[i].set(int(at), feistel_hash(lane_number + Words(at), Words(keys[i]), outputs));
      }
    }
    // Fewer than b points lie at or above n, all of them in the last l.
    const Bytes last_l(std::uint8_t(shape_.a - 1)), first_beyond(std::uint8_t(shape_.n - (shape_.a - 1) * shape_.b));
    const Bytes b(static_cast<std::uint8_t>(shape_.b)), zero(std::uint8_t(0)), one(std::uint8_t(1));
    const auto is_beyond = [&](FeistelPoint<Bytes> point)
                               BAN_FAST_LAMBDA { return (point.l == last_l) & (point.r >= first_beyond); };
    for (std::uint32_t i = 0; i < shape_.n; i += kByteWays * Bytes::lanes) {
      FeistelPoint<Bytes> points[kByteWays];
#pragma GCC unroll 2
      for (std::uint32_t way = 0; way < kByteWays; ++way) {
        const std::uint32_t at = i + way * Bytes::lanes;
        const Bytes first_r(std::uint8_t(at % shape_.b)), r = add_modulo<kWide>(first_r, lane_remainder_, b);
        const Bytes carry = select(r < first_r, one, zero);
        const Bytes l = Bytes(std::uint8_t(at / shape_.b)) + lane_quotient_ + carry;
        const FeistelPoint<Bytes> start{lesser(l, last_l), r};
        // Lanes past n - 1 start at some point below n: only a walk that begins there is sure to end.
        points[way] = {start.l, select(is_beyond(start), zero, start.r)};
      }
      feistel_bytes<kWide>(points, tables);
      for (auto beyond = is_beyond(points[0]) | is_beyond(points[1]); any(beyond);
           beyond = is_beyond(points[0]) | is_beyond(points[1])) {
        FeistelPoint<Bytes> next[kByteWays] = {points[0], points[1]};
        feistel_bytes<kWide>(next, tables);
#pragma GCC unroll 2
        for (std::uint32_t way = 0; way < kByteWays; ++way) {
          const auto walks = is_beyond(points[way]);
          points[way] = {select(walks, next[way].l, points[way].l), select(walks, next[way].r, points[way].r)};
        }
      }
#pragma GCC unroll 2
      for (std::uint32_t way = 0; way < kByteWays; ++way) {
        std::uint8_t l[Bytes::lanes], r[Bytes::lanes];
        store(l, points[way].l);
        store(r, points[way].r);
        for (int quarter = 0; quarter < Bytes::lanes; quarter += Words::lanes) {
          store(ranks + i + way * Bytes::lanes + quarter,
                widened(l + quarter) * Words(shape_.b) + widened(r + quarter));
        }
      }
    }
  }

  template <bool kWide>
  __attribute__((always_inline)) void feistel_bytes(FeistelPoint<Bytes> (&points)[kByteWays],
                                                    const ByteTable* tables) const {
    const Bytes a(static_cast<std::uint8_t>(shape_.a)), b(static_cast<std::uint8_t>(shape_.b));
    for (int i = 0; i < shape_.rounds; i += 2) {
#pragma GCC unroll 2
      for (auto& point : points) point.l = add_modulo<kWide>(point.l, lookup(tables[i], point.r, int(shape_.b)), a);
#pragma GCC unroll 2
      for (auto& point : points) point.r = add_modulo<kWide>(point.r, lookup(tables[i + 1], point.l, int(shape_.a)), b);
    }
  }

  void feistel_ranks(const std::uint32_t* keys, std::uint32_t* ranks) const {
    const Words n(shape_.n), b(shape_.b), lane_number = lane_numbers<std::uint32_t>();
    for (std::uint32_t i = 0; i < shape_.n; i += kWays * Words::lanes) {
      FeistelPoint<Words> points[kWays];
#pragma GCC unroll 4
      for (int way = 0; way < kWays; ++way) {
        const Words x = lane_number + Words(i + std::uint32_t(way * Words::lanes));
        points[way] = feistel_point(lesser(x, n - Words(1u)), shape_);
      }
      feistel_words(points, keys);
#pragma GCC unroll 4
      for (int way = 0; way < kWays; ++way) {
        Words x = points[way].l * b + points[way].r;
        for (auto beyond = x >= n; any(beyond); beyond = x >= n) {
          const FeistelPoint<Words> next = feistel(points[way], keys, shape_);
          points[way] = {select(beyond, next.l, points[way].l), select(beyond, next.r, points[way].r)};
          x = points[way].l * b + points[way].r;
        }
        const std::uint32_t at = i + std::uint32_t(way * Words::lanes);
        if (at < shape_.n) store(ranks + at, x);
      }
    }
  }

  __attribute__((always_inline)) void feistel_words(FeistelPoint<Words> (&points)[kWays],
                                                    const std::uint32_t* keys) const {
    for (int i = 0; i < shape_.rounds; i += 2) {
      const Words key_l(keys[i]), key_r(keys[i + 1]);
#pragma GCC unroll 4
      for (auto& point : points) point = feistel_pair(point, key_l, key_r, shape_);
    }
  }

  PermutationKey key_;
  RowKey<std::uint32_t> call_;
  FeistelShape shape_;
  Bytes lane_quotient_, lane_remainder_;  // of lane numbers by b
  alignas(64) std::uint32_t keys_[kSwapRounds][kRows];
  alignas(64) std::uint32_t offsets_[kSwapRounds][kRows];
};

// The class that a teacher's row keeps: the lowest index of its largest logit in fp32, whatever T is.
BAN_FAST_HD std::int64_t kept_class(const float* row, std::int64_t classes) { return row_peak(row, classes).index; }
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

// Calls take(class, sources) so that the classes from that one on take their values from the 16 classes `sources`; what
// is beyond the last class is some class. `kept` is left out, and a later call may overrule what an earlier one said.
template <class Take>
BAN_FAST_HD void for_sources(const std::uint32_t* ranks, std::int64_t classes, std::int64_t kept, Take take) {
  const Words limit(static_cast<std::uint32_t>(kept)), last(static_cast<std::uint32_t>(classes - 2));
  const auto from = [&](std::int64_t rank) BAN_FAST_LAMBDA {
    const Words x = lesser(load(ranks + rank), last);  // what lies beyond the last rank is anything
    return select(x < limit, x, x + Words(1u));
  };
  for (std::int64_t rank = 0; rank < kept; rank += Words::lanes) take(rank, from(rank));
  for (std::int64_t rank = kept; rank + 1 < classes; rank += Words::lanes) take(rank + 1, from(rank));
}

// Calls use(row, target) for rows that count: the teacher's row with every class but its argmax permuted.
template <class T>
class TargetRows {
 public:
  // What rows(...) of scratch it needs, and what words(...).
  static int scratch_rows(std::int64_t classes) { return 2 * at_once(classes); }
  static std::int64_t scratch_words(std::int64_t classes) { return at_once(classes) * RowPermuter::pitch(classes); }

  TargetRows(const Matrix& teacher, const Selection& selection, const PermutationKey& key,
             const ScratchRows<T>& scratch)
      : teacher_(teacher),
        selection_(selection),
        scratch_(scratch),
        permuter_(key, selection.classes),
        pitch_(RowPermuter::pitch(selection.classes)) {}

  // Rows [begin, end). Targets last until end_block(), which comes after every few rows, and at the end.
  template <class Use, class EndBlock>
  void visit(std::int64_t begin, std::int64_t end, Use use, EndBlock end_block) {
    const int block = at_once(selection_.classes);
    for (std::int64_t base = begin; base < end; base += kKeys) {
      const int count = int(end - base < kKeys ? end - base : kKeys);
      if (!permuter_.is_identity()) permuter_.load_keys(base, count);
      for (int first = 0; first < count; first += block) {
        const int lanes = count - first < block ? count - first : block;
        if (!permuter_.is_identity()) permuter_.ranks(first, lanes, scratch_.words(), pitch_);
        for (int k = 0; k < lanes; ++k) {
          const std::int64_t row = base + first + k;
          if (!selection_.ignored(row)) use(row, target(row, k));
        }
        end_block();
      }
    }
  }

 private:
  static constexpr int kKeys = RowPermuter::kRows;

  // Swap-or-not wants many rows in flight, and they are short.
  static int at_once(std::int64_t classes) {
    return classes <= std::int64_t(kFeistelFrom) ? kKeys : rows_at_once(classes);
  }

  const T* target(std::int64_t row, int k) const {
    const std::int64_t classes = selection_.classes;
    const T* from = fetch_row(teacher_, selection_.teacher_row(row), classes, scratch_.row(2 * k));
    if (permuter_.is_identity()) return from;
    const std::int64_t kept = kept_class(from, classes);
    T* to = scratch_.row(2 * k + 1);
    for_sources(scratch_.words() + k * pitch_, classes, kept,
                [&](std::int64_t at, Words sources) BAN_FAST_LAMBDA { gather_to(to + at, from, sources); });
    to[kept] = from[kept];
    return to;
  }

  const Matrix& teacher_;
  const Selection& selection_;
  const ScratchRows<T> scratch_;
  RowPermuter permuter_;
  const std::int64_t pitch_;
};

}  // namespace ban_fast::BAN_FAST_ISA
