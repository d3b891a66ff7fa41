// Vectors of unsigned words and bytes, for DKPP's permutation.
#pragma once

#include "vec.h"

namespace ban_fast::BAN_FAST_ISA {

BAN_FAST_HD Words high_product(Words a, Words b) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a.part[0], y = (__m512i)b.part[0];
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(x, y), 32);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), _mm512_srli_epi64(y, 32));
  a.part[0] = (Words::Part)_mm512_mask_blend_epi32(__mmask16(0xaaaa), even, odd);
#elif defined(__AVX2__)
  BAN_FAST_EACH_PART
  {
    const __m256i x = (__m256i)a.part[p], y = (__m256i)b.part[p];
    const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(x, y), 32);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), _mm256_srli_epi64(y, 32));
    a.part[p] = (Words::Part)_mm256_blend_epi32(even, odd, 0xaa);
  }
#else
  std::uint32_t x[16], y[16];
  store(x, a);
  store(y, b);
  for (int lane = 0; lane < 16; ++lane) x[lane] = std::uint32_t((std::uint64_t(x[lane]) * y[lane]) >> 32);
  a = load(x);
#endif
  return a;
}

BAN_FAST_HD Words lesser(Words a, Words b) { return select(a < b, a, b); }
BAN_FAST_HD Words greater(Words a, Words b) { return select(a < b, b, a); }
BAN_FAST_HD Words select_if_negative(Words bits, Words a, Words b) {
  return select(bits_as<std::int32_t>(bits) < Vec<std::int32_t>(0), a, b);
}

// from[index], lane by lane.
BAN_FAST_HD Vec<float> gather(const float* from, Words index) {
#if defined(__AVX512F__)
  Vec<float> x;
  x.part[0] = _mm512_i32gather_ps((__m512i)index.part[0], from, 4);
  return x;
#else
  std::uint32_t at[16];
  store(at, index);
  float values[16];
  for (int lane = 0; lane < 16; ++lane) values[lane] = from[at[lane]];
  return load(values);
#endif
}

// ---- Bytes -----------------------------------------------------------------------------------------------------

using Bytes = Vec<std::uint8_t>;

BAN_FAST_HD Bytes lesser(Bytes a, Bytes b) { return select(a < b, a, b); }

// a + b modulo m, for a and b below it; kWide: where the sum may not fit in a byte.
template <bool kWide>
BAN_FAST_HD Bytes add_modulo(Bytes a, Bytes b, Bytes m) {
  if constexpr (kWide) {
    const Bytes room = m - b;
    return select(a < room, a + b, a - room);
  } else {
    const Bytes sum = a + b;
    return lesser(sum, sum - m);  // below m, the difference wraps around to the larger
  }
}

// A table of up to 256 bytes that 64 lanes look up at once.
struct ByteTable {
#if defined(__AVX512BW__)
  alignas(64) std::uint16_t entries[256];  // one byte each: AVX-512BW permutes words
#else
  alignas(64) std::uint8_t entries[256];
#endif

  // entries[at .. at + 15]
  __attribute__((always_inline)) void set(int at, Words values) {
#if defined(__AVX512BW__)
    _mm256_store_si256(reinterpret_cast<__m256i*>(entries + at), _mm512_cvtepi32_epi16((__m512i)values.part[0]));
#else
    std::uint32_t words[Words::lanes];
    store(words, values);
    for (int lane = 0; lane < Words::lanes; ++lane) entries[at + lane] = std::uint8_t(words[lane]);
#endif
  }
};

#if defined(__AVX512BW__)
// entries[index] of 64, 128 or 256 entries by the low 6, 7 or 8 bits of each word.
template <int kEntries>
BAN_FAST_HD __m512i lookup_words(const __m512i* entries, __m512i index) {
  if constexpr (kEntries == 64) {
    return _mm512_permutex2var_epi16(entries[0], index, entries[1]);
  } else {
    const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(kEntries / 2));
    return _mm512_mask_mov_epi16(lookup_words<kEntries / 2>(entries, index), upper,
                                 lookup_words<kEntries / 2>(entries + kEntries / 64, index));
  }
}

template <int kEntries>
BAN_FAST_HD Bytes lookup_in(const ByteTable& table, Bytes index) {
  const __m512i* entries = reinterpret_cast<const __m512i*>(table.entries);
  const __m512i even = lookup_words<kEntries>(entries, (__m512i)index.part[0]);
  const __m512i odd = lookup_words<kEntries>(entries, _mm512_srli_epi16((__m512i)index.part[0], 8));
  index.part[0] = (Bytes::Part)_mm512_or_si512(even, _mm512_slli_epi16(odd, 8));
  return index;
}
#endif

// entries[index] for indices below `used`, the table's entries in use.
BAN_FAST_HD Bytes lookup(const ByteTable& table, Bytes index, [[maybe_unused]] int used) {
#if defined(__AVX512BW__)
  if (used > 128) return lookup_in<256>(table, index);
  return used > 64 ? lookup_in<128>(table, index) : lookup_in<64>(table, index);
#elif defined(__AVX2__)
  Bytes found(std::uint8_t(0));
  for (int tile = 0; tile < used; tile += 16) {
    const __m256i entries =
        _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table.entries + tile)));
    BAN_FAST_EACH_PART
    {
      // Adding 0x70 leaves the low four bits of 0..15 and sets the top bit of all else, which the shuffle makes 0.
      const __m256i in_tile = _mm256_sub_epi8((__m256i)index.part[p], _mm256_set1_epi8(char(tile)));
      const __m256i at = _mm256_adds_epu8(in_tile, _mm256_set1_epi8(0x70));
      found.part[p] |= (Bytes::Part)_mm256_shuffle_epi8(entries, at);
    }
  }
  return found;
#else
  std::uint8_t values[Bytes::lanes];
  store(values, index);
  for (int lane = 0; lane < Bytes::lanes; ++lane) values[lane] = table.entries[values[lane]];
  return load(values);
#endif
}

// 16 bytes as words.
BAN_FAST_HD Words widened(const std::uint8_t* bytes) {
#if defined(__AVX512F__)
  Words words;
  words.part[0] = (Words::Part)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  return words;
#else
  std::uint32_t words[Words::lanes];
  for (int lane = 0; lane < Words::lanes; ++lane) words[lane] = bytes[lane];
  return load(words);
#endif
}

}  // namespace ban_fast::BAN_FAST_ISA
