/* What memory gives: a copy and c = a + b, written past the caches as the kernels write, over [first, last) of 64-byte
   lines. Built for the machine it runs on by stream.py. */
#include <stddef.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#define LOAD(p) _mm512_loadu_ps(p)
#define ADD(x, y) _mm512_add_ps(x, y)
#define STORE(p, x) _mm512_stream_ps(p, x)
#define STEP 16
#define FENCE _mm_sfence()
#elif defined(__AVX__)
#include <immintrin.h>
#define LOAD(p) _mm256_loadu_ps(p)
#define ADD(x, y) _mm256_add_ps(x, y)
#define STORE(p, x) _mm256_stream_ps(p, x)
#define STEP 8
#define FENCE _mm_sfence()
#else
#define LOAD(p) (*(p))
#define ADD(x, y) ((x) + (y))
#define STORE(p, x) (*(p) = (x))
#define STEP 1
#define FENCE (void)0
#endif

void stream_copy(float* to, const float* from, size_t first, size_t last) {
  for (size_t i = first * 16; i < last * 16; i += STEP) STORE(to + i, LOAD(from + i));
  FENCE;
}

void stream_add(float* to, const float* a, const float* b, size_t first, size_t last) {
  for (size_t i = first * 16; i < last * 16; i += STEP) STORE(to + i, ADD(LOAD(a + i), LOAD(b + i)));
  FENCE;
}
