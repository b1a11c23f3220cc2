// Attention over documents, forward and backward, split over threads and built from one set of kernels.
#pragma once

#include "kernels.hpp"

namespace halfbyte {

// Rows of heads: number d of head h of token t of batch row b is data[b * batch + t * token + h * head + d].
struct Heads {
    void* data;
    std::int64_t batch, token, head;  // elements
};

// `documents` are `count` rows of (batch row, first token, token after the last), disjoint. A token sees the
// tokens of its own document; if causal, none after itself and, with a window > 0, only the last `window`.
// H is a multiple of Hkv: query head h reads key and value head h / (H / Hkv).
struct Attention {
    Type type;
    std::int64_t T, H, Hkv, D;
    const std::int32_t* documents;
    std::int64_t count;
    float scale;
    bool causal;
    std::int64_t window;  // 0: none; only with causal
};

// out = softmax(scale * q · kᵀ) · v over what is seen, lse (batch, H, T) = ln of the sum of e^(scale * q ·
// k). q, k, v and out of `type`; tokens in no document are left as they are.
void attention(const Kernels& kernels, const Attention& attention, const Heads& q, const Heads& k,
               const Heads& v, const Heads& out, float* lse, int threads);

// The gradients of q, k and v for the gradient `dout` of out; tokens in no document are left as they are.
// The numbers do not depend on the number of threads.
void attention_grad(const Kernels& kernels, const Attention& attention, const Heads& dout, const Heads& q,
                    const Heads& k, const Heads& v, const Heads& out, const float* lse, const Heads& dq,
                    const Heads& dk, const Heads& dv, int threads);

}  // namespace halfbyte
