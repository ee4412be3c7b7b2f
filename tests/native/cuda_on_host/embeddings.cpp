// The CUDA source, compiled for the host.
#include "../../../csrc/embeddings_cuda.cu"

float4 erniem_fast::shared[SHARED_BYTES / sizeof(float4)];
