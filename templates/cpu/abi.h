// The C interface that every generated kernel shares; written by `python -m fuser.runtime.abi`.
#pragma once
#include <cstdint>

extern "C" {

typedef struct {
    void* const* tensors;  // one address per tensor, in the template's order
    const void* extents;   // the kernel's struct of run-time sizes
    int32_t threads;       // team size of every parallel region; 1 on a GPU
    void* workspace;       // scratch memory, may be null when the kernel asks for none
    int32_t* status;       // where work on a GPU reports an index outside its table (1); null on a CPU
} FuserArgs;

typedef struct {
    int (*kernel)(const FuserArgs*, void*);  // the second argument is the CUDA stream; null on a CPU
    const FuserArgs* args;                   // what it is called with
} FuserStep;

}
