// Every op's schema: the contract of the library. Implementations register beside their glue; shapes are (rows, columns), m gradients of
// dimension d. Semantics: mfac_kernels/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mfac_kernels, m) {
  // Instruction set of the CPU kernels: level < 0 asks, 0..2 chooses baseline, AVX2 or AVX-512. Returns the one in use.
  m.def("cpu_capability(int level) -> int");

  // M-FAC, sliding window. state (2,) int64 = (gradients seen, gradients refused). Blocks of block_size columns are independent;
  // None: one block of all.
  m.def("window_insert_(Tensor(a!) window, Tensor state, Tensor g) -> Tensor");
  m.def("window_dots(Tensor window, Tensor x, int? block_size=None) -> Tensor");
  m.def(
      "window_combine(Tensor window, Tensor coefficients, int? block_size, float beta, Tensor? x, float alpha, ScalarType dtype) -> "
      "Tensor");
  m.def("core_insert_(Tensor(a!) gram, Tensor(b!) factor, Tensor(c!) state, Tensor dots, float shift, bool per_gradient) -> Tensor");
  m.def("core_solve(Tensor factor, Tensor state, Tensor b, float shift, bool per_gradient) -> Tensor");
  m.def("core_refactor_(Tensor gram, Tensor(a!) factor, Tensor state, float shift, bool per_gradient) -> ()");

  // M-FAC, fixed gradients
  m.def("gram(Tensor g, bool double_precision) -> Tensor");
  m.def("block_gram(Tensor g, int block_size, bool double_precision) -> Tensor");
  m.def("inverse_diagonal(Tensor g, Tensor transform, float damping) -> Tensor");
  m.def("block_inverse(Tensor g, int block_size, float damping, float count) -> (Tensor inverse, Tensor info)");

  // Batches of symmetric positive definite blocks (..., n, n), any strides, of which the lower triangle is read. info, int32: a code per
  // block. The first two ops are those of one batch with one damping; of the others' damping, float64 and contiguous, each entry has a
  // value per block or one for the batch. They return the info of all, batch after batch (lists of tensors cannot be returned by an op that
  // writes to its arguments: torch.compile refuses it). only, like info: blocks whose entry is 0 are skipped, what out holds of them stays
  // and their info is 0.
  m.def("cholesky_inverse_ex(Tensor blocks, float damping) -> (Tensor inverse, Tensor info)");
  m.def("cholesky_factor_ex(Tensor blocks, float damping) -> (Tensor factor, Tensor info)");
  m.def("cholesky_inverse_(Tensor(a!)[] out, Tensor[] blocks, Tensor[] damping, Tensor? only=None) -> Tensor");
  m.def("cholesky_factor_(Tensor(a!)[] out, Tensor[] blocks, Tensor[] damping, Tensor? only=None) -> Tensor");
  // out[i]: M with (block + damping I)^-1 = M^T M; upper triangular, or lower. A code k > 0: the trailing minor of order k is not
  // positive, or the leading one.
  m.def("cholesky_inverse_factor_(Tensor(a!)[] out, Tensor[] blocks, Tensor[] damping, bool upper, Tensor? only=None) -> Tensor");
  // Inverses of the blocks' upper or lower triangles. A code k > 0: the trailing or leading minor of order k is the first that is 0.
  m.def("triangular_inverse_(Tensor(a!)[] out, Tensor[] blocks, bool upper) -> Tensor");
  m.def("cholesky_solve_(Tensor(a!)[] x, Tensor[] factors) -> ()");

  // Kronecker factors: factor <- beta factor + alpha sum over rows of w row row^T. factor (D, D); its diagonal blocks (g, s, s), the last
  // one ragged, zero past its end; or one matrix per group (groups, D, D). beta = 0: factor is not read. refused (1,) int32: if given, a
  // batch that is not finite sets it to 1 and leaves factor as it is. allow_tf32: tensor cores may round float32 rows to TF32.
  //
  // offsets (groups + 1), int32 or int64: x is (T, D), factor[g] (groups, D, D) takes the rows [offsets[g], offsets[g + 1]) alone, and
  // refused is (groups,). betas and alphas, float64, one value or one for each group, take the place of beta and alpha.
  m.def(
      "linear_factor_(Tensor(a!) factor, Tensor x, Tensor? weights, bool bias, float beta, float alpha, Tensor(b!)? refused, bool "
      "allow_tf32=False, Tensor? offsets=None, Tensor? betas=None, Tensor? alphas=None) -> ()");
  // Pairs of a factor and rows, each as above; refused, betas and alphas have a value for each.
  m.def(
      "grouped_linear_factor_(Tensor(a!)[] factors, Tensor[] x, Tensor?[] weights, bool[] bias, float beta, float alpha, Tensor(b!)? "
      "refused, bool allow_tf32=False, Tensor? betas=None, Tensor? alphas=None) -> ()");
  m.def(
      "conv_factor_(Tensor(a!) factor, Tensor x, int[] kernel_size, int[] stride, int[] padding_before, int[] padding_after, int[] "
      "dilation, "
      "int groups, bool bias, bool sua, bool reduce, float beta, float alpha, Tensor(b!)? refused, bool allow_tf32=False) -> ()");
  m.def("embedding_factor_(Tensor(a!) counts, Tensor indices, int? padding_idx, float beta, float alpha) -> ()");
  m.def("cross_factor(Tensor x, Tensor y, Tensor? weights) -> Tensor");

  // The compressed form of a stride-1 convolution's factor, full and "expand": sums of products per lag and border, linear in the batch.
  // state (groups, size), float32, or float64 for float64 x: (slots, C, C) sums and, with a bias, (offsets, C) sums and the number of
  // patches (csrc/lags/form.h). conv_expand_: factor <- beta factor + alpha (what the state stands for), factor as above. fft: lags by
  // way of the frequencies where that is accurate.
  m.def(
      "conv_lags_(Tensor(a!) state, Tensor x, int[] kernel_size, int[] padding_before, int[] padding_after, int[] dilation, int groups, "
      "bool bias, bool fft, float beta, float alpha, Tensor(b!)? refused) -> ()");
  m.def(
      "conv_expand_(Tensor(a!) factor, Tensor state, int[] kernel_size, int[] padding_before, int[] padding_after, int[] dilation, int "
      "groups, bool bias, float beta, float alpha) -> ()");
}
