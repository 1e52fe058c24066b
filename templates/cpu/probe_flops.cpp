#include "abi.h"
// extents: rounds of independent fused multiply-adds: more chains than a latency of 5 on two ports needs.
typedef float vec __attribute__((vector_size(FUSER_VECTOR_BYTES)));
extern "C" int fuser_probe_flops(const FuserArgs* args, void*) {
    constexpr int chains = FUSER_VECTOR_BYTES >= 64 ? 16 : 12;
    float* out = static_cast<float*>(args->tensors[0]);
    vec scale = vec{} + 0.999f, shift = vec{} + 0.001f, sum[chains];
    asm volatile("" : "+x"(scale), "+x"(shift));
    for (int c = 0; c < chains; ++c) sum[c] = vec{} + float(c);
    for (int64_t i = 0; i < static_cast<const int64_t*>(args->extents)[0]; ++i)
        for (int c = 0; c < chains; ++c) sum[c] = sum[c] * scale + shift;
    vec total = vec{};
    for (int c = 0; c < chains; ++c) total += sum[c];
    out[0] = total[0];
    out[1] = float(chains);
    return 0;
}
