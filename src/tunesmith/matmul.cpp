// Products of fp32 matrices from products of bf16 ones: x = high + low, two halves of 8 bits each, so x y = high high + low high + high low, and
// what is left out is 2^-16 of it at most. By AMX, whose tiles multiply bf16 and add up in fp32. And attention by them, to keys that
// all queries see. Compiled when first used, by matmul.py.
#include <cstdint>

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__linux__)
#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

namespace {

// A tile is 16 rows of 64 bytes: of the left operand 16 lanes (its rows) of 32 numbers each, of the right one 16 pairs of depths, for 16 lanes
// (its columns) each. Beside each tile of high halves lies that of the low ones.
constexpr int64_t TILE = 1024, LANES = 16, STEP = 32;
// Of the left operand so much is packed at a time, 1.5 MB, which a core's own cache holds; of the right one two tiles across.
constexpr int64_t DEEP = 768, TALL = 512, WIDE = 2 * LANES;

struct alignas(64) Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const Configuration CONFIGURATION;

int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

__mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

// 16 x 16 numbers of 32 bits.
inline void transpose(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 16; i += 8)
    for (int j = i; j < i + 4; j++) {
      t[j] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
      t[j + 4] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
    }
  for (int j = 0; j < 8; j++) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// Sixteen numbers rounded to bf16, each in the lower half of 32 bits; shifted up by 16 they are fp32 again.
inline __m512i halves(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }
inline __m512 whole(__m512i low_half) { return (__m512)_mm512_slli_epi32(low_half, 16); }

// A register a lane, of `depth` <= 32 numbers that lie one after the other, lanes `step` apart: pairs of bf16.
inline void read_lanes(const float* x, int64_t step, int64_t lanes, int64_t depth, __m512i* high, __m512i* low) {
  const __mmask16 near = first(depth), far = first(depth - 16);
  for (int64_t i = 0; i < LANES; i++) {
    if (i >= lanes) {
      high[i] = low[i] = _mm512_setzero_si512();
      continue;
    }
    const __m512 a = _mm512_maskz_loadu_ps(near, x + i * step), b = _mm512_maskz_loadu_ps(far, x + i * step + 16);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const __m512 of_a = whole(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)));
    const __m512 of_b = whole(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)));
    high[i] = both;
    low[i] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(b, of_b), _mm512_sub_ps(a, of_a));
  }
}

// A register a pair of depths, of lanes that lie one after the other, depths `step` apart.
inline void read_depths(const float* x, int64_t step, int64_t lanes, int64_t depth, __m512i* high, __m512i* low) {
  const __mmask16 there = first(lanes);
  for (int64_t p = 0; p < 16; p++) {
    const __m512 a = 2 * p < depth ? _mm512_maskz_loadu_ps(there, x + 2 * p * step) : _mm512_setzero_ps();
    const __m512 b = 2 * p + 1 < depth ? _mm512_maskz_loadu_ps(there, x + (2 * p + 1) * step) : _mm512_setzero_ps();
    const __m512i of_a = halves(a), of_b = halves(b);
    high[p] = _mm512_or_si512(of_a, _mm512_slli_epi32(of_b, 16));
    low[p] = _mm512_or_si512(halves(_mm512_sub_ps(a, whole(of_a))), _mm512_slli_epi32(halves(_mm512_sub_ps(b, whole(of_b))), 16));
  }
}

// A tile of high halves and one of low ones, of at most 16 lanes and 32 depths; what is not there is 0.
inline void pack(const float* x, int64_t lane_step, int64_t depth_step, int64_t lanes, int64_t depth, bool is_right, char* to) {
  __m512i high[16], low[16];
  const bool by_lanes = depth_step == 1;
  if (by_lanes)
    read_lanes(x, lane_step, lanes, depth, high, low);
  else
    read_depths(x, depth_step, lanes, depth, high, low);
  if (by_lanes == is_right) {
    transpose(high);
    transpose(low);
  }
  for (int i = 0; i < 16; i++) {
    _mm512_store_si512(to + 64 * i, high[i]);
    _mm512_store_si512(to + TILE + 64 * i, low[i]);
  }
}

// sums [16 or 32, 32] = one or two groups of 16 lanes, `next` bytes apart, times two tiles across: 4 accumulators, 4 tiles for operands.
template <int GROUPS>
inline void multiply(const char* left, int64_t next, const char* right, int64_t steps, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  if (GROUPS > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (const char* end = right + steps * 4 * TILE; right < end; left += 2 * TILE, right += 4 * TILE) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + 2 * TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (GROUPS > 1) {
      _tile_loadd(5, left + next, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_loadd(4, left + TILE, 64);  // low, high
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (GROUPS > 1) {
      _tile_loadd(4, left + next + TILE, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 7);
    }
    _tile_loadd(6, right + TILE, 64);  // high, low
    _tile_loadd(7, right + 3 * TILE, 64);
    if (GROUPS > 1) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_loadd(4, left, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, sums, 4 * WIDE);
  _tile_stored(1, sums + LANES, 4 * WIDE);
  if (GROUPS > 1) {
    _tile_stored(2, sums + LANES * WIDE, 4 * WIDE);
    _tile_stored(3, sums + LANES * WIDE + LANES, 4 * WIDE);
  }
}

struct Matrix {
  const float* at;
  int64_t row, column;  // steps between rows and between columns; one of them is 1
  const float* from(int64_t i, int64_t j) const { return at + i * row + j * column; }
};

// One of the products that are added up: [m, depth] and [depth, n].
struct Term {
  Matrix left, right;
  int64_t depth;
};

// 32 depths of a term, or what it has left.
struct Step {
  const Term* term;
  int64_t depth;
  int64_t left_over() const { return term->depth - depth; }
  Step after() const { return left_over() > STEP ? Step{term, depth + STEP} : Step{term + 1, 0}; }
};

// What a thread packs, for as long as it lives.
struct Room {
  char* at = nullptr;
  int64_t size = 0;
  char* of(int64_t bytes) {
    if (size < bytes) {
      std::free(at);
      at = static_cast<char*>(std::aligned_alloc(64, rounded_up(bytes, 64)));
      size = bytes;
    }
    return at;
  }
  ~Room() { std::free(at); }
};
thread_local Room room;

// to = beta to + alpha sums, of which `rows` and `columns` count. beta 0 reads nothing.
void put(const float* sums, float* to, int64_t step, int64_t rows, int64_t columns, float alpha, float beta) {
  const __mmask16 near = first(columns), far = first(columns - 16);
  const __m512 a = _mm512_set1_ps(alpha), b = _mm512_set1_ps(beta);
  for (int64_t i = 0; i < rows; i++, to += step, sums += WIDE) {
    __m512 x = _mm512_mul_ps(a, _mm512_load_ps(sums)), y = _mm512_mul_ps(a, _mm512_load_ps(sums + 16));
    if (beta != 0) {
      x = _mm512_fmadd_ps(b, _mm512_maskz_loadu_ps(near, to), x);
      y = _mm512_fmadd_ps(b, _mm512_maskz_loadu_ps(far, to + 16), y);
    }
    _mm512_mask_storeu_ps(to, near, x);
    _mm512_mask_storeu_ps(to + 16, far, y);
  }
}

// A thread's share of out = beta out + alpha (the sum of all terms): rows from `row` and columns from `column` on, of which there are m and n.
void share(const Term* terms, int64_t count, float* out, int64_t step, int64_t row, int64_t column, int64_t m, int64_t n, float alpha, float beta) {
  char *const lefts = room.of(DEEP * (TALL + WIDE) * 4), *const rights = lefts + DEEP * TALL * 4;
  alignas(64) float sums[2 * LANES * WIDE];
  Step at[DEEP / STEP];
  int64_t all = 0;
  for (int64_t t = 0; t < count; t++) all += (terms[t].depth + STEP - 1) / STEP;
  const int64_t cuts = (all * STEP + DEEP - 1) / DEEP, most = (all + cuts - 1) / cuts;
  Step next_step = {terms, 0};
  out += row * step + column;
  for (int64_t done = 0; done < all; done += most) {
    const int64_t steps = std::min(most, all - done), next = steps * 2 * TILE;
    for (int64_t s = 0; s < steps; s++, next_step = next_step.after()) at[s] = next_step;
    for (int64_t top = 0; top < m; top += TALL) {
      const int64_t tall = std::min(TALL, m - top);
      for (int64_t i = 0; i < tall; i += LANES)
        for (int64_t s = 0; s < steps; s++) {
          const Matrix& left = at[s].term->left;
          pack(left.from(row + top + i, at[s].depth), left.row, left.column, tall - i, at[s].left_over(), false, lefts + i / LANES * next + s * 2 * TILE);
        }
      for (int64_t j = 0; j < n; j += WIDE) {
        for (int64_t half = 0; half < 2; half++)  // one that is not there is multiplied all the same, and not put anywhere
          for (int64_t s = 0; s < steps && j + half * LANES < n; s++) {
            const Matrix& right = at[s].term->right;
            pack(right.from(at[s].depth, column + j + half * LANES), right.column, right.row, n - j - half * LANES, at[s].left_over(), true,
                 rights + s * 4 * TILE + half * 2 * TILE);
          }
        for (int64_t i = 0; i < tall; i += 2 * LANES) {
          const char* const packed = lefts + i / LANES * next;
          if (i + LANES < tall)
            multiply<2>(packed, next, rights, steps, sums);
          else
            multiply<1>(packed, next, rights, steps, sums);
          put(sums, out + (top + i) * step + j, step, std::min(2 * LANES, tall - i), std::min(WIDE, n - j), alpha, done ? 1.0f : beta);
        }
      }
    }
  }
}

// --- attention to keys that all queries see ------------------------------------------------------------------------

// A block of scores at a time, 128 KB, which never leaves a core's own cache: queries by keys.
constexpr int64_t QUERIES = 64, KEYS = 512;

int64_t steps_of(int64_t depth) { return (depth + STEP - 1) / STEP; }

// All of a left operand [lanes, depth]: groups of 16 lanes, each of all steps.
void pack_left(Matrix x, int64_t lanes, int64_t depth, char* to) {
  for (int64_t i = 0; i < lanes; i += LANES)
    for (int64_t s = 0; s < depth; s += STEP, to += 2 * TILE) pack(x.from(i, s), x.row, x.column, lanes - i, depth - s, false, to);
}

// All of a right operand [depth, columns]: two tiles across, each of all steps.
void pack_right(Matrix x, int64_t depth, int64_t columns, char* to) {
  for (int64_t j = 0; j < columns; j += WIDE)
    for (int64_t s = 0; s < depth; s += STEP)
      for (int64_t half = 0; half < 2; half++, to += 2 * TILE)  // what is not there is 0
        pack(x.from(s, j + half * LANES), x.column, x.row, std::max<int64_t>(0, columns - j - half * LANES), depth - s, true, to);
}

// out = beta out + alpha left right, of packed operands.
void multiply_packed(const char* left, const char* right, float* out, int64_t step, int64_t m, int64_t n, int64_t depth, float alpha, float beta) {
  alignas(64) float sums[2 * LANES * WIDE];
  const int64_t steps = steps_of(depth), next = steps * 2 * TILE;
  for (int64_t j = 0; j < n; j += WIDE, right += steps * 4 * TILE)
    for (int64_t i = 0; i < m; i += 2 * LANES) {
      if (i + LANES < m)
        multiply<2>(left + i / LANES * next, next, right, steps, sums);
      else
        multiply<1>(left + i / LANES * next, next, right, steps, sums);
      put(sums, out + i * step + j, step, std::min(2 * LANES, m - i), std::min(WIDE, n - j), alpha, beta);
    }
}

// e^x to two units in the last place, by 2^n e^r with |r| <= ln 2 / 2 and a polynomial of degree 7 (Cephes' expf).
inline __m512 exponential(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
  for (const float term : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(term));
  sum = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(sum, r), r, r), _mm512_set1_ps(1));
  return _mm512_scalef_ps(sum, n);
}

// A key head's part: queries and what belongs to them [rows, d], keys and values [keys, d], each with d numbers side by side.
struct Head {
  const float *q, *k, *v;
  int64_t rows, keys, d;
  float factor;
};

// Softmax so far of one more block of scores [1, keys]: they become shares of the largest yet, by which `sum` and out [d] are kept up too.
void take_up(float* scores, int64_t keys, float factor, float& most, float& sum, float* out, int64_t d) {
  const __m512 by = _mm512_set1_ps(factor);
  __m512 largest = _mm512_set1_ps(most), total = _mm512_setzero_ps();
  for (int64_t i = 0; i < keys; i += 16) {
    const __mmask16 there = first(keys - i);
    const __m512 x = _mm512_mul_ps(by, _mm512_maskz_loadu_ps(there, scores + i));
    largest = _mm512_mask_max_ps(largest, there, largest, x);
  }
  const float now = _mm512_reduce_max_ps(largest);
  const __m512 minus = _mm512_set1_ps(-now);
  for (int64_t i = 0; i < keys; i += 16) {
    const __mmask16 there = first(keys - i);
    const __m512 x = _mm512_maskz_mov_ps(there, exponential(_mm512_fmadd_ps(by, _mm512_maskz_loadu_ps(there, scores + i), minus)));
    total = _mm512_add_ps(total, x);
    _mm512_mask_storeu_ps(scores + i, there, x);
  }
  const float shrunk = std::exp(most - now);
  most = now;
  sum = sum * shrunk + _mm512_reduce_add_ps(total);
  if (shrunk != 1)
    for (int64_t i = 0; i < d; i++) out[i] *= shrunk;
}

// out [rows, d] and the log sum exp of each row's scores, for rows `from` to `to`.
void attend(const Head& head, int64_t from, int64_t to, float* out, float* sums) {
  const int64_t d = head.d, wide = rounded_up(d, WIDE);
  char* const keys = room.of((2 * KEYS * wide + QUERIES * wide + QUERIES * KEYS + QUERIES * KEYS) * 4);
  char *const values = keys + KEYS * wide * 4, *const queries = values + KEYS * wide * 4, *const shares = queries + QUERIES * wide * 4;
  float* const scores = reinterpret_cast<float*>(shares + QUERIES * KEYS * 4);
  std::vector<float> most(to - from, -1e30f), sum(to - from, 0.0f);
  std::fill(out + from * d, out + to * d, 0.0f);
  for (int64_t j = 0; j < head.keys; j += KEYS) {
    const int64_t here = std::min(KEYS, head.keys - j);
    pack_right({head.k + j * d, 1, d}, d, here, keys);
    pack_right({head.v + j * d, d, 1}, here, d, values);
    for (int64_t i = from; i < to; i += QUERIES) {
      const int64_t rows = std::min(QUERIES, to - i);
      pack_left({head.q + i * d, d, 1}, rows, d, queries);
      multiply_packed(queries, keys, scores, KEYS, rows, here, d, 1, 0);
      for (int64_t r = 0; r < rows; r++) take_up(scores + r * KEYS, here, head.factor, most[i - from + r], sum[i - from + r], out + (i + r) * d, d);
      pack_left({scores, KEYS, 1}, rows, here, shares);
      multiply_packed(shares, values, out + i * d, d, rows, d, here, 1, 1);
    }
  }
  for (int64_t i = from; i < to; i++) {
    for (int64_t c = 0; c < d; c++) out[i * d + c] /= sum[i - from];
    sums[i] = most[i - from] + std::log(sum[i - from]);
  }
}

// Scores become shares by the log sum exp, and the gradients to shares those to scores.
void back_up(float* scores, float* of_shares, int64_t keys, float factor, float sum, float drift) {
  const __m512 by = _mm512_set1_ps(factor), minus = _mm512_set1_ps(-sum), less = _mm512_set1_ps(drift);
  for (int64_t i = 0; i < keys; i += 16) {
    const __mmask16 there = first(keys - i);
    const __m512 share = exponential(_mm512_fmadd_ps(by, _mm512_maskz_loadu_ps(there, scores + i), minus));
    _mm512_mask_storeu_ps(scores + i, there, share);
    _mm512_mask_storeu_ps(of_shares + i, there, _mm512_mul_ps(share, _mm512_sub_ps(_mm512_maskz_loadu_ps(there, of_shares + i), less)));
  }
}

// The gradients to queries [rows, d], and of these rows those to keys and values [keys, d] where of_k is given.
void attend_back(const Head& head, int64_t from, int64_t to, const float* of_out, const float* sums, const float* drift, float* of_q, float* of_k,
                 float* of_v) {
  const int64_t d = head.d, wide = rounded_up(d, WIDE);
  char* const keys = room.of((3 * KEYS * wide + 4 * QUERIES * wide + 4 * QUERIES * KEYS) * 4);
  char *const values = keys + KEYS * wide * 4, *const across = values + KEYS * wide * 4, *const queries = across + KEYS * wide * 4;
  char *const given = queries + QUERIES * wide * 4, *const queries_too = given + QUERIES * wide * 4, *const given_too = queries_too + QUERIES * wide * 4;
  char *const packed = given_too + QUERIES * wide * 4, *const turned = packed + QUERIES * KEYS * 4;
  float* const scores = reinterpret_cast<float*>(turned + QUERIES * KEYS * 4);
  float* const of_scores = scores + QUERIES * KEYS;
  for (int64_t j = 0; j < head.keys; j += KEYS) {
    const int64_t here = std::min(KEYS, head.keys - j);
    pack_right({head.k + j * d, 1, d}, d, here, keys);
    pack_right({head.v + j * d, 1, d}, d, here, values);
    pack_right({head.k + j * d, d, 1}, here, d, across);
    for (int64_t i = from; i < to; i += QUERIES) {
      const int64_t rows = std::min(QUERIES, to - i);
      const Matrix q = {head.q + i * d, d, 1}, of = {of_out + i * d, d, 1};
      pack_left(q, rows, d, queries);
      pack_left(of, rows, d, given);
      multiply_packed(queries, keys, scores, KEYS, rows, here, d, 1, 0);
      multiply_packed(given, values, of_scores, KEYS, rows, here, d, 1, 0);
      for (int64_t r = 0; r < rows; r++) back_up(scores + r * KEYS, of_scores + r * KEYS, here, head.factor, sums[i + r], drift[i + r]);
      pack_left({of_scores, KEYS, 1}, rows, here, packed);
      multiply_packed(packed, across, of_q + i * d, d, rows, d, here, head.factor, j ? 1 : 0);
      if (of_k) {
        pack_right(of, rows, d, given_too);
        pack_left({scores, 1, KEYS}, here, rows, turned);
        multiply_packed(turned, given_too, of_v + j * d, d, here, d, rows, 1, i > from);
        pack_right(q, rows, d, queries_too);
        pack_left({of_scores, 1, KEYS}, here, rows, turned);
        multiply_packed(turned, queries_too, of_k + j * d, d, here, d, rows, head.factor, i > from);
      }
    }
  }
}

}  // namespace

// Whether this system lets this process use tiles: asked for once (arch_prctl, ARCH_REQ_XCOMP_PERM of XTILEDATA).
extern "C" int allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// out [m, n] = beta out + alpha (the sum of all terms): operands with one step of 1 each, out with columns side by side, its rows `step`
// apart. beta 0 reads nothing there.
extern "C" void products(const Term* terms, int64_t count, float* out, int64_t step, int64_t m, int64_t n, float alpha, float beta) {
#pragma omp parallel
  {
    _tile_loadconfig(&CONFIGURATION);
    // Threads share the longer side, and each packs all of the other operand that it needs: no waiting, and nothing of another core's cache.
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(), longer = std::max(m, n), pieces = (longer + WIDE - 1) / WIDE;
    const int64_t from = std::min(longer, pieces * thread / threads * WIDE), to = std::min(longer, pieces * (thread + 1) / threads * WIDE);
    if (from < to && n >= m) share(terms, count, out, step, 0, from, m, to - from, alpha, beta);
    if (from < to && n < m) share(terms, count, out, step, from, 0, to - from, n, alpha, beta);
    _tile_release();
  }
}

// Attention without a mask: q and out [heads, rows, d], k and v [heads, keys, d], sums [heads, rows] of natural log sum exps. Each head's rows
// are cut into `cuts` shares, of which a thread takes one at a time.
extern "C" void attention(const float* q, const float* k, const float* v, float* out, float* sums, int64_t heads, int64_t rows, int64_t keys,
                          int64_t d, int64_t cuts, float factor) {
#pragma omp parallel
  {
    _tile_loadconfig(&CONFIGURATION);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < heads * cuts; part++) {
      const int64_t head = part / cuts, cut = part % cuts, from = rows * cut / cuts, to = rows * (cut + 1) / cuts;
      const Head here = {q + head * rows * d, k + head * keys * d, v + head * keys * d, rows, keys, d, factor};
      if (from < to) attend(here, from, to, out + head * rows * d, sums + head * rows);
    }
    _tile_release();
  }
}

// Its gradients: of_out as out, drift [heads, rows] what softmax takes off every score's gradient, of_q as q; of_k and of_v [cuts, heads, keys, d],
// to be added up, or null. rows >= cuts.
extern "C" void attention_back(const float* of_out, const float* q, const float* k, const float* v, const float* sums, const float* drift,
                               float* of_q, float* of_k, float* of_v, int64_t heads, int64_t rows, int64_t keys, int64_t d, int64_t cuts,
                               float factor) {
#pragma omp parallel
  {
    _tile_loadconfig(&CONFIGURATION);
#pragma omp for schedule(static)
    for (int64_t part = 0; part < heads * cuts; part++) {
      const int64_t head = part / cuts, cut = part % cuts, from = rows * cut / cuts, to = rows * (cut + 1) / cuts;
      const int64_t of_head = head * rows * d, of_keys = (cut * heads + head) * keys * d;
      const Head here = {q + of_head, k + head * keys * d, v + head * keys * d, rows, keys, d, factor};
      attend_back(here, from, to, of_out + of_head, sums + head * rows, drift + head * rows, of_q + of_head, of_k ? of_k + of_keys : nullptr,
                  of_v ? of_v + of_keys : nullptr);
    }
    _tile_release();
  }
}

#else

extern "C" int allowed() { return 0; }

#endif
