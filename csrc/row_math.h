// The formulas of one row, written once: for the CPU's vectors, and as scalars for host and device.
//
// z: student's logits, t: teacher's, r: the teacher's argmax, T: temperature. Sums over a row are double, elements F.
#pragma once

#include <cmath>

#include "elementary.h"

namespace ban_fast::BAN_FAST_ISA {

// ---- KD: differences of logits, never of logs ------------------------------------------------------------------

// d from which on expm1(d) is -1 in fp32 and fp64: where the student all but drops a class, how far says nothing.
inline constexpr double kDropped = -80.0;
// d above which a class is not weighed by p expm1(d), which shows the rounding of d and of x, and is nothing where p
// underflowed, but by its own logit. Measured with one class at d = 21 to 90, A = e^-12 to e^4, 10 to 10,000 classes:
// the gradient within 8e-7; without it 1e-5, and wrong where p underflowed.
inline constexpr double kLeaping = 20.0;
// A row goes by log-sum-exp where its leaping classes bring A above this share of the teacher's mass S. Log-sum-exp was
// measured within 2e-7 of the gradient at A = S, 2e-6 at S / 20 and 2e-2 at S e^-12, in rows with a teacher of e^-14.
inline constexpr double kLeapingMass = 1.0;
// So does a row where the student has less than this share of the teacher's mass, relative to the reference class:
// below it A's rounding weighs more than the cancellation that the difference form avoids.
inline constexpr double kLeastMass = 0.25;
inline constexpr double kSeriesLimit = 0.1;

// z - t without error: s + e (TwoSum). Needs strict IEEE arithmetic, so no file here is compiled with -ffast-math.
template <class F>
struct Difference {
  F s, e;
};

template <class F>
BAN_FAST_HD Difference<F> exact_difference(F z, F t) {
  const F s = z - t;
  const F b = s - z;
  return {s, (z - (s - b)) - (t + b)};
}

// d_i = ((z_i - t_i) - (z_r - t_r)) / T, the division last.
template <class F, class Divisor>
BAN_FAST_HD F relative_difference(Difference<F> i, Difference<F> r, const Divisor& temperature) {
  return divide((i.s - r.s) + (i.e - r.e), temperature);
}

// e^x (e^d - 1), x = (t_i - t_r) / T, for p = e^x and d <= kLeaping.
template <class F>
BAN_FAST_HD F excess(F p, F d) {
  return p * expm1(larger(d, F(Scalar<F>(kDropped))));
}

// The same for d > kLeaping, from z_i - z_r, and for p that is 0 where it underflowed. Where z_i - z_r > kLeaping T
// too, A is beyond kLeapingMass, whatever it is.
template <class F, class Divisor>
BAN_FAST_HD F leaping_excess(F p, F z_minus_z_r, const Divisor& temperature) {
  const F highest = F(Scalar<F>(kLeaping * double(temperature.value)));
  return exp_quotient(select(z_minus_z_r < highest, z_minus_z_r, highest), temperature) - p;
}

// What a near row's elements need of its sums S = sum e^x and A = sum e^x (e^d - 1): D = log1p(A / S), exp(-D) = S / (S
// + A), expm1(-D) = -A / (S + A).
template <class F>
struct NearRow {
  F log_mass, exp_neg, expm1_neg;
};

// F: double, or a vector of it for several rows.
template <class F>
BAN_FAST_HD NearRow<F> near_row(F s, F a) {
  const F inverse = F(1.0) / (s + a);
  return {log1p(a / s), s * inverse, F(0.0) - a * inverse};
}

// Whether sums over a row, with every excess by p expm1(d), must be made again with the leaping ones (or without -inf).
// Not where these say already that the row is far: they can up to d = 60, where no class with p underflowed counts.
BAN_FAST_HD bool is_leaping(double largest_d, double s, double a) {
  return a != a || (largest_d > kLeaping && !(largest_d <= 60.0 && a > kLeapingMass * s));
}

// Whether the difference form holds for a row (false for NaN); otherwise it goes by log-sum-exp.
BAN_FAST_HD bool is_near(double largest_d, double s, double a) {
  return a >= (kLeastMass - 1.0) * s && (largest_d <= kLeaping || a <= kLeapingMass * s);
}

// Times S: p_i, and q_i - p_i from its excess `more`; u_i = log(q_i / p_i).
template <class F>
struct Apart {
  F p, minus_p, log_ratio;
};

template <class F>
BAN_FAST_HD Apart<F> near_apart(F p, F more, F d, F log_mass, F exp_neg, F expm1_neg) {
  return {p, madd(more, exp_neg, p * expm1_neg), d - log_mass};
}

// q - p - p u >= 0, u = log(q / p): its sum is the KL divergence. q where p vanished.
template <class F>
BAN_FAST_HD F divergence_term(Apart<F> apart) {
  const F u = apart.log_ratio, p = apart.p;
  return select(magnitude(u) < F(Scalar<F>(kSeriesLimit)), p * expm1_minus_argument(u), apart.minus_p - p * u);
}

// The same by log-sum-exp. Never negative, and q where p vanished.
template <class F>
BAN_FAST_HD F far_term(F q, Apart<F> apart) {
  const F term = divergence_term(apart), zero = F(Scalar<F>(0));
  return select(apart.p == zero, q, select(term < zero, zero, term));
}

// ---- The label term --------------------------------------------------------------------------------------------

// Cross-entropy with label y from R = sum over i != y of exp(z_i - m), e_y = exp(z_y - m), m = max z: no 1 - q_y, so
// exact where the label is nearly certain. d/dz_i = exp(z_i - m) / (R + e_y), and -R / (R + e_y) for y.
BAN_FAST_HD double label_loss(double rest, double exp_y, double max_minus_y) {
  return max_minus_y == 0.0 ? log1p(rest) : log_of_sum(rest + exp_y) + max_minus_y;
}

// ---- DKPP's permutation: 32-bit unsigned arithmetic on U, a word or a vector of words ---------------------------
//
// U needs, beside the operators: high_product(a, b), lesser(a, b), greater(a, b), select_if_negative(bits, a, b).

inline constexpr std::uint32_t kGolden = 0x9e3779b9u;
inline constexpr int kSwapRounds = 24;
inline constexpr int kMostFeistelRounds = 10;
inline constexpr std::uint32_t kFeistelFrom = 99;  // fewer outputs: a Feistel network is not uniform, swap-or-not is

BAN_FAST_HD std::uint32_t high_product(std::uint32_t a, std::uint32_t b) {
  return std::uint32_t((std::uint64_t(a) * b) >> 32);
}
BAN_FAST_HD std::uint32_t lesser(std::uint32_t a, std::uint32_t b) { return a < b ? a : b; }
BAN_FAST_HD std::uint32_t greater(std::uint32_t a, std::uint32_t b) { return a < b ? b : a; }
BAN_FAST_HD std::uint32_t select_if_negative(std::uint32_t bits, std::uint32_t a, std::uint32_t b) {
  return std::int32_t(bits) < 0 ? a : b;
}

template <class U>
BAN_FAST_HD U mix(U x) {
  x = x ^ (x >> 16);
  x = x * U(0x7feb352du);
  x = x ^ (x >> 15);
  x = x * U(0x846ca68bu);
  return x ^ (x >> 16);
}

template <class U>
struct RowKey {
  U k0, k1;
};

template <class U>
BAN_FAST_HD RowKey<U> absorb(RowKey<U> key, U word) {
  const U k0 = mix(key.k0 ^ word) + U(kGolden);
  return {k0, mix(key.k1 + word) ^ k0};
}

// The key after seed and step, which all rows share; a row's id is absorbed on top, low word first.
BAN_FAST_HD RowKey<std::uint32_t> call_key(std::uint64_t seed, std::uint64_t step) {
  RowKey<std::uint32_t> key{0x243f6a88u, 0x85a308d3u};
  const std::uint64_t words[] = {seed, step};
  for (std::uint64_t word : words) {
    key = absorb(key, std::uint32_t(word));
    key = absorb(key, std::uint32_t(word >> 32));
  }
  return key;
}

template <class U>
BAN_FAST_HD U round_key(RowKey<U> key, std::uint32_t i) {
  return mix(key.k0 ^ mix(key.k1 + U(i * kGolden)));
}

// One swap-or-not round on x < n: x and offset - x (modulo n) change places, or not, by one bit of a hash of the
// larger.
template <class U>
BAN_FAST_HD U swap_or_not(U x, U offset, U key, U n) {
  const U below = offset - x;
  const U partner = lesser(below, below + n);  // below 0, `below` wraps around to the larger of the two
  const U hash = mix(greater(x, partner) * U(kGolden) + key);
  return select_if_negative(hash, partner, x);
}

// A mixed-radix Feistel network's shape: a * b >= n points, x = l * b + r. Two ranks of one column keep their distance
// with an extra probability of b^(-rounds / 2): at n = 99 that shows in 2e5 samples of 6 rounds, in 3e9 of 10.
struct FeistelShape {
  std::uint32_t n, a, b;
  int rounds;
  std::uint32_t inverse_b;  // ceil(2^32 / b)

  explicit FeistelShape(std::uint32_t outputs)
      : n(outputs), a(outputs < 2 ? 1u : std::uint32_t(std::sqrt(double(outputs)))) {
    b = outputs < 2 ? 1u : (n + a - 1) / a;
    rounds = outputs < 1000 ? kMostFeistelRounds : 8;
    inverse_b = std::uint32_t(((std::uint64_t(1) << 32) + b - 1) / b);
  }
};

template <class U>
struct FeistelPoint {
  U l, r;
};

template <class U>
BAN_FAST_HD FeistelPoint<U> feistel_point(U x, const FeistelShape& shape) {
  const U b = U(shape.b);
  U l = high_product(x, U(shape.inverse_b));
  U r = x - l * b;
  // 1 / b was rounded up, so l may be one too many.
  l = select_if_negative(r, l - U(1u), l);
  r = select_if_negative(r, r + b, r);
  return {l, r};
}

// A round's function: a hash of the other half, below `size`.
template <class U>
BAN_FAST_HD U feistel_hash(U half, U key, std::uint32_t size) {
  return high_product(mix(half * U(kGolden) + key), U(size));
}

// Two rounds, with their keys.
template <class U>
BAN_FAST_HD FeistelPoint<U> feistel_pair(FeistelPoint<U> point, U key_l, U key_r, const FeistelShape& shape) {
  const U a = U(shape.a), b = U(shape.b);
  const U l = point.l + feistel_hash(point.r, key_l, shape.a);
  point.l = lesser(l, l - a);  // modulo a: below a, l - a wraps around to the larger
  const U r = point.r + feistel_hash(point.l, key_r, shape.b);
  point.r = lesser(r, r - b);
  return point;
}

// All rounds, once; keys: shape.rounds of them.
template <class U, class Keys>
BAN_FAST_HD FeistelPoint<U> feistel(FeistelPoint<U> point, const Keys& keys, const FeistelShape& shape) {
  for (int i = 0; i < shape.rounds; i += 2) point = feistel_pair(point, U(keys[i]), U(keys[i + 1]), shape);
  return point;
}

}  // namespace ban_fast::BAN_FAST_ISA
