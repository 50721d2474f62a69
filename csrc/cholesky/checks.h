// What the ops on batches of square blocks expect, on every device, and where each block of a batch lies.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/new_tensor.h"
#include "common/types.h"

namespace mfac_kernels {

// A tensor (..., rows, columns) of any strides as a list of matrices; strides are in elements.
struct Batch {
  char* data;
  DType dtype;
  int64_t item, count, rows, columns, row_stride, column_stride;

  Batch(const Tensor& t, DType type)
      : data(static_cast<char*>(t.data_ptr())),
        dtype(type),
        item(static_cast<int64_t>(t.element_size())),
        count(1),
        rows(t.size(-2)),
        columns(t.size(-1)),
        row_stride(t.stride(-2)),
        column_stride(t.stride(-1)) {
    for (int64_t d = t.dim() - 3; d >= 0; --d) {
      count *= t.size(d);
      if (t.size(d) == 1) continue;
      if (!dims_.empty() && t.stride(d) == dims_.back().size * dims_.back().stride)
        dims_.back().size *= t.size(d);
      else
        dims_.push_back({t.size(d), t.stride(d)});
    }
  }
  // In elements. b counts blocks in the order of the batch's dimensions, the last one fastest.
  int64_t offset(int64_t b) const {
    if (dims_.size() == 1) return b * dims_[0].stride;
    int64_t offset = 0;
    for (const Dim& dim : dims_) {
      offset += b % dim.size * dim.stride;
      b /= dim.size;
    }
    return offset;
  }
  char* at(int64_t b) const { return data + offset(b) * item; }

 private:
  struct Dim {
    int64_t size, stride;
  };
  std::vector<Dim> dims_;  // the last one first; neighbours that one stride spans are merged
};

// "op: blocks[3]", as messages begin; "op: blocks" of an op that takes no lists
struct Entry {
  const char *op, *name;
  int64_t index = -1;
};
inline Text& operator<<(Text& text, const Entry& entry) {
  text << entry.op << ": " << entry.name;
  return entry.index < 0 ? text : text << '[' << entry.index << ']';
}

inline void check_dtype_is(const Entry& entry, const Tensor& t, ScalarType expected) {
  check(t.scalar_type() == expected, entry, ": expected ", torch::headeronly::toString(expected), ", got ",
        torch::headeronly::toString(t.scalar_type()));
}

// float32 or float64: what the blocks are computed in
inline DType check_computed(const Entry& entry, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, entry, ": expected float32 or float64, got ",
        torch::headeronly::toString(t.scalar_type()));
  return t.scalar_type() == ScalarType::Float ? DType::f32 : DType::f64;
}

inline void check_square(const Entry& entry, const Tensor& t) {
  check(t.dim() >= 2 && t.size(-1) == t.size(-2), entry, ": expected shape (..., n, n), got ", shape(t));
}

// Elements that no two indices share: a kernel may write to them.
inline void check_distinct(const Entry& entry, const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d)
    check(t.size(d) <= 1 || t.stride(d) != 0 || t.numel() == 0, entry, ": expected distinct elements, got stride 0 in dimension ", d);
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

// The bytes from a tensor's first element to its last, and whether all between are its own. Elements may be shared.
struct Extent {
  const char *begin, *end;
  bool dense;

  explicit Extent(const Tensor& t) : begin(static_cast<const char*>(t.data_ptr())) {
    int64_t last = 0, distinct = 1;
    for (int64_t d = 0; d < t.dim(); ++d) {
      last += (t.size(d) - 1) * t.stride(d);
      if (t.stride(d) != 0) distinct *= t.size(d);
    }
    end = begin + (last + 1) * static_cast<int64_t>(t.element_size());
    dense = last + 1 == distinct;
  }
};

// out is the memory of blocks, element for element, or none of it. (Views with gaps may interleave; those pass unexamined.)
inline void check_overlap(const Entry& entry, const Tensor& out, const Tensor& blocks) {
  if (out.numel() == 0) return;
  const Extent written(out), read(blocks);
  if (!written.dense || !read.dense || written.end <= read.begin || read.end <= written.begin) return;
  bool same = written.begin == read.begin && out.scalar_type() == blocks.scalar_type();
  for (int64_t d = 0; same && d < out.dim(); ++d) same = out.size(d) == 1 || out.stride(d) == blocks.stride(d);
  check(same, entry, ": expected the memory of blocks[", entry.index, "] or memory apart from it, got a part of it");
}

inline void check_lengths(const char* op, const char* list, size_t length, const char* other, size_t expected) {
  check(length == expected, op, ": ", list, ": expected ", expected, " tensors, as ", other, " has, got ", length);
}

// A batch with where its results go and its damping: a value per block or one for all.
struct DampedBatch {
  Batch out, blocks;
  const double* damping;
  int64_t first, damping_stride;  // first: the place of its first block among those of all batches
};

inline int64_t block_count(const std::vector<DampedBatch>& batches) {
  return batches.empty() ? 0 : batches.back().first + batches.back().blocks.count;
}

// out[i] and blocks[i], behind the batches that are there; no damping
inline void add_batch(const char* op, int64_t i, const Tensor& out, const Tensor& blocks, std::vector<DampedBatch>& batches) {
  const Entry of_blocks{op, "blocks", i}, of_out{op, "out", i};
  check_square(of_blocks, blocks);
  const DType dtype = dtype_of(op, "blocks", blocks), computed = check_computed(of_out, out);
  check(dtype != DType::f64 || computed == DType::f64, of_out, ": expected Double, as blocks[", i, "] is, got Float");
  check(same_shape(out, blocks), of_out, ": expected shape ", shape(blocks), ", got ", shape(out));
  check_distinct(of_out, out);
  check_overlap(of_out, out, blocks);
  const int64_t first = block_count(batches);
  batches.push_back({Batch(out, computed), Batch(blocks, dtype), nullptr, first, 0});
}

// What the ops on blocks with a damping take.
inline std::vector<DampedBatch> check_damped_batches(const char* op, const std::vector<Tensor>& out, const std::vector<Tensor>& blocks,
                                                     const std::vector<Tensor>& damping, const std::optional<Tensor>& only) {
  check_lengths(op, "out", out.size(), "blocks", blocks.size());
  check_lengths(op, "damping", damping.size(), "blocks", blocks.size());
  std::vector<DampedBatch> batches;
  batches.reserve(blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    add_batch(op, static_cast<int64_t>(i), out[i], blocks[i], batches);
    DampedBatch& batch = batches.back();
    const Entry of_damping{op, "damping", static_cast<int64_t>(i)};
    check_dtype_is(of_damping, damping[i], ScalarType::Double);
    check(damping[i].numel() == 1 || damping[i].numel() == batch.blocks.count, of_damping, ": expected 1 or ", batch.blocks.count,
          " values, got ", damping[i].numel());
    check(damping[i].is_contiguous(), of_damping, ": expected a contiguous tensor");
    batch.damping = static_cast<const double*>(damping[i].data_ptr());
    batch.damping_stride = damping[i].numel() == 1 ? 0 : 1;
  }
  if (only) check_state(op, "only", *only, ScalarType::Int, {block_count(batches)});
  return batches;
}

// Where the result goes of an op that takes one batch
inline Tensor new_result(const char* op, const Tensor& blocks) {
  check_square({op, "blocks"}, blocks);
  const DType dtype = dtype_of(op, "blocks", blocks);
  const auto sizes = blocks.sizes();
  return new_tensor(blocks, {sizes.begin(), sizes.end()}, dtype == DType::f64 ? ScalarType::Double : ScalarType::Float);
}

// What triangular_inverse_ takes.
inline std::vector<DampedBatch> check_triangular_batches(const char* op, const std::vector<Tensor>& out,
                                                         const std::vector<Tensor>& blocks) {
  check_lengths(op, "out", out.size(), "blocks", blocks.size());
  std::vector<DampedBatch> batches;
  batches.reserve(blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) add_batch(op, static_cast<int64_t>(i), out[i], blocks[i], batches);
  return batches;
}

// A batch of right-hand sides x (..., n, k), each overwritten by (L L^T)^-1 x, and its factors L (..., n, n).
struct SolveBatch {
  Batch x, factors;
};

inline std::vector<SolveBatch> check_solve_batches(const char* op, const std::vector<Tensor>& x, const std::vector<Tensor>& factors) {
  check_lengths(op, "x", x.size(), "factors", factors.size());
  std::vector<SolveBatch> batches;
  batches.reserve(factors.size());
  for (size_t i = 0; i < factors.size(); ++i) {
    const Entry of_x{op, "x", static_cast<int64_t>(i)}, of_factors{op, "factors", static_cast<int64_t>(i)};
    check_square(of_factors, factors[i]);
    const DType dtype = check_computed(of_factors, factors[i]);
    check_dtype_is(of_x, x[i], factors[i].scalar_type());
    const int64_t batch_dims = factors[i].dim() - 2;
    bool fits = x[i].dim() == factors[i].dim() && x[i].size(-2) == factors[i].size(-1);
    for (int64_t d = 0; fits && d < batch_dims; ++d) fits = x[i].size(d) == factors[i].size(d);
    check(fits, of_x, ": expected right-hand sides (..., n, k) of factors of shape ", shape(factors[i]), ", got ", shape(x[i]));
    check_distinct(of_x, x[i]);
    batches.push_back({Batch(x[i], dtype), Batch(factors[i], dtype)});
  }
  return batches;
}

}  // namespace mfac_kernels
