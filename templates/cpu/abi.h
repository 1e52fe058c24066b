// The C interface that every generated kernel shares; runtime/abi.py mirrors it field by field.
#pragma once
#include <cstdint>

extern "C" {

typedef struct {
    void* const* tensors;    // one address per tensor, in the order of the kernel's specification
    const int64_t* extents;  // run-time sizes, in the order of the kernel's specification
    int32_t threads;         // team size of every parallel region; on a GPU the number of its multiprocessors
    void* workspace;         // scratch memory, may be null when the kernel asks for none
    int32_t* status;         // where work on a GPU reports an index outside its table (1); null on a CPU
} FuserArgs;

typedef struct {
    int (*kernel)(const FuserArgs*, void*);  // the second argument is the CUDA stream; null on a CPU
    const FuserArgs* args;
} FuserStep;

}
