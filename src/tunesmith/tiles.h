// Products of fp32 matrices from products of bf16 ones: x = high + low, two halves of 8 bits each, so x y = high high + low high + high low, and
// what is left out is 2^-16 of it at most. By AMX, whose tiles multiply bf16 and add up in fp32: how operands lie in tiles.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

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

// Of a packed right operand, two tiles across: so many steps of 32 depths that lie one after the other.
struct Run {
  const char* right;
  int64_t steps;
};

// sums [16 or 32, 32] = one or two groups of 16 lanes, `next` bytes apart, times two tiles across: 4 accumulators, 4 tiles for operands.
template <int GROUPS>
inline void multiply(const char* left, int64_t next, const Run* runs, int64_t count, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  if (GROUPS > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (const Run* run = runs; run < runs + count; run++)
    for (const char *right = run->right, *end = right + run->steps * 4 * TILE; right < end; left += 2 * TILE, right += 4 * TILE) {
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

}  // namespace
