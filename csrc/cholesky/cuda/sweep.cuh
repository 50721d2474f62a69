// Elimination of a symmetric positive definite matrix that a team of threads holds in registers: the steps that register_kernels.cu
// explains, and large_kernels.cu for the blocks on its diagonal.
#pragma once
#include "cholesky/cuda/cholesky_kernels.h"
#include "cholesky/cuda/tile.cuh"

namespace mfac_kernels {

constexpr int kHalf = kTile / 2;  // rows of a step

// Where four rows lie in shared memory: the two quads of each row of a tile are neighbours, those of the next tile kPitch quads on,
// so that neighbouring threads meet different banks.
constexpr int kPitch = kTile + 1;

// What a thread knows of its team
template <class S>
struct Team {
  int tiles, rank, row, column;  // the thread's tile; row >= tiles: it has none
  Shared<Quad<S>> rows, panel;   // M[K, :] and P
};

// Of the threads that share a team's thread block
template <bool kOneWarp>
__device__ __forceinline__ void team_barrier() {
  if constexpr (kOneWarp)
    __syncwarp();
  else
    __syncthreads();
}

__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double reciprocal_root(double x) { return rsqrt(x); }

// rows <- rows `half` of tile row k of M, the tiles below the diagonal transposed
template <int half, class S>
__device__ __forceinline__ void share_rows(const Tile<S>& a, const Team<S>& team, int k) {
  const auto share = [&](int place, const auto& element) {
#pragma unroll
    for (int w = 0; w < kHalf; ++w)
#pragma unroll
      for (int g = 0; g < 2; ++g)
        team.rows[place * kPitch + 2 * w + g] = quad_of<S>([&](int i) { return element(half * kHalf + w, g * kHalf + i); });
  };
  if (team.row == k)
    share(team.column, [&](int r, int c) { return a[r][c]; });
  else if (team.column == k && team.row < team.tiles)
    share(team.row, [&](int r, int c) { return a[c][r]; });
}

// Four columns of P. place: where their first row lies; own: that of the columns K. Returns 0, or 1 + the row of the first pivot that is
// not positive. Of a triangle, D is there from the start; `finished` columns, those of L right of K, stay what they are.
template <CholeskyResult kResult, class S>
__device__ __forceinline__ int solve_columns(const Team<S>& team, int place, int own, bool finished) {
  constexpr bool kTriangle = kResult == CholeskyResult::triangular_inverse;
  Quad<S> d[kHalf];  // the upper triangle of D D^T, then that of D^T with reciprocals on its diagonal
#pragma unroll
  for (int w = 0; w < kHalf; ++w) d[w] = team.rows[own + 2 * w];
  int bad = 0;
#pragma unroll
  for (int w = 0; w < kHalf; ++w) {
    if (kTriangle) {
      if (d[w].x[w] == 0 && bad == 0) bad = w + 1;
      d[w].x[w] = 1 / d[w].x[w];
      continue;
    }
    if (!(d[w].x[w] > 0) && bad == 0) bad = w + 1;
    d[w].x[w] = reciprocal_root(d[w].x[w]);
#pragma unroll
    for (int i = w + 1; i < kHalf; ++i) d[w].x[i] *= d[w].x[w];
#pragma unroll
    for (int v = w + 1; v < kHalf; ++v)
#pragma unroll
      for (int i = v; i < kHalf; ++i) d[v].x[i] -= d[w].x[v] * d[w].x[i];
  }
  Quad<S> x[kHalf];
#pragma unroll
  for (int w = 0; w < kHalf; ++w) {
    x[w] = team.rows[place + 2 * w];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kResult != CholeskyResult::factor && place == own) x[w].x[i] = i == w ? S(1) : S(0);
      if (!kTriangle && finished) x[w].x[i] = 0;
    }
  }
  if (kTriangle && finished) {
#pragma unroll
    for (int w = 0; w < kHalf; ++w) team.panel[place + 2 * w] = x[w];
    return bad;
  }
#pragma unroll
  for (int w = 0; w < kHalf; ++w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[w].x[i] *= d[w].x[w];
#pragma unroll
      for (int v = w + 1; v < kHalf; ++v) x[v].x[i] -= d[w].x[v] * x[w].x[i];
    }
    team.panel[place + 2 * w] = x[w];
  }
  return bad;
}

// One step: rows `half` of tile row k.
template <int half, CholeskyResult kResult, bool kOneWarp, class S>
__device__ __forceinline__ void eliminate(Tile<S>& a, const Team<S>& team, int k, int32_t& info) {
  const int t = team.tiles;
  share_rows<half>(a, team, k);
  team_barrier<kOneWarp>();
  if (team.rank < 2 * t) {
    const int tile = team.rank % t, right = team.rank / t;
    const bool finished = kResult == CholeskyResult::factor               ? tile < k || (tile == k && right < half)
                          : kResult == CholeskyResult::triangular_inverse ? tile > k || (tile == k && right > half)
                                                                          : false;
    const int bad = solve_columns<kResult>(team, tile * kPitch + right, k * kPitch + half, finished);
    if (team.rank == 0 && bad != 0 && info == 0) info = k * kTile + half * kHalf + bad;
  }
  team_barrier<kOneWarp>();
  if (team.row >= t) return;
  constexpr bool kFactorInverse = kIsFactorInverse<kResult>;
  const bool own = team.row == k;
  if (kFactorInverse && team.row < k) return;
  if (kResult == CholeskyResult::triangular_inverse && team.column > k) return;
  if constexpr (kResult != CholeskyResult::factor) {
    if (!kFactorInverse && own) {
#pragma unroll
      for (int w = 0; w < kHalf; ++w)
#pragma unroll
        for (int c = 0; c < kTile; ++c) a[half * kHalf + w][c] = 0;
    }
    if (team.column == k) {
#pragma unroll
      for (int r = 0; r < kTile; ++r)
#pragma unroll
        for (int w = 0; w < kHalf; ++w) a[r][half * kHalf + w] = 0;
    }
  } else if (team.column < k) {
    return;
  }
#pragma unroll
  for (int w = 0; w < kHalf; ++w) {
    const Quad<S> left[2] = {team.panel[team.row * kPitch + 2 * w], team.panel[team.row * kPitch + 2 * w + 1]};
    const Quad<S> right[2] = {team.panel[team.column * kPitch + 2 * w], team.panel[team.column * kPitch + 2 * w + 1]};
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      S factor = left[r / 4].x[r % 4];
      if (kFactorInverse && own && r < (half + 1) * kHalf) factor = 0;
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        // Right of the columns K the triangle's own rows stand where others have P.
        if (kResult == CholeskyResult::triangular_inverse && half == 0 && c >= kHalf && team.column == k) continue;
        a[r][c] -= factor * right[c / 4].x[c % 4];
      }
      if (kResult == CholeskyResult::factor && team.column == k) a[r][half * kHalf + w] = factor;
    }
    if (kFactorInverse && own) {
#pragma unroll
      for (int c = 0; c < kTile; ++c) a[half * kHalf + w][c] = right[c / 4].x[c % 4];
    }
  }
}

}  // namespace mfac_kernels
