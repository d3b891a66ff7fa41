// Vec<T>: 64 bytes of T, whatever the instruction set. One register with AVX-512, two with AVX2, four with 128 bits.
//
// Lanes are logical: sums are kept and folded lane by lane in one order, so that every instruction set with fma gives
// the same bits. Only what the compiler does badly or not at all is spelled in intrinsics; the rest is GCC's and
// Clang's vector types.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <limits>
#include <type_traits>

#include "../elementary.h"

namespace ban_fast::BAN_FAST_ISA {

#if defined(__AVX512F__)
inline constexpr int kPartBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kPartBytes = 32;
#else
inline constexpr int kPartBytes = 16;
#endif
inline constexpr int kParts = 64 / kPartBytes;

#define BAN_FAST_EACH_PART _Pragma("GCC unroll 4") for (int p = 0; p < kParts; ++p)

template <class T>
using IntOf =
    std::conditional_t<sizeof(T) == 1, std::int8_t, std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>>;

template <class T>
struct Vec {
  typedef T Part __attribute__((vector_size(kPartBytes)));
  using Mask = Vec<IntOf<T>>;
  static constexpr int lanes = 64 / sizeof(T);

  Part part[kParts];

  Vec() = default;
  __attribute__((always_inline)) explicit Vec(T x) {
    BAN_FAST_EACH_PART
    part[p] = x - Part{};
  }
};

using Words = Vec<std::uint32_t>;

template <class T>
struct ScalarOf<Vec<T>> {
  using type = T;
};

#define BAN_FAST_BINARY(op)                            \
  template <class T>                                   \
  BAN_FAST_HD Vec<T> operator op(Vec<T> a, Vec<T> b) { \
    BAN_FAST_EACH_PART                                 \
    a.part[p] = a.part[p] op b.part[p];                \
    return a;                                          \
  }
BAN_FAST_BINARY(+)
BAN_FAST_BINARY(-)
BAN_FAST_BINARY(*)
BAN_FAST_BINARY(/)
BAN_FAST_BINARY(&)
BAN_FAST_BINARY(|)
BAN_FAST_BINARY(^)
#undef BAN_FAST_BINARY

template <class T>
BAN_FAST_HD Vec<T> operator~(Vec<T> a) {
  BAN_FAST_EACH_PART
  a.part[p] = ~a.part[p];
  return a;
}

template <class T>
BAN_FAST_HD Vec<T> operator>>(Vec<T> a, int count) {
  BAN_FAST_EACH_PART
  a.part[p] = a.part[p] >> count;
  return a;
}

template <class T>
BAN_FAST_HD Vec<T> operator<<(Vec<T> a, int count) {
  BAN_FAST_EACH_PART
  a.part[p] = a.part[p] << count;
  return a;
}

#define BAN_FAST_COMPARE(op)                                              \
  template <class T>                                                      \
  BAN_FAST_HD typename Vec<T>::Mask operator op(Vec<T> a, Vec<T> b) {     \
    typename Vec<T>::Mask mask;                                           \
    BAN_FAST_EACH_PART                                                    \
    mask.part[p] = (typename Vec<T>::Mask::Part)(a.part[p] op b.part[p]); \
    return mask;                                                          \
  }
BAN_FAST_COMPARE(<)
BAN_FAST_COMPARE(>=)
BAN_FAST_COMPARE(==)
#undef BAN_FAST_COMPARE

template <class T>
BAN_FAST_HD Vec<T> select(typename Vec<T>::Mask mask, Vec<T> a, Vec<T> b) {
  BAN_FAST_EACH_PART
  a.part[p] = mask.part[p] ? a.part[p] : b.part[p];
  return a;
}

// The same bits as another type.
template <class To, class From>
BAN_FAST_HD Vec<To> bits_as(Vec<From> x) {
  Vec<To> y;
  BAN_FAST_EACH_PART
  y.part[p] = (typename Vec<To>::Part)x.part[p];
  return y;
}

template <class T>
BAN_FAST_HD Vec<T> magnitude(Vec<T> x) {
  return bits_as<T>(bits_as<IntOf<T>>(x) & Vec<IntOf<T>>(std::numeric_limits<IntOf<T>>::max()));
}

BAN_FAST_HD Vec<std::uint32_t> bits_of(Vec<float> x) { return bits_as<std::uint32_t>(x); }
BAN_FAST_HD Vec<std::uint64_t> bits_of(Vec<double> x) { return bits_as<std::uint64_t>(x); }
BAN_FAST_HD Vec<float> from_bits(Vec<std::uint32_t> bits) { return bits_as<float>(bits); }
BAN_FAST_HD Vec<double> from_bits(Vec<std::uint64_t> bits) { return bits_as<double>(bits); }

#if defined(__AVX512F__)
BAN_FAST_HD __m512 part_madd(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
BAN_FAST_HD __m512d part_madd(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX2__)
BAN_FAST_HD __m256 part_madd(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
BAN_FAST_HD __m256d part_madd(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
BAN_FAST_HD float32x4_t part_madd(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
BAN_FAST_HD float64x2_t part_madd(float64x2_t a, float64x2_t b, float64x2_t c) { return vfmaq_f64(c, a, b); }
#else
template <class Part>
BAN_FAST_HD Part part_madd(Part a, Part b, Part c) {
  return a * b + c;
}
#endif

template <class T>
BAN_FAST_HD Vec<T> madd(Vec<T> a, Vec<T> b, Vec<T> c) {
  BAN_FAST_EACH_PART
  a.part[p] = part_madd(a.part[p], b.part[p], c.part[p]);
  return a;
}

// The larger of two; a where either is NaN.
template <class T>
BAN_FAST_HD Vec<T> larger(Vec<T> a, Vec<T> b) {
  BAN_FAST_EACH_PART
  {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      a.part[p] = _mm512_max_ps(b.part[p], a.part[p]);
    } else {
      a.part[p] = _mm512_max_pd(b.part[p], a.part[p]);
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
      a.part[p] = _mm256_max_ps(b.part[p], a.part[p]);
    } else {
      a.part[p] = _mm256_max_pd(b.part[p], a.part[p]);
    }
#else
    a.part[p] = a.part[p] < b.part[p] ? b.part[p] : a.part[p];
#endif
  }
  return a;
}

template <class M>
BAN_FAST_HD bool any(Vec<M> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask.part[0], (__m512i)mask.part[0]) != 0;
#elif defined(__AVX2__)
  const __m256i either = (__m256i)(mask.part[0] | mask.part[1]);
  return !_mm256_testz_si256(either, either);
#else
  const auto either = (typename Vec<std::int64_t>::Part)((mask.part[0] | mask.part[1]) | (mask.part[2] | mask.part[3]));
  return (either[0] | either[1]) != 0;
#endif
}

// The lowest lane whose mask is set; `lanes` or more where none is.
template <class M>
BAN_FAST_HD int first_set(Vec<M> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(M) == 4) return __builtin_ctz(unsigned(_mm512_movepi32_mask((__m512i)mask.part[0])) | 0x10000u);
  return __builtin_ctz(unsigned(_mm512_movepi64_mask((__m512i)mask.part[0])) | 0x100u);
#else
  M values[Vec<M>::lanes];
  std::memcpy(values, &mask, sizeof values);
  int lane = 0;
  while (lane < Vec<M>::lanes && values[lane] == 0) ++lane;
  return lane;
#endif
}

template <class T>
BAN_FAST_HD Vec<T> lane_numbers() {
  Vec<T> numbers;
  T values[Vec<T>::lanes];
  for (int lane = 0; lane < Vec<T>::lanes; ++lane) values[lane] = T(lane);
  std::memcpy(&numbers, values, sizeof numbers);
  return numbers;
}

// table[number % 8] lane by lane, where kFused. The table has its eight entries twice.
BAN_FAST_HD Words look_up([[maybe_unused]] const std::uint32_t (&table)[16], Words number) {
#if defined(__AVX512F__)
  number.part[0] = (Words::Part)_mm512_permutexvar_epi32((__m512i)number.part[0], _mm512_loadu_si512(table));
#elif defined(__AVX2__)
  const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table));
  BAN_FAST_EACH_PART
  number.part[p] = (Words::Part)_mm256_permutevar8x32_epi32(eight, (__m256i)number.part[p]);
#elif defined(__aarch64__)
  const uint8x16x2_t bytes = vld1q_u8_x2(reinterpret_cast<const std::uint8_t*>(table));
  number = (number & Words(7)) * Words(0x04040404) + Words(0x03020100);  // each entry's four bytes
  BAN_FAST_EACH_PART
  number.part[p] = (Words::Part)vqtbl2q_u8(bytes, (uint8x16_t)number.part[p]);
#else
  static_assert(!kFused, "an instruction set with fma needs a way to look up words");
#endif
  return number;
}

// ---- Memory ----------------------------------------------------------------------------------------------------

template <class T>
BAN_FAST_HD Vec<T> load(const T* from) {
  Vec<T> x;
  BAN_FAST_EACH_PART
  std::memcpy(&x.part[p], reinterpret_cast<const char*>(from) + p * kPartBytes, kPartBytes);
  return x;
}

template <class T>
BAN_FAST_HD void store(T* to, Vec<T> x) {
  BAN_FAST_EACH_PART
  std::memcpy(reinterpret_cast<char*>(to) + p * kPartBytes, &x.part[p], kPartBytes);
}

// Past the cache, to an address aligned to a whole vector.
template <class T>
BAN_FAST_HD void stream(T* to, Vec<T> x) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)x.part[0]);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)x.part[0]);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + 1, (__m256i)x.part[1]);
#else
  store(to, x);
#endif
}

// What was streamed before is there for other threads after.
BAN_FAST_HD void end_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Brings a line nearer that will be wanted soon. Any address will do.
BAN_FAST_HD void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

// The first `count` lanes, 1 <= count <= lanes, and `fill` in the others; nothing beyond them is read.
template <class T>
BAN_FAST_HD Vec<T> load_first(const T* from, int count, T fill) {
#if defined(__AVX512F__)
  Vec<T> x(fill);
  if constexpr (sizeof(T) == 4) {
    const __mmask16 mask = __mmask16(0xffffu >> (16 - count));
    x.part[0] = (typename Vec<T>::Part)_mm512_mask_loadu_epi32((__m512i)x.part[0], mask, from);
  } else {
    const __mmask8 mask = __mmask8(0xffu >> (8 - count));
    x.part[0] = (typename Vec<T>::Part)_mm512_mask_loadu_epi64((__m512i)x.part[0], mask, from);
  }
  return x;
#else
  T values[Vec<T>::lanes];
  for (int lane = 0; lane < Vec<T>::lanes; ++lane) values[lane] = fill;
  std::memcpy(values, from, std::size_t(count) * sizeof(T));
  return load(values);
#endif
}

template <class T>
BAN_FAST_HD void store_first(T* to, Vec<T> x, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(to, __mmask16(0xffffu >> (16 - count)), (__m512i)x.part[0]);
  } else {
    _mm512_mask_storeu_epi64(to, __mmask8(0xffu >> (8 - count)), (__m512i)x.part[0]);
  }
#else
  std::memcpy(to, &x, std::size_t(count) * sizeof(T));
#endif
}

// load and store, cut short where kTail says that only `left` < lanes are there.
template <bool kTail, class T>
BAN_FAST_HD Vec<T> load_some(const T* from, std::int64_t left, T fill) {
  if constexpr (kTail) return load_first(from, int(left), fill);
  return load(from);
}

// ---- Folds, in one order of the logical lanes -------------------------------------------------------------------

template <class T>
BAN_FAST_HD T largest_lane(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x.part[0]), _mm512_extractf32x8_ps(x.part[0], 1));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_max_ss(four, _mm_movehdup_ps(four))[0];
  } else {
    return _mm512_reduce_max_pd(x.part[0]);
  }
#else
  T values[Vec<T>::lanes];
  store(values, x);
  for (int half = Vec<T>::lanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) values[lane] = larger(values[lane], values[lane + half]);
  }
  return values[0];
#endif
}

// The smallest of the lanes whose mask is set, of which there is one at least.
template <class I>
BAN_FAST_HD I smallest_of(Vec<I> mask, Vec<I> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(I) == 4) {
    const __mmask16 set = _mm512_movepi32_mask((__m512i)mask.part[0]);
    const bool is_only = (set & (set - 1)) == 0;  // nearly always, and four dependent steps less
    return is_only ? _mm_cvtsi128_si32(_mm512_castsi512_si128(_mm512_maskz_compress_epi32(set, (__m512i)x.part[0])))
                   : _mm512_mask_reduce_min_epi32(set, (__m512i)x.part[0]);
  } else {
    return _mm512_mask_reduce_min_epi64(_mm512_movepi64_mask((__m512i)mask.part[0]), (__m512i)x.part[0]);
  }
#else
  I values[Vec<I>::lanes];
  store(values, select(mask, x, Vec<I>(std::numeric_limits<I>::max())));
  I smallest = values[0];
  for (I value : values) smallest = value < smallest ? value : smallest;
  return smallest;
#endif
}

// Lane l of the result: lanes l and l + 8 of x, added in double.
BAN_FAST_HD Vec<double> widened_sum(Vec<float> x) {
#if defined(__AVX512F__)
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x.part[0]));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.part[0], 1));
  Vec<double> sum;
  sum.part[0] = low + high;
  return sum;
#elif defined(__AVX2__)
  Vec<double> sum;
  sum.part[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(x.part[0])) + _mm256_cvtps_pd(_mm256_castps256_ps128(x.part[1]));
  sum.part[1] =
      _mm256_cvtps_pd(_mm256_extractf128_ps(x.part[0], 1)) + _mm256_cvtps_pd(_mm256_extractf128_ps(x.part[1], 1));
  return sum;
#else
  float values[16];
  store(values, x);
  double sums[8];
  for (int lane = 0; lane < 8; ++lane) sums[lane] = double(values[lane]) + double(values[lane + 8]);
  return load(sums);
#endif
}
BAN_FAST_HD Vec<double> widened_sum(Vec<double> x) { return x; }

BAN_FAST_HD double lane_sum(Vec<double> x) {
#if defined(__AVX512F__)
  const __m256d four = _mm512_castpd512_pd256(x.part[0]) + _mm512_extractf64x4_pd(x.part[0], 1);
  const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
  return two[0] + two[1];
#else
  double values[8];
  store(values, x);
  for (int half = 4; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) values[lane] += values[lane + half];
  }
  return values[0];
#endif
}

}  // namespace ban_fast::BAN_FAST_ISA
