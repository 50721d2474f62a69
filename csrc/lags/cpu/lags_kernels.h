// The CPU kernels of the compressed form (lags/form.h), without torch. lags.cpp splits the work over threads. See lags_impl.h.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace mfac_kernels {

// Pixels of panels, as three nested loops; steps in elements
struct Pixels {
  int64_t counts[3], steps[3];
};

// Tensors of `channels` channels are read through panels: (pixels, tile) with zeros past the last channel.
struct LagKernels {
  int64_t tile, item;  // channels of a panel; bytes of an element of panels, tiles and state

  // panel (rows, columns, tile) <- x at (channel, row, column), strides in elements
  void (*pack)(const void* x, int64_t channels, int64_t channel_step, int64_t rows, int64_t row_step, int64_t columns, int64_t column_step,
               void* panel);
  bool (*all_finite)(const void* panel, int64_t elements);
  // tile (tile, tile) += sum over pixels of a b^T, of which the first `rows` and `columns` are not zero
  void (*add_products)(const void* a, const void* b, const Pixels&, int64_t rows, int64_t columns, void* tile);
  // sums (tile) += sum over pixels of a
  void (*add_sums)(const void* a, const Pixels&, void* sums);
  // out (rows, columns) <- beta out + alpha * the sum of some of the tiles; mirror the same with the transpose. Either may be null.
  void (*add_tiles)(const void* tiles, const int64_t* chosen, int64_t count, int64_t rows, int64_t columns, double beta, double alpha,
                    void* out, void* mirror, int64_t stride);
};
const LagKernels& lag_kernels(DType);

struct ExpandKernels {
  // out (columns, rows) <- in^T, in (rows, columns) with rows `stride` apart
  void (*transpose)(const void* in, int64_t rows, int64_t columns, int64_t stride, void* out);
  // out[i - begin] <- beta out[i - begin] + alpha v[i], i in [begin, end): v[i] = in[i % offsets][i / offsets], v[columns] = *last
  void (*interleave)(const char* const* in, const void* last, int64_t offsets, int64_t columns, int64_t begin, int64_t end, double beta,
                     double alpha, void* out);
};
const ExpandKernels& expand_kernels(DType);

}  // namespace mfac_kernels
