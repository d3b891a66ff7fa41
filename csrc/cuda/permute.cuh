// DKPP's permutation of one row, evaluated where it is wanted.
#pragma once

#include "logits.cuh"

namespace ban_fast::cuda {

// What keys it. The step is read on the device where it is a tensor's.
struct Permuting {
  bool wanted;
  std::uint64_t seed, step;
  const std::int64_t* step_at;     // or null: `step` it is
  const std::int64_t* sample_ids;  // [rows], or null: 0, 1, 2, ...
  FeistelShape shape;

  BAN_FAST_MEMBER RowKey<std::uint32_t> key(std::int64_t row) const {
    const std::uint64_t id = sample_ids == nullptr ? std::uint64_t(row) : std::uint64_t(sample_ids[row]);
    RowKey<std::uint32_t> key = call_key(seed, step_at == nullptr ? step : std::uint64_t(*step_at));
    key = absorb(key, std::uint32_t(id));
    return absorb(key, std::uint32_t(id >> 32));
  }
};

using BAN_FAST_ISA::greater;
using BAN_FAST_ISA::high_product;
using BAN_FAST_ISA::lesser;
using BAN_FAST_ISA::select_if_negative;

// Some words side by side, which row_math.h's permutations take together: one alone would mostly wait for itself.
template <int V>
struct Words {
  std::uint32_t at[V];

  Words() = default;
  BAN_FAST_MEMBER explicit Words(std::uint32_t word) {
    BAN_FAST_UNROLL
    for (int v = 0; v < V; ++v) at[v] = word;
  }
};

template <int V, class Make>
BAN_FAST_DEVICE Words<V> words_of(Make make) {
  Words<V> made;
  BAN_FAST_UNROLL
  for (int v = 0; v < V; ++v) made.at[v] = make(v);
  return made;
}

template <int V>
BAN_FAST_DEVICE Words<V> operator+(const Words<V>& a, const Words<V>& b) {
  return words_of<V>([&](int v) { return a.at[v] + b.at[v]; });
}
template <int V>
BAN_FAST_DEVICE Words<V> operator-(const Words<V>& a, const Words<V>& b) {
  return words_of<V>([&](int v) { return a.at[v] - b.at[v]; });
}
template <int V>
BAN_FAST_DEVICE Words<V> operator*(const Words<V>& a, const Words<V>& b) {
  return words_of<V>([&](int v) { return a.at[v] * b.at[v]; });
}
template <int V>
BAN_FAST_DEVICE Words<V> operator^(const Words<V>& a, const Words<V>& b) {
  return words_of<V>([&](int v) { return a.at[v] ^ b.at[v]; });
}
template <int V>
BAN_FAST_DEVICE Words<V> operator>>(const Words<V>& a, int bits) {
  return words_of<V>([&](int v) { return a.at[v] >> bits; });
}
template <int V>
BAN_FAST_DEVICE Words<V> high_product(const Words<V>& a, const Words<V>& b) {
  return words_of<V>([&](int v) { return high_product(a.at[v], b.at[v]); });
}
template <int V>
BAN_FAST_DEVICE Words<V> lesser(const Words<V>& a, const Words<V>& b) {
  return words_of<V>([&](int v) { return lesser(a.at[v], b.at[v]); });
}
template <int V>
BAN_FAST_DEVICE Words<V> greater(const Words<V>& a, const Words<V>& b) {
  return words_of<V>([&](int v) { return greater(a.at[v], b.at[v]); });
}
template <int V>
BAN_FAST_DEVICE Words<V> select_if_negative(const Words<V>& bits, const Words<V>& a, const Words<V>& b) {
  return words_of<V>([&](int v) { return select_if_negative(bits.at[v], a.at[v], b.at[v]); });
}

// The permutation of a row's classes; `kept` stays where it is.
class Permuter {
 public:
  static constexpr int kKeys = 2 * kSwapRounds;

  // keys: kKeys words of shared memory that `lanes` threads have together, of which this is number `lane`.
  template <class Team>
  BAN_FAST_MEMBER Permuter(const Permuting& how, std::int64_t row, std::uint32_t* keys, int lane, int lanes,
                           const Team& team)
      : shape_(how.shape), keys_(keys) {
    team.sync();  // the keys of the row before may still be being read
    if (shape_.n >= 2) {
      const RowKey<std::uint32_t> key = how.key(row);
      const bool is_feistel = shape_.n >= kFeistelFrom;
      const int count = is_feistel ? shape_.rounds : kKeys;
      for (int i = lane; i < count; i += lanes) {
        const std::uint32_t word = round_key(key, std::uint32_t(i));
        keys[i] = is_feistel || i % 2 == 1 ? word : high_product(word, shape_.n);
      }
    }
    team.sync();
  }

  // The classes whose values V classes take; some class for one beyond the last.
  template <int V>
  BAN_FAST_MEMBER Words<V> sources(const Positions& at, int kept) const {
    const Words<V> own = words_of<V>([&](int v) { return std::uint32_t(lesser(std::uint32_t(at[v]), shape_.n)); });
    if (shape_.n < 2) return own;
    const std::uint32_t last = shape_.n - 1, still = std::uint32_t(kept);
    const Words<V> image =
        ranks(words_of<V>([&](int v) { return lesser(own.at[v] < still ? own.at[v] : own.at[v] - 1u, last); }));
    return words_of<V>([&](int v) {
      return own.at[v] == still ? still : image.at[v] < still ? image.at[v] : image.at[v] + 1u;
    });
  }

 private:
  // For ranks below n.
  template <int V>
  BAN_FAST_MEMBER Words<V> ranks(Words<V> x) const {
    const std::uint32_t n = shape_.n;
    if (n < kFeistelFrom) {
      for (int i = 0; i < kSwapRounds; ++i) {
        x = swap_or_not(x, Words<V>(keys_[2 * i]), Words<V>(keys_[2 * i + 1]), Words<V>(n));
      }
      return x;
    }
    FeistelPoint<Words<V>> point = feistel(feistel_point(x, shape_), keys_, shape_);
    for (;;) {
      bool walks = false;
      BAN_FAST_UNROLL
      for (int v = 0; v < V; ++v) {
        x.at[v] = point.l.at[v] * shape_.b + point.r.at[v];
        walks = walks || x.at[v] >= n;
      }
      if (!walks) return x;
      const FeistelPoint<Words<V>> next = feistel(point, keys_, shape_);
      BAN_FAST_UNROLL
      for (int v = 0; v < V; ++v) {
        if (x.at[v] >= n) {
          point.l.at[v] = next.l.at[v];
          point.r.at[v] = next.r.at[v];
        }
      }
    }
  }

  const FeistelShape& shape_;
  const std::uint32_t* keys_;
};

}  // namespace ban_fast::cuda
