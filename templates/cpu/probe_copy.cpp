#include "abi.h"
// tensors: source and destination of as many floats as the extent says; scaled, since a plain copy would become memcpy.
extern "C" int fuser_probe_copy(const FuserArgs* args, void*) {
    const float* __restrict source = static_cast<const float*>(args->tensors[0]);
    float* __restrict target = static_cast<float*>(args->tensors[1]);
    const int64_t count = static_cast<const int64_t*>(args->extents)[0];
    #pragma omp parallel for simd num_threads(args->threads) schedule(static)
    for (int64_t i = 0; i < count; ++i) target[i] = 0.5f * source[i];
    return 0;
}
