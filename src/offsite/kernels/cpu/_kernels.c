/* Attention and activations for CPUs whose tiles multiply bf16 (Intel AMX), of one thread.

   A library without Python in it: compiled_kernels.py loads it, and says what each function takes. Where the compiler, the
   system or the processor has none of this, `offsite_kernels` says so and nothing else may be called.

   Attention keeps the probabilities of no query (Dao et al., arXiv 2205.14135, algorithms 1 and 4). Everything about them is
   computed the other way up, keys in rows and queries in columns: then a sum over keys is a sum of vectors, what
   belongs to a query is a vector itself, and what leaves one product can enter the next as either factor. */

enum { VERSION = 1 }; /* of the functions' arguments; compiled_kernels.py has the same */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;

#define VECTORS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define TILES __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))

enum { SIDE = 32, BLOCK = 64, TILE = 16 * 32 }; /* what a product makes at once; keys or queries at once; numbers in a tile */

static size_t rounded(size_t n) { return (n + SIDE - 1) / SIDE * SIDE; }
static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* ---- what the CPU has ------------------------------------------------------------------------------------ */

/* 2: tiles of bf16 and vectors, 1: vectors alone, 0: neither, or the system does not keep their registers, or the caller
   was written for another version of this file. */
int offsite_kernels(int version) {
  unsigned a, b, c, d, low, high;
  if (version != VERSION || !__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const unsigned vectors = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* AVX-512 F, DQ, BW, VL */
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (b & vectors) != vectors || (low & 0xe6) != 0xe6) return 0;
  const int tiles = (d >> 22 & 1) && (d >> 24 & 1) && (low & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return 0; /* AVX-512 BF16 */
  /* the kernel wants to be asked before a process uses its tiles: ARCH_REQ_XCOMP_PERM of the tiles' data */
  return tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? 2 : 1;
}

/* ---- numbers ---------------------------------------------------------------------------------------------------- */

static inline VECTORS __m512 wide(const bf16 *from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

static inline VECTORS void narrow(bf16 *to, __m512 given) {
  _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(given));
}

/* 2^x: a polynomial (as Cephes has it) around the nearest whole number. */
static inline VECTORS __m512 power(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x); /* in this order what is no number stays none */
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 left = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.535336188319500e-4f);
  sum = _mm512_fmadd_ps(sum, left, _mm512_set1_ps(1.339887440266574e-3f));
  sum = _mm512_fmadd_ps(sum, left, _mm512_set1_ps(9.618437357674640e-3f));
  sum = _mm512_fmadd_ps(sum, left, _mm512_set1_ps(5.550332471162809e-2f));
  sum = _mm512_fmadd_ps(sum, left, _mm512_set1_ps(2.402264791363012e-1f));
  sum = _mm512_fmadd_ps(sum, left, _mm512_set1_ps(6.931472028550421e-1f));
  sum = _mm512_fmadd_ps(sum, left, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
}

/* log2 of what is greater than zero. */
static inline VECTORS __m512 logarithm(__m512 x) {
  float of[16];
  _mm512_storeu_ps(of, x);
  for (int i = 0; i < 16; i++) of[i] = __builtin_log2f(of[i]);
  return _mm512_loadu_ps(of);
}

/* 32 random numbers of 16 bits that depend on a seed and a place alone: SplitMix64 (Steele, Lea, Flood 2014). */
static inline VECTORS __m512i random_at(uint64_t seed, uint64_t place) {
  const __m512i golden = _mm512_set1_epi64((long long)0x9e3779b97f4a7c15ull);
  const __m512i eight = _mm512_setr_epi64(1, 2, 3, 4, 5, 6, 7, 8);
  __m512i z = _mm512_add_epi64(_mm512_set1_epi64((long long)(8 * place)), eight);
  z = _mm512_add_epi64(_mm512_mullo_epi64(z, golden), _mm512_set1_epi64((long long)seed));
  z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), _mm512_set1_epi64((long long)0xbf58476d1ce4e5b9ull));
  z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), _mm512_set1_epi64((long long)0x94d049bb133111ebull));
  return _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
}

/* ---- orders in which tiles want their numbers -------------------------------------------------------------------- */

/* 16 x 16 words of 32 bits, turned over. */
static inline VECTORS void turned(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

/* Two vectors of 16 words of 16 bits each, one after the other in a register: (x0, y0, x1, y1, ...). */
static inline VECTORS __m512i alternating(__m512i both) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}

/* Rows of a tensor, with zeros behind them: of a head, T of D numbers each, `apart` numbers from one to the next. */
typedef struct {
  const bf16 *first;
  size_t apart, count, width;
} rows;

static inline VECTORS __m512i row_at(rows of, size_t row, size_t column) { /* 32 numbers, zeros outside */
  if (row >= of.count || column >= of.width) return _mm512_setzero_si512();
  const size_t left = of.width - column;
  const __mmask32 there = left >= 32 ? 0xffffffffu : (1u << left) - 1;
  return _mm512_maskz_loadu_epi16(there, of.first + row * of.apart + column);
}

/* As they are: a first factor that sums over columns. */
static VECTORS void as_rows(bf16 *to, rows of, size_t count, size_t width) {
  for (size_t i = 0; i < count; i++)
    for (size_t j = 0; j < width; j += 32) _mm512_storeu_si512(to + i * width + j, row_at(of, i, j));
}

/* Second factor that sums over the width: tiles of 16 rows, one after the other, width / 32 for each. */
static VECTORS void as_columns(bf16 *to, rows of, size_t begin, size_t count, size_t width) {
  for (size_t i = 0; i < count; i += 16)
    for (size_t j = 0; j < width; j += 32, to += TILE) {
      __m512i v[16];
      for (int r = 0; r < 16; r++) v[r] = row_at(of, begin + i + r, j);
      turned(v);
      for (int r = 0; r < 16; r++) _mm512_storeu_si512(to + 32 * r, v[r]);
    }
}

/* Second factor that sums over rows: for every 16 columns a tile of every 32 rows. */
static VECTORS void as_pairs(bf16 *to, rows of, size_t begin, size_t count, size_t width) {
  const size_t steps = count / 32;
  for (size_t i = 0; i < count; i += 2)
    for (size_t j = 0; j < width; j += 32) {
      const __m512i one = row_at(of, begin + i, j), two = row_at(of, begin + i + 1, j);
      bf16 *at = to + (j / 16 * steps + i / 32) * TILE + i % 32 * 16;
      _mm512_storeu_si512(at, alternating(_mm512_inserti64x4(one, _mm512_castsi512_si256(two), 1)));
      _mm512_storeu_si512(at + steps * TILE, alternating(_mm512_inserti64x4(two, _mm512_extracti64x4_epi64(one, 1), 0)));
    }
}

/* First factor that sums over rows: the width in rows, `count` columns. */
static VECTORS void as_turned(bf16 *to, rows of, size_t begin, size_t count, size_t width) {
  for (size_t i = 0; i < count; i += 16)
    for (size_t j = 0; j < width; j += 32) {
      __m512i v[16];
      for (int r = 0; r < 16; r++) v[r] = row_at(of, begin + i + r, j);
      turned(v);
      for (int r = 0; r < 16; r++) {
        _mm256_storeu_si256((__m256i *)(to + (j + 2 * r) * count + i), _mm512_cvtepi32_epi16(v[r]));
        _mm256_storeu_si256((__m256i *)(to + (j + 2 * r + 1) * count + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(v[r], 16)));
      }
    }
}

/* ---- products ----------------------------------------------------------------------------------------------------- */

typedef struct {
  uint8_t palette, row, zeros[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} tile_shapes;

typedef struct {
  tile_shapes shapes;
  unsigned rounding;
} settings;

/* Eight tiles of 16 rows of 64 bytes. In memory from the start: GCC believes that eight bytes of it are read. */
static const tile_shapes OURS = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* What this thread computes under from here on; another library may have had shapes of its own. */
static TILES settings begin(void) {
  settings before;
  before.rounding = _mm_getcsr();
  _mm_setcsr(before.rounding | 0x8040); /* numbers too small for the format are zeros: they take a hundred times as long */
  _tile_storeconfig(&before.shapes);
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&OURS);
  return before;
}

static TILES void end(const settings *before) {
  __asm__ volatile("" ::: "memory");
  if (before->shapes.palette) _tile_loadconfig(&before->shapes);
  else _tile_release();
  _mm_setcsr(before->rounding);
}

/* c = or += a b: a is (m, 32 steps), b is packed and has `steps` tiles for every 16 columns, c is (m, n) in fp32. */
static inline TILES void product(float *c, const bf16 *a, size_t a_apart, const bf16 *b, size_t m, size_t n, size_t steps, int adds) {
  const size_t a_bytes = a_apart * sizeof(bf16), c_bytes = n * sizeof(float), next = steps * TILE;
  for (size_t i = 0; i < m; i += SIDE)
    for (size_t j = 0; j < n; j += SIDE) {
      const bf16 *left = a + i * a_apart, *right = b + j / 16 * next;
      float *to = c + i * n + j;
      if (adds) {
        _tile_loadd(0, to, c_bytes);
        _tile_loadd(1, to + 16, c_bytes);
        _tile_loadd(2, to + 16 * n, c_bytes);
        _tile_loadd(3, to + 16 * n + 16, c_bytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (size_t s = 0; s < steps; s++) {
        _tile_loadd(4, left + 32 * s, a_bytes);
        _tile_loadd(6, right + TILE * s, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + next + TILE * s, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + 16 * a_apart + 32 * s, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, to, c_bytes);
      _tile_stored(1, to + 16, c_bytes);
      _tile_stored(2, to + 16 * n, c_bytes);
      _tile_stored(3, to + 16 * n + 16, c_bytes);
    }
}

/* ---- attention ------------------------------------------------------------------------------------------------------ */

/* One tensor of four dimensions: row, head, token and, one after the other, its numbers. */
typedef struct {
  bf16 *first;
  int64_t row, head, token; /* numbers from one to the next */
} tensor;

/* What compiled.py passes: its _Attention has the same fields. */
typedef struct {
  tensor query, key, value, output, grad_output, of_query, of_key, of_value;
  float *logarithms; /* (rows, heads, padded length): of the sums that probabilities were divided by, to base two */
  int64_t heads, groups, length, width;
  float scale;
  uint32_t causal, dropped; /* of 65,536 probabilities */
  uint64_t seed;
} attention;

static rows head_of(tensor of, const attention *a, size_t row, size_t head) {
  const rows found = {of.first + row * of.row + head * of.head, (size_t)of.token, (size_t)a->length, (size_t)a->width};
  return found;
}

static void *space(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

static inline VECTORS __mmask16 visible(const attention *a, size_t key, size_t query) { /* of 16 queries from this on */
  if (key >= (size_t)a->length) return 0;
  if (!a->causal || key <= query) return 0xffff;
  return key >= query + 16 ? 0 : (__mmask16)(0xffffu << (key - query));
}

/* (width, queries) in fp32, times a vector over queries -> tokens of a tensor. */
static VECTORS void put_turned(tensor to, const attention *a, size_t row, size_t head, size_t begin, const float *from, size_t queries, const float *times) {
  for (size_t q = 0; q < queries && begin + q < (size_t)a->length; q += 16) {
    const __m512 factor = _mm512_loadu_ps(times + q);
    for (size_t d = 0; d < (size_t)a->width; d += 16) {
      __m512i v[16];
      for (int i = 0; i < 16; i++) v[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(from + (d + i) * queries + q), factor));
      turned(v);
      const size_t left = (size_t)a->width - d, many = least(16, (size_t)a->length - begin - q);
      const __mmask16 there = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
      for (size_t i = 0; i < many; i++) {
        bf16 *at = to.first + row * to.row + head * to.head + (begin + q + i) * to.token + d;
        _mm256_mask_storeu_epi16(at, there, (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(v[i])));
      }
    }
  }
}

/* (tokens, padded width) in fp32, times a number -> tokens of a tensor. */
static VECTORS void put(tensor to, const attention *a, size_t row, size_t head, const float *from, size_t wide_by, float times) {
  for (size_t t = 0; t < (size_t)a->length; t++)
    for (size_t d = 0; d < (size_t)a->width; d += 16) {
      const size_t left = (size_t)a->width - d;
      const __mmask16 there = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
      const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(from + t * wide_by + d), _mm512_set1_ps(times));
      _mm256_mask_storeu_epi16(to.first + row * to.row + head * to.head + t * to.token + d, there, (__m256i)_mm512_cvtneps_pbh(value));
    }
}

static inline uint64_t place(const attention *a, size_t row, size_t head, size_t key, size_t query) {
  const uint64_t padded = rounded((size_t)a->length);
  return ((row * (uint64_t)a->heads + head) * padded + key) * (padded / 32) + query / 32;
}

static inline VECTORS __mmask32 lives_at(const attention *a, uint64_t at) {
  return _mm512_cmpge_epu16_mask(random_at(a->seed, at), _mm512_set1_epi16((short)a->dropped));
}

/* Probabilities of 32 queries and `keys` keys, not yet divided by their sums, as a second factor that sums over keys. */
static TILES void soften(const attention *a, const float *scores, size_t apart, size_t keys, size_t from_key, size_t from_query,
                         uint64_t at, float *largest, float *sums, float *shrunk, bf16 *probabilities) {
  const __m512 scale = _mm512_set1_ps(a->scale * 1.44269504088896340736f), never = _mm512_set1_ps(-1e30f);
  const int all = from_key + keys <= (size_t)a->length && (!a->causal || from_key + keys <= from_query + 1);
  const uint64_t down = rounded((size_t)a->length) / 32;
  const size_t steps = keys / 32;
  __m512 m[2], before[2], sum[2];
  for (int h = 0; h < 2; h++) {
    m[h] = before[h] = _mm512_loadu_ps(largest + 16 * h);
    for (size_t k = 0; k < keys; k++) {
      const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + k * apart + 16 * h), scale);
      const __mmask16 seen = all ? 0xffff : visible(a, from_key + k, from_query + 16 * h);
      m[h] = _mm512_mask_max_ps(m[h], seen, m[h], score);
    }
    const __m512 factor = power(_mm512_sub_ps(before[h], m[h]));
    sum[h] = _mm512_mul_ps(_mm512_loadu_ps(sums + 16 * h), factor);
    _mm512_storeu_ps(largest + 16 * h, m[h]);
    _mm512_storeu_ps(shrunk + 16 * h, factor);
  }
  for (size_t k = 0; k < keys; k += 2) {
    __m512 p[2][2];
    for (int r = 0; r < 2; r++)
      for (int h = 0; h < 2; h++) {
        __m512 score = _mm512_fmsub_ps(_mm512_loadu_ps(scores + (k + r) * apart + 16 * h), scale, m[h]);
        if (!all) score = _mm512_mask_mov_ps(never, visible(a, from_key + k + r, from_query + 16 * h), score);
        p[r][h] = power(score);
        sum[h] = _mm512_add_ps(sum[h], p[r][h]);
      }
    if (a->dropped)
      for (int r = 0; r < 2; r++) {
        const __mmask32 lives = lives_at(a, at + (k + r) * down);
        p[r][0] = _mm512_maskz_mov_ps((__mmask16)lives, p[r][0]);
        p[r][1] = _mm512_maskz_mov_ps((__mmask16)(lives >> 16), p[r][1]);
      }
    for (int h = 0; h < 2; h++)
      _mm512_storeu_si512(probabilities + (h * steps + k / 32) * TILE + k % 32 * 16, alternating((__m512i)_mm512_cvtne2ps_pbh(p[1][h], p[0][h])));
  }
  for (int h = 0; h < 2; h++) _mm512_storeu_ps(sums + 16 * h, sum[h]);
}

/* Output and logarithms of some pairs (row, key-value head), counted together. Returns 0, or -1 without memory. */
TILES int offsite_attend(const attention *a, int64_t first, int64_t last) {
  const size_t length = rounded((size_t)a->length), width = rounded((size_t)a->width), each = (size_t)(a->heads / a->groups);
  bf16 *keys = space(length * width * 2), *values = space((length + BLOCK) * width * 2);
  bf16 *queries = space(BLOCK * width * 2), *probabilities = space(BLOCK * BLOCK * 2);
  float *scores = space(BLOCK * BLOCK * 4), *sum = space(width * BLOCK * 4);
  const int fits = keys && values && queries && probabilities && scores && sum;
  const settings before = begin();
  for (int64_t pair = first; fits && pair < last; pair++) {
    const size_t row = (size_t)(pair / a->groups), group = (size_t)(pair % a->groups);
    as_rows(keys, head_of(a->key, a, row, group), length, width);
    for (size_t k = 0; k < length; k += BLOCK)
      as_turned(values + k * width, head_of(a->value, a, row, group), k, least(BLOCK, length - k), width);
    for (size_t head = group * each; head < (group + 1) * each; head++)
      for (size_t q = 0; q < length; q += BLOCK) {
        const size_t many = least(BLOCK, length - q), until = a->causal ? q + many : length;
        float largest[BLOCK], sums[BLOCK], shrunk[BLOCK];
        for (int i = 0; i < BLOCK; i++) largest[i] = -1e30f, sums[i] = 0;
        as_columns(queries, head_of(a->query, a, row, head), q, many, width);
        for (size_t k = 0; k < until; k += BLOCK) {
          const size_t seen = least(BLOCK, until - k);
          product(scores, keys + k * width, width, queries, seen, many, width / 32, 0);
          for (size_t h = 0; h < many; h += 32)
            soften(a, scores + h, many, seen, k, q + h, place(a, row, head, k, q + h), largest + h, sums + h, shrunk + h,
                   probabilities + h * seen);
          if (k)
            for (size_t h = 0; h < many; h += 16) {
              const __m512 factor = _mm512_loadu_ps(shrunk + h);
              if (_mm512_cmpneq_ps_mask(factor, _mm512_set1_ps(1.0f)))
                for (size_t d = 0; d < width; d++)
                  _mm512_storeu_ps(sum + d * many + h, _mm512_mul_ps(_mm512_loadu_ps(sum + d * many + h), factor));
            }
          product(sum, values + k * width, least(BLOCK, length - k), probabilities, width, many, seen / 32, k > 0);
        }
        float *logarithms = a->logarithms + (row * (size_t)a->heads + head) * length + q;
        const __m512 kept = _mm512_set1_ps(65536.0f / (65536.0f - (float)a->dropped));
        for (size_t h = 0; h < many; h += 16) {
          const __m512 total = _mm512_loadu_ps(sums + h);
          _mm512_storeu_ps(logarithms + h, _mm512_add_ps(_mm512_loadu_ps(largest + h), logarithm(total)));
          _mm512_storeu_ps(shrunk + h, _mm512_div_ps(kept, total));
        }
        put_turned(a->output, a, row, head, q, sum, many, shrunk);
      }
  }
  end(&before);
  free(keys), free(values), free(queries), free(probabilities), free(scores), free(sum);
  return fits ? 0 : -1;
}

/* For every query the sum over its width of output times gradient; zero behind the last. */
static VECTORS void sums_over_width(float *to, rows output, rows grad_output, size_t length) {
  for (size_t t = 0; t < length; t++) {
    __m512 sum = _mm512_setzero_ps();
    for (size_t d = 0; d < output.width; d += 32) {
      const __m512i one = row_at(output, t, d), two = row_at(grad_output, t, d);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)one, (__m512bh)two);
    }
    to[t] = _mm512_reduce_add_ps(sum);
  }
}

/* Probabilities of 32 queries again, and the gradient of their scores, keys in rows; of the latter also as a second factor. */
static TILES void soften_back(const attention *a, const float *scores, const float *of_probabilities, size_t apart, size_t keys, size_t from_key,
                              size_t from_query, uint64_t at, const float *logarithms, const float *deltas, bf16 *probabilities,
                              bf16 *slopes, bf16 *slope_pairs) {
  const __m512 scale = _mm512_set1_ps(a->scale * 1.44269504088896340736f), never = _mm512_set1_ps(-1e30f);
  const __m512 kept = _mm512_set1_ps(65536.0f / (65536.0f - (float)a->dropped));
  const int all = from_key + keys <= (size_t)a->length && (!a->causal || from_key + keys <= from_query + 1);
  const uint64_t down = rounded((size_t)a->length) / 32;
  const size_t steps = keys / 32;
  const __m512 log[2] = {_mm512_loadu_ps(logarithms), _mm512_loadu_ps(logarithms + 16)};
  const __m512 delta[2] = {_mm512_loadu_ps(deltas), _mm512_loadu_ps(deltas + 16)};
  for (size_t k = 0; k < keys; k += 2) {
    __m512 slope[2][2];
    for (int r = 0; r < 2; r++) {
      const __mmask32 lives = a->dropped ? lives_at(a, at + (k + r) * down) : 0xffffffffu;
      __m512 p[2];
      for (int h = 0; h < 2; h++) {
        const __mmask16 stays = (__mmask16)(lives >> 16 * h);
        __m512 score = _mm512_fmsub_ps(_mm512_loadu_ps(scores + (k + r) * apart + 16 * h), scale, log[h]);
        if (!all) score = _mm512_mask_mov_ps(never, visible(a, from_key + k + r, from_query + 16 * h), score);
        p[h] = power(score);
        const __m512 come = _mm512_maskz_loadu_ps(stays, of_probabilities + (k + r) * apart + 16 * h);
        slope[r][h] = _mm512_mul_ps(p[h], _mm512_fmsub_ps(come, kept, delta[h]));
        p[h] = _mm512_maskz_mov_ps(stays, p[h]);
      }
      _mm512_storeu_si512(probabilities + (k + r) * apart, (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]));
      _mm512_storeu_si512(slopes + (k + r) * apart, (__m512i)_mm512_cvtne2ps_pbh(slope[r][1], slope[r][0]));
    }
    for (int h = 0; h < 2; h++)
      _mm512_storeu_si512(slope_pairs + (h * steps + k / 32) * TILE + k % 32 * 16,
                          alternating((__m512i)_mm512_cvtne2ps_pbh(slope[1][h], slope[0][h])));
  }
}

/* Gradients of some pairs (row, key-value head). Returns 0, or -1 without memory. */
TILES int offsite_attend_back(const attention *a, int64_t first, int64_t last) {
  const size_t length = rounded((size_t)a->length), width = rounded((size_t)a->width), each = (size_t)(a->heads / a->groups);
  const size_t all = length * width;
  bf16 *keys = space(all * 2), *values = space(all * 2), *turned_keys = space(all * 2);
  bf16 *query_columns = space(BLOCK * width * 2), *grad_columns = space(BLOCK * width * 2);
  bf16 *query_pairs = space(BLOCK * width * 2), *grad_pairs = space(BLOCK * width * 2);
  bf16 *probabilities = space(BLOCK * BLOCK * 2), *slopes = space(BLOCK * BLOCK * 2), *slope_pairs = space(BLOCK * BLOCK * 2);
  float *scores = space(BLOCK * BLOCK * 4), *of_probabilities = space(BLOCK * BLOCK * 4), *of_queries = space(width * BLOCK * 4);
  float *of_keys = space(all * 4), *of_values = space(all * 4), *deltas = space(length * 4);
  void *taken[] = {keys, values, turned_keys, query_columns, grad_columns, query_pairs, grad_pairs, probabilities,
                   slopes, slope_pairs, scores, of_probabilities, of_queries, of_keys, of_values, deltas};
  int fits = 1;
  for (size_t i = 0; i < sizeof(taken) / sizeof(*taken); i++) fits = fits && taken[i];
  const settings before = begin();
  float scales[BLOCK];
  for (int i = 0; i < BLOCK; i++) scales[i] = a->scale;
  for (int64_t pair = first; fits && pair < last; pair++) {
    const size_t row = (size_t)(pair / a->groups), group = (size_t)(pair % a->groups);
    const rows key = head_of(a->key, a, row, group);
    as_rows(keys, key, length, width);
    as_rows(values, head_of(a->value, a, row, group), length, width);
    for (size_t k = 0; k < length; k += BLOCK) as_turned(turned_keys + k * width, key, k, least(BLOCK, length - k), width);
    memset(of_keys, 0, all * 4);
    memset(of_values, 0, all * 4);
    for (size_t head = group * each; head < (group + 1) * each; head++) {
      const rows query = head_of(a->query, a, row, head), grad_output = head_of(a->grad_output, a, row, head);
      const float *logarithms = a->logarithms + (row * (size_t)a->heads + head) * length;
      sums_over_width(deltas, head_of(a->output, a, row, head), grad_output, length);
      for (size_t q = 0; q < length; q += BLOCK) {
        const size_t many = least(BLOCK, length - q), until = a->causal ? q + many : length;
        as_columns(query_columns, query, q, many, width);
        as_columns(grad_columns, grad_output, q, many, width);
        as_pairs(query_pairs, query, q, many, width);
        as_pairs(grad_pairs, grad_output, q, many, width);
        for (size_t k = 0; k < until; k += BLOCK) {
          const size_t seen = least(BLOCK, until - k);
          product(scores, keys + k * width, width, query_columns, seen, many, width / 32, 0);
          product(of_probabilities, values + k * width, width, grad_columns, seen, many, width / 32, 0);
          for (size_t h = 0; h < many; h += 32)
            soften_back(a, scores + h, of_probabilities + h, many, seen, k, q + h, place(a, row, head, k, q + h), logarithms + q + h,
                        deltas + q + h, probabilities + h, slopes + h, slope_pairs + h * seen);
          product(of_values + k * width, probabilities, many, grad_pairs, seen, width, many / 32, 1);
          product(of_keys + k * width, slopes, many, query_pairs, seen, width, many / 32, 1);
          product(of_queries, turned_keys + k * width, least(BLOCK, length - k), slope_pairs, width, many, seen / 32, k > 0);
        }
        put_turned(a->of_query, a, row, head, q, of_queries, many, scales);
      }
    }
    put(a->of_key, a, row, group, of_keys, width, a->scale);
    put(a->of_value, a, row, group, of_values, width, 65536.0f / (65536.0f - (float)a->dropped));
  }
  end(&before);
  for (size_t i = 0; i < sizeof(taken) / sizeof(*taken); i++) free(taken[i]);
  return fits ? 0 : -1;
}

/* ---- activations and norms ------------------------------------------------------------------------------------------- */

static inline VECTORS __mmask16 up_to(int64_t left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

static inline VECTORS __m512 wide_at(const bf16 *from, __mmask16 there) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from)), 16));
}

static inline VECTORS void narrow_at(bf16 *to, __mmask16 there, __m512 given) {
  _mm256_mask_storeu_epi16(to, there, (__m256i)_mm512_cvtneps_pbh(given));
}

static inline VECTORS __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, power(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504088896340736f)))));
}

/* Tanh-GELU is x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3). */
static inline VECTORS __m512 twice_u(__m512 x) {
  const __m512 cube = _mm512_set1_ps(2 * 0.7978845608028654f * 0.044715f), line = _mm512_set1_ps(2 * 0.7978845608028654f);
  return _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_mul_ps(x, x), cube, line));
}

VECTORS void offsite_gelu(bf16 *to, const bf16 *from, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += 16) {
    const __mmask16 there = up_to(last - i);
    const __m512 x = wide_at(from + i, there);
    narrow_at(to + i, there, _mm512_mul_ps(x, sigmoid(twice_u(x))));
  }
}

VECTORS void offsite_gelu_back(bf16 *to, const bf16 *grad_output, const bf16 *from, int64_t first, int64_t last) {
  const __m512 cube = _mm512_set1_ps(6 * 0.7978845608028654f * 0.044715f), line = _mm512_set1_ps(2 * 0.7978845608028654f);
  for (int64_t i = first; i < last; i += 16) {
    const __mmask16 there = up_to(last - i);
    const __m512 x = wide_at(from + i, there), s = sigmoid(twice_u(x));
    const __m512 steep = _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_mul_ps(x, x), cube, line)); /* x d(2 u) / dx */
    const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(steep, s), _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
    narrow_at(to + i, there, _mm512_mul_ps(wide_at(grad_output + i, there), slope));
  }
}

/* silu(gate) up */
VECTORS void offsite_gated(bf16 *to, const bf16 *gate, const bf16 *up, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i += 16) {
    const __mmask16 there = up_to(last - i);
    const __m512 x = wide_at(gate + i, there);
    narrow_at(to + i, there, _mm512_mul_ps(_mm512_mul_ps(x, sigmoid(x)), wide_at(up + i, there)));
  }
}

VECTORS void offsite_gated_back(bf16 *of_gate, bf16 *of_up, const bf16 *grad_output, const bf16 *gate, const bf16 *up, int64_t first, int64_t last) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = first; i < last; i += 16) {
    const __mmask16 there = up_to(last - i);
    const __m512 x = wide_at(gate + i, there), come = wide_at(grad_output + i, there), s = sigmoid(x);
    const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one));
    narrow_at(of_up + i, there, _mm512_mul_ps(come, _mm512_mul_ps(x, s)));
    narrow_at(of_gate + i, there, _mm512_mul_ps(_mm512_mul_ps(come, wide_at(up + i, there)), slope));
  }
}

/* Tokens' RMS norms, with one number for each that the way back needs; rounded before the weight, as families do. */
VECTORS void offsite_normed(bf16 *to, float *scales, const bf16 *from, const bf16 *weight, int64_t width, float epsilon, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; t++) {
    const bf16 *row = from + t * width;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
      const __m512 x = wide_at(row + i, up_to(width - i));
      squares = _mm512_fmadd_ps(x, x, squares);
    }
    scales[t] = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / (float)width + epsilon);
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 there = up_to(width - i);
      bf16 rounded_first[16];
      narrow(rounded_first, _mm512_mul_ps(wide_at(row + i, there), _mm512_set1_ps(scales[t])));
      narrow_at(to + t * width + i, there, _mm512_mul_ps(wide(rounded_first), wide_at(weight + i, there)));
    }
  }
}

VECTORS void offsite_normed_back(bf16 *to, const bf16 *grad_output, const float *scales, const bf16 *from, const bf16 *weight, int64_t width, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; t++) {
    const bf16 *row = from + t * width, *come = grad_output + t * width;
    const __m512 scale = _mm512_set1_ps(scales[t]);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 there = up_to(width - i);
      sum = _mm512_fmadd_ps(_mm512_mul_ps(wide_at(come + i, there), wide_at(weight + i, there)), wide_at(row + i, there), sum);
    }
    /* what a longer x would change alone, in units of x */
    const __m512 along = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)width), _mm512_mul_ps(scale, scale));
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 there = up_to(width - i);
      const __m512 slope = _mm512_mul_ps(wide_at(come + i, there), wide_at(weight + i, there));
      narrow_at(to + t * width + i, there, _mm512_mul_ps(_mm512_fnmadd_ps(wide_at(row + i, there), along, slope), scale));
    }
  }
}

/* ---- the loss -------------------------------------------------------------------------------------------------------------- */

/* Nats of each row's label; if asked, its logits become d nats / d logits in place. */
VECTORS void offsite_softmax(bf16 *logits, float *nats, const int64_t *labels, int64_t width, int slopes, int64_t first, int64_t last) {
  const __m512 base = _mm512_set1_ps(1.44269504088896340736f), lowest = _mm512_set1_ps(-__builtin_inff());
  for (int64_t t = first; t < last; t++) {
    bf16 *row = logits + t * width;
    __m512 largest = lowest, sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 there = up_to(width - i);
      largest = _mm512_mask_max_ps(largest, there, largest, wide_at(row + i, there));
    }
    const __m512 shift = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(largest)), base);
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 there = up_to(width - i);
      sum = _mm512_mask_add_ps(sum, there, sum, power(_mm512_fmsub_ps(wide_at(row + i, there), base, shift)));
    }
    const __m512 logarithms = _mm512_add_ps(shift, _mm512_set1_ps(__builtin_log2f(_mm512_reduce_add_ps(sum))));
    float label[16];
    _mm512_storeu_ps(label, wide_at(row + labels[t], 1));
    nats[t] = _mm512_cvtss_f32(logarithms) * 0.69314718055994530942f - label[0];
    if (!slopes) continue;
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 there = up_to(width - i);
      const __m512 probability = power(_mm512_fmsub_ps(wide_at(row + i, there), base, logarithms));
      const int64_t at = labels[t] - i;
      const __mmask16 is_label = at >= 0 && at < 16 ? (__mmask16)(1u << at) : 0;
      narrow_at(row + i, there, _mm512_mask_sub_ps(probability, is_label, probability, _mm512_set1_ps(1.0f)));
    }
  }
}

#else

int offsite_kernels(int version) { return (void)version, 0; }

#endif
