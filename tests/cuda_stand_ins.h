// What CUDA C++ has beside C++, declared so that a compiler of the host can read kernels (test_shadowed_names.py). Nothing is defined.
#pragma once
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

struct Dimensions {
  unsigned x, y, z;
};
extern Dimensions blockIdx, threadIdx, blockDim, gridDim;

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
};
float2 make_float2(float, float);
float4 make_float4(float, float, float, float);
uint4 make_uint4(unsigned, unsigned, unsigned, unsigned);

void __syncthreads();
int __syncthreads_or(int);
void __syncwarp(unsigned = ~0u);
int __any_sync(unsigned, int);
int __all_sync(unsigned, int);
unsigned __ballot_sync(unsigned, int);
int __popc(unsigned);
int __ffs(int);
unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift);
template <typename T>
T __shfl_sync(unsigned, T, int, int = 32);
template <typename T>
T __shfl_xor_sync(unsigned, T, int, int = 32);
unsigned long __cvta_generic_to_shared(const void*);

float __fmaf_rn(float, float, float);
float __fdiv_rn(float, float);
int __float_as_int(float);
unsigned __float_as_uint(float);
float __int_as_float(int);
float __uint_as_float(unsigned);
unsigned __byte_perm(unsigned, unsigned, unsigned);
unsigned __vcmpgtu2(unsigned, unsigned);
float fabsf(float);
float fmaxf(float, float);
float fminf(float, float);
float tanhf(float);
int abs(int);
template <typename A, typename B>
auto max(A a, B b) -> decltype(a + b);
template <typename A, typename B>
auto min(A a, B b) -> decltype(a + b);
constexpr int max(int a, int b) { return a < b ? b : a; }
constexpr int min(int a, int b) { return a < b ? a : b; }
