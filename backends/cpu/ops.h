// The kernels of the et_moe ops: the out forms of what `backends/ops` declares, where shapes,
// dtypes and arithmetic are described. Arguments come in the schema's order, results last.
#pragma once

#include "backends/cpu/op.h"

namespace et_moe::cpu {

void quantize_int8(Op& op, const Tensor& x, int64_t tile, Tensor& q, Tensor& scale);

void silu_quantize_int8(Op& op, const Tensor& x, int64_t tile, Tensor& q, Tensor& scale);

void rms_norm(Op& op, const Tensor& x, const Tensor& weight, double eps, Tensor& out);

void linear(Op& op, const Tensor& x, const Tensor& weight, const OptionalTensor& norm_weight,
            double eps, const OptionalTensor& residual, Tensor& out);

void linear_w4a8(Op& op, const Tensor& x, const Tensor& weight, const Tensor& scale,
                 int64_t group_size, const OptionalTensor& norm_weight, double eps,
                 const OptionalTensor& residual, Tensor& out);

void linear_w4a16(Op& op, const Tensor& x, const Tensor& weight, const Tensor& scale,
                  int64_t group_size, const OptionalTensor& norm_weight, double eps,
                  const OptionalTensor& residual, Tensor& out);

void linear_w8a8(Op& op, const Tensor& x, const Tensor& weight, const Tensor& scale,
                 const OptionalTensor& norm_weight, double eps, const OptionalTensor& residual,
                 Tensor& out);

void linear_w8a16(Op& op, const Tensor& x, const Tensor& weight, const Tensor& scale,
                  const OptionalTensor& norm_weight, double eps, const OptionalTensor& residual,
                  Tensor& out);

void embedding_w8(Op& op, const Tensor& ids, const Tensor& weight, const Tensor& scale,
                  int64_t dtype, Tensor& out);

void embedding_w4(Op& op, const Tensor& ids, const Tensor& weight, const Tensor& scale,
                  int64_t group_size, int64_t dtype, Tensor& out);

void moe_router(Op& op, const Tensor& x, const Tensor& norm_weight, const Tensor& weight,
                int64_t top_k, int64_t num_shared, double eps, const OptionalTensor& num_tokens,
                bool normalize, Tensor& normed, Tensor& topk_weights, Tensor& topk_ids);

void moe(Op& op, const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& topk_weights,
         const Tensor& topk_ids, const OptionalTensor& residual, Tensor& out);

void moe_w4a8(Op& op, const Tensor& x, const Tensor& w13, const Tensor& w13_scale, const Tensor& w2,
              const Tensor& w2_scale, const Tensor& topk_weights, const Tensor& topk_ids,
              int64_t group_size, const OptionalTensor& residual, Tensor& out);

void moe_w4a16(Op& op, const Tensor& x, const Tensor& w13, const Tensor& w13_scale,
               const Tensor& w2, const Tensor& w2_scale, const Tensor& topk_weights,
               const Tensor& topk_ids, int64_t group_size, const OptionalTensor& residual,
               Tensor& out);

void moe_w8a8(Op& op, const Tensor& x, const Tensor& w13, const Tensor& w13_scale, const Tensor& w2,
              const Tensor& w2_scale, const Tensor& topk_weights, const Tensor& topk_ids,
              const OptionalTensor& residual, Tensor& out);

void moe_w8a16(Op& op, const Tensor& x, const Tensor& w13, const Tensor& w13_scale,
               const Tensor& w2, const Tensor& w2_scale, const Tensor& topk_weights,
               const Tensor& topk_ids, const OptionalTensor& residual, Tensor& out);

void causal_conv1d(Op& op, const Tensor& x, const Tensor& weight, const Tensor& state,
                   const Tensor& slots, const OptionalTensor& num_tokens,
                   const OptionalTensor& versions, bool each_row, Tensor& out);

void gated_delta_rule(Op& op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                      const Tensor& beta, const Tensor& state, const Tensor& slots,
                      const OptionalTensor& num_tokens, const OptionalTensor& versions,
                      bool each_row, Tensor& out);

void gated_delta_net(Op& op, const Tensor& projected, const Tensor& conv_weight,
                     const Tensor& a_log, const Tensor& dt_bias, const Tensor& norm_weight,
                     const Tensor& conv_state, const Tensor& recurrent_state, const Tensor& slots,
                     double eps, const OptionalTensor& num_tokens, const OptionalTensor& versions,
                     bool each_row, Tensor& out);

void token_shift(Op& op, const Tensor& x, const Tensor& state, const Tensor& slots,
                 const Tensor& versions, const OptionalTensor& num_tokens, bool each_row,
                 Tensor& out);

void attention(Op& op, const Tensor& qkv, const Tensor& q_norm, const Tensor& k_norm,
               const Tensor& inv_freq, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& pages, const Tensor& positions, double eps,
               const OptionalTensor& num_tokens, int64_t first_token, bool each_row, Tensor& out);

void sample(Op& op, const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
            const Tensor& top_p, const Tensor& seed, const Tensor& positions, Tensor& out);

}  // namespace et_moe::cpu
