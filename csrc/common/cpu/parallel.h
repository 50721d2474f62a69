// Threads come from torch's own pool, so torch.set_num_threads holds here too.
#pragma once
#include <torch/csrc/stable/ops.h>

namespace mfac_kernels {

using torch::stable::parallel_for;

}  // namespace mfac_kernels
