// Products of matrices by AMX: of fp32 from halves (tiles.h), and of int8 with what turns them into fp32 again; and attention by them. Compiled
// when first used, by matmul.py.
#include <cstdint>

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__AVX512VL__) && \
    defined(__linux__)
#include <omp.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attention.h"
#include "tiles.h"
#include "vectors.h"

namespace {

// One of the products that are added up: [m, depth] and [depth, n].
struct Term {
  Matrix left, right;
  int64_t depth;
  const char* tiles;  // the right one's, packed beforehand; null: packed as it is multiplied
};

// 32 depths of a term, or what it has left.
struct Step {
  const Term* term;
  int64_t depth;
  int64_t left_over() const { return term->depth - depth; }
  Step after() const { return left_over() > STEP ? Step{term, depth + STEP} : Step{term + 1, 0}; }
};

// A thread's share of out = beta out + alpha (the sum of all terms): rows from `row` and columns from `column` on, of which there are m and n.
void share(const Term* terms, int64_t count, float* out, int64_t step, int64_t row, int64_t column, int64_t m, int64_t n, float alpha, float beta) {
  char *const lefts = room.of(DEEP * (TALL + WIDE) * 4), *const rights = lefts + DEEP * TALL * 4;
  alignas(64) float sums[2 * LANES * WIDE];
  Step at[DEEP / STEP];
  int64_t all = 0;
  for (int64_t t = 0; t < count; t++) all += steps_of(terms[t].depth);
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
        Run runs[DEEP / STEP];
        int64_t count = 0;
        for (int64_t s = 0, here; s < steps; s += here) {
          const Term& term = *at[s].term;
          here = std::min(steps - s, steps_of(term.depth) - at[s].depth / STEP);
          if (term.tiles) {
            runs[count++] = {term.tiles + ((column + j) / WIDE * steps_of(term.depth) + at[s].depth / STEP) * 4 * TILE, here};
            continue;
          }
          runs[count++] = {rights + s * 4 * TILE, here};
          for (int64_t half = 0; half < 2; half++)  // one that is not there is multiplied all the same, and not put anywhere
            for (int64_t t = s; t < s + here && j + half * LANES < n; t++)
              pack(term.right.from(at[t].depth, column + j + half * LANES), term.right.column, term.right.row, n - j - half * LANES,
                   at[t].left_over(), true, rights + t * 4 * TILE + half * 2 * TILE);
        }
        for (int64_t i = 0; i < tall; i += 2 * LANES) {
          const char* const packed = lefts + i / LANES * next;
          if (i + LANES < tall)
            multiply<2>(packed, next, runs, count, sums);
          else
            multiply<1>(packed, next, runs, count, sums);
          put(sums, out + (top + i) * step + j, step, std::min(2 * LANES, tall - i), std::min(WIDE, n - j), alpha, done ? 1.0f : beta);
        }
      }
    }
  }
}

// --- int8 ----------------------------------------------------------------------------------------------------------

// A tile of the left operand is 16 rows of 64 numbers, which are read where they lie; one of the right operand 16 fours of depths, for 16 lanes
// each. Four of these stand side by side: as many columns as are rotated together (model/int8.py).
constexpr int64_t STEP8 = 64, WIDE8 = 64, DEEP8 = 576;

// A right operand in tiles: its panels of 64 columns one after the other, each of all depths.
struct Tiles8 {
  const char* at;
  int64_t depth;
};

// What is added behind it: scale left [m, depth] right [depth, n].
struct Added {
  const float* left;
  int64_t left_step;
  const float* right;
  int64_t right_step;
  int64_t depth;
  float scale;
};

// sums [16, 64] += 16 rows of the left operand, `width` bytes each, times so many steps of 64 depths; or = where there are none yet.
inline void multiply8(const int8_t* left, int64_t width, const char* right, int64_t steps, bool adds, int32_t* sums) {
  if (adds) {
    _tile_loadd(0, sums, 4 * WIDE8);
    _tile_loadd(1, sums + LANES, 4 * WIDE8);
    _tile_loadd(2, sums + 2 * LANES, 4 * WIDE8);
    _tile_loadd(3, sums + 3 * LANES, 4 * WIDE8);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (const char* const end = right + steps * 4 * TILE; right < end; right += 4 * TILE, left += STEP8) {
    _tile_loadd(4, left, width);
    _tile_loadd(5, right, 64);
    _tile_dpbssd(0, 4, 5);
    _tile_loadd(6, right + TILE, 64);
    _tile_dpbssd(1, 4, 6);
    _tile_loadd(7, right + 2 * TILE, 64);
    _tile_dpbssd(2, 4, 7);
    _tile_loadd(5, right + 3 * TILE, 64);
    _tile_dpbssd(3, 4, 5);
  }
  _tile_stored(0, sums, 4 * WIDE8);
  _tile_stored(1, sums + LANES, 4 * WIDE8);
  _tile_stored(2, sums + 2 * LANES, 4 * WIDE8);
  _tile_stored(3, sums + 3 * LANES, 4 * WIDE8);
}

// out [rows, 64] = rotated(sums * row_scale * column_scale) + bias + what is added, of columns `j` on; ROWS at a time.
template <int ROWS>
inline void finish8(const int32_t* sums, const float* row_scale, const float* column_scale, const float* bias, const Added& added, int64_t i, int64_t j,
                    float* out, int64_t step) {
  Lanes more[ROWS][4] = {};
  const float* left[ROWS];
  for (int r = 0; r < ROWS; r++) left[r] = added.left + (i + r) * added.left_step;
  for (int64_t t = 0; t < added.depth; t++) {
    const float* const right = added.right + t * added.right_step + j;
    const Lanes of[4] = {loaded(right), loaded(right + 16), loaded(right + 32), loaded(right + 48)};
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < 4; c++) more[r][c] += left[r][t] * of[c];
  }
  for (int r = 0; r < ROWS; r++) {
    const float scale = row_scale[i + r] * 0.125f;  // 1 / the root of 64
    Lanes x[4];
    for (int c = 0; c < 4; c++) {
      const Lanes of_columns = column_scale ? scale * loaded(column_scale + j + 16 * c) : scale + Lanes{};
      x[c] = (Lanes)_mm512_cvtepi32_ps(_mm512_loadu_si512(sums + r * WIDE8 + 16 * c)) * of_columns;
    }
    rotate64(x);
    for (int c = 0; c < 4; c++) {
      const Lanes y = bias ? x[c] + loaded(bias + j + 16 * c) : x[c];
      store(out + (i + r) * step + j + 16 * c, y + added.scale * more[r][c]);
    }
  }
}

}  // namespace

// Whether this system lets this process use tiles: asked for once (arch_prctl, ARCH_REQ_XCOMP_PERM of XTILEDATA).
extern "C" int allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Memory that will be read in whole: 2 MB a page where the system has such, as looking up 4 KB ones takes a fifth of the time.
extern "C" void use_large_pages(char* at, int64_t bytes) { madvise(at, bytes, MADV_HUGEPAGE); }

// A right operand [depth, columns] in tiles of halves, as a term wants it: 4 bytes a number, both sides rounded up to 32.
extern "C" void into_tiles(const float* x, int64_t row, int64_t column, int64_t depth, int64_t columns, char* to) {
  const int64_t panels = (columns + WIDE - 1) / WIDE, size = steps_of(depth) * 4 * TILE;
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < panels; panel++)
    pack_right({x + panel * WIDE * column, row, column}, depth, std::min(WIDE, columns - panel * WIDE), to + panel * size);
}

// A right operand [depth, columns] of int8 in tiles, both sides multiples of 64: a byte a number.
extern "C" void into_tiles8(const int8_t* x, int64_t row, int64_t column, int64_t depth, int64_t columns, char* to) {
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < columns / WIDE8; panel++)
    for (int64_t d = 0; d < depth; d++)
      for (int64_t c = 0; c < WIDE8; c++)
        to[panel * WIDE8 * depth + d / STEP8 * 4 * TILE + c / LANES * TILE + d % STEP8 / 4 * 64 + c % LANES * 4 + d % 4] =
            x[d * row + (panel * WIDE8 + c) * column];
}

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

// out [m, n] = rotated((q [m, all depths] the rights, one below the other) * row_scale * column_scale) + bias + what is added. q has rows for a
// multiple of 16, whatever stands in the last ones; depths and n are multiples of 64. column_scale and bias may be null: 1 and 0.
extern "C" void products8(const int8_t* q, const float* row_scale, const Tiles8* rights, int64_t count, const float* column_scale, const float* bias,
                          const Added* added, float* out, int64_t m, int64_t n) {
  if (!m) return;
  int64_t width = 0;
  for (int64_t part = 0; part < count; part++) width += rights[part].depth;
  const int64_t groups = (m + LANES - 1) / LANES, all = n / WIDE8 * groups;
#pragma omp parallel
  {
    _tile_loadconfig(&CONFIGURATION);
    // A thread's share are groups of 16 rows, panel after panel. Of a panel so many depths at a time as a core's smallest cache holds.
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads(), from = all * thread / threads, to = all * (thread + 1) / threads;
    int32_t* const sums = reinterpret_cast<int32_t*>(room.of(groups * LANES * WIDE8 * 4));
    for (int64_t panel = from / groups; panel * groups < to; panel++) {
      const int64_t top = std::max(from, panel * groups) % groups, end = std::min(to - panel * groups, groups);
      int64_t done = 0;
      for (const Tiles8* tiles = rights; tiles < rights + count; tiles++)
        for (int64_t depth = 0; depth < tiles->depth; depth += DEEP8) {
          const int64_t here = std::min(DEEP8, tiles->depth - depth);
          const char* const right = tiles->at + (panel * tiles->depth + depth) * WIDE8;
          for (int64_t group = top; group < end; group++)
            multiply8(q + group * LANES * width + done, width, right, here / STEP8, done > 0, sums + group * LANES * WIDE8);
          done += here;
        }
      int64_t i = top * LANES;
      const int64_t rows = std::min(m, end * LANES);
      for (; i + 4 <= rows; i += 4) finish8<4>(sums + i * WIDE8, row_scale, column_scale, bias, *added, i, panel * WIDE8, out, n);
      for (; i < rows; i++) finish8<1>(sums + i * WIDE8, row_scale, column_scale, bias, *added, i, panel * WIDE8, out, n);
    }
    _tile_release();
  }
}

#else

extern "C" int allowed() { return 0; }

#endif
