// What is compiled: the operations whose kernels call the same phases (ground.cuh, transport.cuh), as one translation
// unit. A phase is compiled once in it, instead of once for each of them, which saves a quarter of the time.
#include "cost.cu"
#include "emd.cu"
#include "sinkhorn.cu"
